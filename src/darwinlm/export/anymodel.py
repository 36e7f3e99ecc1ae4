"""The form that is proposed for vLLM's AnyModel, which serves layers of different sizes by the stock class's own code.

It is that of https://github.com/vllm-project/vllm/pull/36512 and of what NVIDIA's Model Optimizer writes for it: a
stock config of which `architectures` is AnyModel and `base_architecture` the stock class; `per_layer_config` has of
each layer what differs from the rest of the config, and under `skip` what it lacks. No release of vLLM reads it yet.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from darwinlm.model.layers import family_of, is_pruned
from darwinlm.model.pruned import module_name, stock_names
from darwinlm.model.reading import read_config, read_whole, skeleton
from darwinlm.model.shards import read_headers
from darwinlm.model.wrapped import is_wrapper
from darwinlm.runtime.progress import quiet_transformers
from darwinlm.types import UsageError

ARCHITECTURE = "AnyModel"
OURS = ("auto_map", "layer_parts")  # fields that only the code of an export reads
CURE = "leave --compat anymodel out"


def as_anymodel(directory: Path) -> None:
    """Turn an export into the form for AnyModel; one whose layers are all alike needs none and stays what it is.

    Raises:
        UsageError: if the stock class's layers, given sizes of their own, have not the tensors of the export.
    """
    if is_wrapper(read_whole(directory)):
        raise UsageError(f"--compat anymodel: expected a model of text alone, found one around it; {CURE}")
    pruned = read_config(directory)
    family = family_of(pruned)
    if not is_pruned(pruned):
        return
    path = directory / "config.json"
    fields = anymodel_fields(json.loads(path.read_text()), family)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (directory / f"{module_name(family)}.py").unlink()
    with quiet_transformers():
        _check_layers(directory, pruned.layer_parts)


def anymodel_fields(fields: dict[str, Any], family: str) -> dict[str, Any]:
    """The config of an export in the form for AnyModel."""
    layers = {
        index: {name: value for name, value in layer.items() if fields.get(name) != value}
        for index, layer in fields["per_layer_config"].items()
    }
    return {name: value for name, value in fields.items() if name not in OURS} | {
        "model_type": family,
        "architectures": [ARCHITECTURE],
        "base_architecture": stock_names(family)["AutoModelForCausalLM"],
        "per_layer_config": {index: layer for index, layer in layers.items() if layer},
    }


def _check_layers(directory: Path, parts: dict[str, Any]) -> None:
    """Raise `UsageError` unless stock layers of these configs have the tensors in the directory."""
    config: Any = AutoConfig.from_pretrained(directory)
    shapes = {name: header.shape for name, header in read_headers(directory).items()}
    layer_class = type(_stock_layers(config, parts["layers"])[0])
    for index in range(config.num_hidden_layers):
        inside = re.compile(rf"(?:.*\.)?{re.escape(parts['layers'])}\.{index}\.(.+)")
        found = {match[1]: shape for name, shape in shapes.items() if (match := inside.fullmatch(name))}
        if found != _layer_shapes(layer_class, config.per_layer_config[index], index, parts["stubs"]):
            raise UsageError(
                f"--compat anymodel: expected layers of {config.model_type} that take sizes of their own, found layer "
                f"{index}, which the stock class would build with other tensors; {CURE}"
            )


def _stock_layers(config: PreTrainedConfig, path: str) -> Any:
    """The layers of a stock model, all alike."""
    fields = {name: value for name, value in config.to_dict().items() if "per_layer" not in name}
    return skeleton(type(config)(**fields)).base_model.get_submodule(path)


def _layer_shapes(
    layer_class: Any, config: PreTrainedConfig, index: int, stubs: dict[str, Any]
) -> dict[str, tuple[int, ...]] | None:
    """The shape of every tensor of a stock layer without what it skips, None if it cannot be built."""
    try:
        with torch.device("meta"):
            layer = layer_class(config, index)
    except (TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError):
        return None
    gone = tuple(f"{path}." for part in getattr(config, "skip", ()) for path in stubs[part])
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items() if not name.startswith(gone)}
