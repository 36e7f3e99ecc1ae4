"""What an export's config says of the modules of a layer, so that its code can narrow stock layers of any family.

Nothing here knows a family: all of it follows from the roles of the modules.
"""

from __future__ import annotations

from typing import Any

from darwinlm.model.roles import Family


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
        "stubs": {"attention": _stubs(family, family.attention_norms, family.attention), "mlp": _mlp_stubs(family)},
    }


def _rows(family: Family) -> dict[str, list[str]]:
    """What the output rows of each module add up to; a fused projection has those of several roles."""
    roles = [(family.query, "query width"), (family.key, "key width"), (family.value, "key width")]
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


def _mlp_stubs(family: Family) -> dict[str, str]:
    if family.mlp:
        return _stubs(family, family.mlp_norms, family.mlp)
    return dict.fromkeys((*family.mlp_norms, *family.mlp_inputs), "Identity") | {family.mlp_output: "NoMLP"}


def _stubs(family: Family, norms: tuple[str, ...], unit: str) -> dict[str, str]:
    return dict.fromkeys(norms, "Identity") | {unit: "NoAttn" if unit == family.attention else "NoMLP"}
