"""Exports for vLLM: a check for what its Transformers backend would refuse, and modules of zeros where it needs some.

The rules are those of `vllm/model_executor/models/transformers`; `benchmarks/serving.py` holds them against vLLM.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from darwinlm.model.families import block_sizes_of
from darwinlm.model.layers import family_of, head_counts, head_width, is_pruned, layer_config
from darwinlm.model.pruned import (
    auto_map,
    module_name,
    pruned_config,
    pruned_model,
    render,
)
from darwinlm.model.reading import read_config, read_whole, skeleton
from darwinlm.model.wrapped import is_wrapper
from darwinlm.model.wrapper_code import wrapper_auto_map
from darwinlm.runtime.files import read_json
from darwinlm.types import BlockSizes, UsageError

STUB = BlockSizes(query_heads=1, key_value_heads=1, intermediate=32)  # sizes of the modules of zeros
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the table of attention functions in transformers
LARGEST_PARALLEL = 8  # devices
MIXERS = (
    "expected blocks that mix tokens by attention alone, found linear attention, convolutions or state spaces, which "
    "vLLM's Transformers backend does not run"
)

WIDTHS = (
    "expected heads of one width, found others in some blocks, which vLLM's Transformers backend is not known to run"
)


def zero_stubs(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same outputs that has an attention and an MLP in every block.

    Where `model` lacks one of them, the result has a small one of zeros: an attention with one query head and one KV
    head, or an MLP with 32 channels. It shares all other weights with `model`, which must be of the class that an
    export loads into.

    Raises:
        UsageError: if blocks mix tokens otherwise than by attention, or have heads of different widths.
    """
    sizes = block_sizes_of(model)
    if _has_mixers(model):
        raise UsageError(f"--compat vllm: {MIXERS}; leave it out")
    if head_width(model.config, 0):
        raise UsageError(f"--compat vllm: {WIDTHS}; leave it out")
    full = tuple(
        BlockSizes(
            block.query_heads or STUB.query_heads,
            block.key_value_heads or STUB.key_value_heads,
            block.intermediate or STUB.intermediate,
        )
        for block in sizes
    )
    weights = model.state_dict()
    for name, parameter in skeleton(pruned_config(model.config, full)).state_dict().items():
        if name not in weights:
            value = 1.0 if name.endswith("norm.weight") else 0.0
            weights[name] = torch.full(parameter.shape, value, dtype=model.dtype, device=model.device)
    return pruned_model(model, full, weights)


def check_vllm(directory: Path) -> list[str]:
    """Return what vLLM's Transformers backend would refuse of an export, each with its cure.

    The list is empty if vLLM would serve the export.

    Raises:
        UsageError: if the directory holds no model of a supported family.
    """
    if not (directory / "config.json").is_file():
        raise UsageError(f"no model in {directory}: expected config.json in it; name an export")
    whole, config = read_whole(directory), read_config(directory)
    around, family = is_wrapper(whole), family_of(config)
    model, heads = skeleton(config), _heads(config)
    mixers = _has_mixers(model)
    refusals = [f"{MIXERS}: serve it with transformers"] if mixers else []
    if is_pruned(config) and head_width(config, 0):
        refusals.append(f"{WIDTHS}: serve it with transformers")
    bare = [str(index) for index, counts in enumerate(heads) if counts is None]
    if bare and not mixers:
        refusals.append(f"no attention in block {', '.join(bare)}: export with --compat vllm, which writes zeros there")
    uneven = [str(index) for index, counts in enumerate(heads) if counts is not None and counts[0] % counts[1]]
    if uneven:
        refusals.append(
            f"query heads are not the same number for every KV head in block {', '.join(uneven)}: prune with "
            "--database.structure kv_group or balanced"
        )
    if is_pruned(config):
        if read_json(directory / "config.json").get("auto_map") != (
            wrapper_auto_map(family_of(whole)) if around else auto_map(family)
        ):
            refusals.append("config.json has no complete auto_map, AutoModel above all: export the model again")
        code = directory / f"{module_name(family)}.py"
        if not code.exists() or code.read_text(encoding="utf-8") != render(family):
            refusals.append(f"{code.name} is missing or not that of this darwinlm: export the model again")
    return refusals + _check_classes(model)


def _heads(config: PreTrainedConfig) -> list[tuple[int, int] | None]:
    """How many query heads and KV heads the config says that each block has, None where it has no attention."""
    layers = [layer_config(config, index) for index in range(config.num_hidden_layers)]
    return [None if "attention" in getattr(layer, "skip", ()) else head_counts(layer) for layer in layers]


def _has_mixers(model: PreTrainedModel) -> bool:
    return any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules())


def tensor_parallel_sizes(sizes: Sequence[BlockSizes]) -> tuple[int, ...]:
    """Return the numbers of devices that a model can be split among: those that divide the sizes of every block."""
    numbers = [number for block in sizes for number in (block.query_heads, block.key_value_heads, block.intermediate)]
    return tuple(size for size in range(1, LARGEST_PARALLEL + 1) if all(number % size == 0 for number in numbers))


def _check_classes(model: PreTrainedModel) -> list[str]:
    """Return what the classes of the installed transformers lack; Falcon's, BLOOM's and MPT's mix tokens themselves."""
    cure = "install the transformers that this darwinlm was tested with"
    refusals: list[str] = []
    if not model._supports_attention_backend:
        refusals.append(
            f"{type(model).__name__} does not support attention backends in transformers {transformers.__version__}: "
            "serve it with transformers, or with llama.cpp as a GGUF file"
        )
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "o_proj"):
            calls = _interface_calls(type(module))
            if calls != 1:
                refusals.append(f"{name} calls the attention interface {calls} times, not once: {cure}")
            config = getattr(module, "config", None)
            if (getattr(config, "whole", None) or config) is not model.config:
                refusals.append(f"{name} does not read its attention backend from the model's config: {cure}")
    return refusals


def _interface_calls(cls: type[nn.Module]) -> int:
    """Return how often `forward` calls a function from the table of attention functions; vLLM requires once."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
    nodes = list(ast.walk(ast.parse(source)))
    functions: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_lookup(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            functions |= {target.id for target in targets if isinstance(target, ast.Name)}
    return sum(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions for node in nodes
    )


def _is_lookup(node: ast.expr) -> bool:
    """Return whether a node is `ALL_ATTENTION_FUNCTIONS.get_interface(...)` or `ALL_ATTENTION_FUNCTIONS[...]`."""
    lookup = node.func if isinstance(node, ast.Call) else node
    return isinstance(lookup, ast.Attribute | ast.Subscript) and ast.unparse(lookup.value) == INTERFACE
