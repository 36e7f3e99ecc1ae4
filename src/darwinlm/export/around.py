"""Export of a wrapper: a pruned language model, and around it all that its dense model had, unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.hub import PROCESSORS
from darwinlm.model.layers import PRUNED, family_of, is_pruned
from darwinlm.model.pruned import module_name
from darwinlm.model.reading import read_parameter
from darwinlm.model.rewriting import write_model
from darwinlm.model.wrapped import LOGITS, WRAPPED, empty_wrapper, text_paths
from darwinlm.model.wrapper_code import WHOLE, render_wrapper, wrapper_auto_map
from darwinlm.runtime.progress import say


def save_wrapper(directory: Path, text: PreTrainedModel, weights: Mapping[str, Tensor], dense: Checkpoint) -> None:
    """Write a wrapper around a pruned language model: weights, configs, processor files, and code if it needs some.

    Args:
        weights: those of `text` to write, by name.
        dense: the wrapper that it was made from.
    """
    paths = {inside: outside for outside, inside in text_paths(empty_wrapper(dense.whole), text).items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights.items():
            inside = next(path for path in paths if name.startswith(f"{path}."))
            yield paths[inside] + name.removeprefix(inside), tensor
        for name, header in dense.beside.items():
            yield name, read_parameter(dense.path, header)

    write_model(directory, _config(text, dense), tensors(), [])
    if text.generation_config is not None:
        text.generation_config.save_pretrained(directory)
    for name in PROCESSORS:
        if (dense.path / name).exists():
            shutil.copyfile(dense.path / name, directory / name)
    family, text_family = family_of(dense.whole), family_of(text.config)
    if is_pruned(text.config):
        code = render_wrapper(family, text_family)
        (directory / f"{module_name(family)}.py").write_text(code, encoding="utf-8")
    say(f"export: {len(dense.beside)} tensors beside the language model are those of {dense.path.name}")


def _config(text: PreTrainedModel, dense: Checkpoint) -> dict[str, Any]:
    """The config of the dense wrapper, around that of the pruned language model."""
    family = family_of(dense.whole)
    fields = json.loads(dense.whole.to_json_string())
    inner = json.loads(text.config.to_json_string())
    own_code = is_pruned(text.config)
    stock = wrapper_auto_map(family)[WHOLE].rpartition(".Pruned")[2]
    for name in ("auto_map", "_name_or_path"):
        fields.pop(name, None)
        inner.pop(name, None)
    inner |= {name: getattr(getattr(dense.whole, WRAPPED), name) for name in LOGITS if name in inner}
    fields |= {WRAPPED: inner, "tie_word_embeddings": bool(text.config.tie_word_embeddings)}
    fields |= {"model_type": f"{PRUNED}{family}" if own_code else family}
    fields |= {"architectures": [f"Pruned{stock}" if own_code else stock]}
    fields |= {"dtype": str(text.dtype).removeprefix("torch.")}
    return fields
