"""Export to a Hugging Face directory, which transformers loads without darwinlm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.export.around import save_wrapper
from darwinlm.export.card import wrapper_card
from darwinlm.export.verify import Expected, verify_export
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.frame import find_frame
from darwinlm.model.layers import DENSE_SIZES, family_of, is_pruned
from darwinlm.model.licence import licence_files
from darwinlm.model.pruned import (
    auto_map,
    module_name,
    pruned_model,
    remaining_blocks,
    render,
    renumber_blocks,
)
from darwinlm.model.wrapped import WRAPPED, is_wrapper
from darwinlm.model.wrapper_code import wrapper_auto_map
from darwinlm.runtime.files import new_directory
from darwinlm.runtime.progress import quiet_transformers, say
from darwinlm.types import BlockSizes


def export_hf(
    model: PreTrainedModel,
    sizes: Sequence[BlockSizes],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    card: str,
    expected: Expected | None = None,
    origin: Path | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write a stitched model as a directory that `AutoModelForCausalLM` loads, and return `out`.

    It holds the weights in the model's own precision, but those of `origin` that are the same and more precise there,
    such as norms in float32, as they are; the config, the tokenizer, the generation config, the model card
    `card` as README.md, the code of the model unless a stock class can load it, and the licence files that lie in
    `origin`, the directory of the model that this one was made from. If that is a wrapper, such as a model of
    images and text, the export is the same wrapper around the stitched model. The directory appears whole or not
    at all. If `expected` is given, it appears only after a fresh process has loaded it and computed those logits, and
    after `finish` has changed it.

    Raises:
        UsageError: if the family cannot be exported, or as `new_directory` does.
        DarwinError: if the weights of `model` do not have the sizes `sizes`, or as `verify_export` does.
    """
    exported = pruned_model(model, sizes)
    dense = None if origin is None else Checkpoint(origin)
    wrapper = dense if dense is not None and is_wrapper(dense.whole) else None
    weights = exported.state_dict() if dense is None else _precise_weights(model, exported, sizes, dense)
    with new_directory(out) as directory:
        with quiet_transformers():
            if wrapper is not None:
                save_wrapper(directory, exported, weights, wrapper)
            else:
                exported.save_pretrained(directory, state_dict=None if dense is None else weights)
        for weights in directory.glob("*.safetensors"):  # safetensors 0.8 lets only their owner read them
            shutil.copymode(directory / "config.json", weights)
        tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text(wrapper_card(card) if wrapper else card, encoding="utf-8")
        for file in [] if origin is None else licence_files(origin):
            shutil.copyfile(file, directory / file.name)
        family = family_of(exported.config)
        own_code = is_pruned(exported.config)
        if own_code:
            (directory / f"{module_name(family)}.py").write_text(render(family), encoding="utf-8")
        found_by = wrapper_auto_map(family_of(wrapper.whole)) if wrapper else auto_map(family)
        _complete_config(directory / "config.json", found_by if own_code else {})
        if expected is not None:
            difference = verify_export(directory, expected)
            say(f"export: loads without darwinlm, largest difference of a logit {difference:.1e}")
        if finish is not None:
            finish(directory)
    return out


def _precise_weights(
    model: PreTrainedModel, exported: PreTrainedModel, sizes: Sequence[BlockSizes], dense: Checkpoint
) -> dict[str, Tensor]:
    """Return the weights to write, tied ones once."""
    precise = {name: dense.precise(name, parameter) for name, parameter in model.named_parameters()}
    tied = {name for name, _ in exported.named_parameters(remove_duplicate=False)}
    once = dict(exported.named_parameters())
    state: dict[str, Tensor] = exported.state_dict()
    renumbered = renumber_blocks(precise, remaining_blocks(sizes, model.config), find_frame(model).blocks)
    return {name: renumbered.get(name, tensor) for name, tensor in state.items() if name in once or name not in tied}


def _complete_config(path: Path, full_auto_map: dict[str, str]) -> None:
    """Add to config.json what `save_pretrained` leaves out: the whole `auto_map`, and what had other names before.

    Without these, transformers 4 and programs built on it load a stock model, which computes wrong logits, and versions
    of transformers 5 in which heads of full attention had a width of their own do not load such a model.
    """
    config = json.loads(path.read_text())
    text = config.get(WRAPPED, config)
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:  # where every layer has the same
        text["rope_theta"] = rope.pop("rope_theta")
    _name_global_heads(text, plain=not full_auto_map)
    if full_auto_map:
        config["auto_map"] = full_auto_map
    elif rope.get("rope_type", "default") != "default":
        # With an unknown model type, it makes AutoTokenizer of transformers 5.23 fail where no code is trusted.
        text["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _name_global_heads(text: dict[str, Any], plain: bool) -> None:
    """Say in the fields of older versions how heads differ where attention is full.

    Args:
        plain: whether no code comes with the model; newer versions then make all of `per_layer_config` of these fields.
    """
    layers = {int(index): own for index, own in (text.get("per_layer_config") or {}).items()}
    full = [index for index, kind in enumerate(text.get("layer_types") or ()) if kind == "full_attention"]
    own = [layers.get(index, {}) for index in full]
    widths = {each.get("head_dim") for each in own}
    if len(widths) != 1 or None in widths:
        return
    sizes = text.get(DENSE_SIZES)
    keys = sizes[full[0]][1] if sizes else own[0].get("num_key_value_heads")
    text |= {"global_head_dim": widths.pop(), "num_global_key_value_heads": keys}
    alike = layers.keys() == {*full} and all(each == own[0] for each in own)
    if plain and alike and (own[0].keys() <= {"head_dim"} or text.get("attention_k_eq_v")):
        del text["per_layer_config"]
