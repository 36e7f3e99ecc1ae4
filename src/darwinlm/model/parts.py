"""What an export's config says of the modules of a layer, so that its code can narrow stock layers of any family.

Nothing here knows a family: all of it follows from the roles of the modules.
"""

from __future__ import annotations

from typing import Any

from darwinlm.model.family import Family

_NORMS = ("attention_norms", "mlp_norms", "mixer_norms")


def layer_parts(family: Family, base: str) -> dict[str, Any]:
    """Return the field `layer_parts` of an export's config, by whose names `modeling_pruned_llama.narrow` goes.

    Args:
        base: the path of the base model, inside of which the list of layers is.
    """
    return {
        "layers": family.blocks.removeprefix(f"{base}."),
        "output": family.output_embedding,
        "attention": family.attention,
        "rows": _rows(family),
        "columns": {family.attention_output: "query width", family.mlp_output: "channels"},
        "attributes": _attributes(family),
        "biases": family.biases,
        "attention adds": family.attention_adds,
        "stubs": _all_stubs(family),
    }


def _rows(family: Family) -> dict[str, list[str]]:
    """What the output rows of each module add up to; a fused projection has those of several roles."""
    query = [(family.query, "query width")] * (2 if family.gate == family.query else 1)
    roles = [*query, (family.key, "key width"), (family.value, "key width")]
    rows: dict[str, list[str]] = {}
    for path, name in [*roles, *((path, "channels") for path in family.mlp_inputs)]:
        rows.setdefault(path, []).append(name)
    return rows


def _attributes(family: Family) -> dict[str, str]:
    """The numbers that the attention's methods read from attributes."""
    attributes = {"num_key_value_groups": "readers"}
    for names, number in (
        (family.query_counts, "queries"),
        (family.key_value_counts, "keys"),
        (family.query_widths, "query width"),
    ):
        for name in names:
            if name.startswith("config."):
                attributes["config"] = "config"
            else:
                attributes[name] = number
    return attributes


def _all_stubs(family: Family) -> dict[str, dict[str, str]]:
    """By the name of a unit, what takes the place of its modules where a layer lacks it."""
    identities = {norms: dict.fromkeys(getattr(family, norms), "Identity") for norms in _NORMS}
    stubs = {"attention": identities["attention_norms"] | {family.attention: "NoAttn"}}
    if family.mlp:
        stubs["mlp"] = identities["mlp_norms"] | {family.mlp: "NoMLP"}
    else:
        inputs = dict.fromkeys(family.mlp_inputs, "Identity")
        stubs["mlp"] = identities["mlp_norms"] | inputs | {family.mlp_output: "NoMLP"}
    if family.mixer:
        stubs["mixer"] = identities["mixer_norms"] | {family.mixer: "NoMLP"}
    return stubs
