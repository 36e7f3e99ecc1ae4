"""SmolLM2-135M with random parts of it cut out: which parts does not matter to loading and speed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darwinlm.database.stitch import NoAttn, NoMLP
from darwinlm.export.hf import export_hf
from darwinlm.export.verify import Expected
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.types import BlockSizes

MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Kept:
    """What is kept of a block: KV groups and MLP channels, in ascending order."""

    groups: tuple[int, ...]
    channels: tuple[int, ...]


def dense_smollm2(workspace: Path) -> tuple[Checkpoint, Any]:
    """The checkpoint, and its model in float32."""
    checkpoint = find_checkpoint(MODEL, workspace)
    return checkpoint, checkpoint.load(torch.float32, torch.device("cpu"))


def masked(dense: Any, kept: Sequence[Kept]) -> Any:
    """The dense model with zeros where a lost structure would enter the stream."""
    model = copy.deepcopy(dense)
    for layer, block in zip(model.model.layers, kept, strict=True):
        for linear, columns in (
            (layer.self_attn.o_proj, _spread(block.groups, _group_width(model))),
            (layer.mlp.down_proj, _spread(block.channels, 1)),
        ):
            gone = torch.ones(linear.in_features, dtype=torch.bool)
            gone[columns] = False
            linear.weight.data[:, gone] = 0
    return model


def stitched(dense: Any, kept: Sequence[Kept]) -> tuple[Any, list[BlockSizes]]:
    """The dense model with those structures cut out, and what is left of each block."""
    model = copy.deepcopy(dense)
    readers = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, block in zip(model.model.layers, kept, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        if block.groups:
            _narrow(attention.q_proj, _spread(block.groups, _group_width(model)))
            for projection in (attention.k_proj, attention.v_proj):
                _narrow(projection, _spread(block.groups, attention.head_dim))
            attention.o_proj.weight = _columns(attention.o_proj, _spread(block.groups, _group_width(model)))
        else:
            layer.self_attn, layer.input_layernorm = NoAttn(), nn.Identity()
        if block.channels:
            channels = _spread(block.channels, 1)
            _narrow(mlp.gate_proj, channels)
            _narrow(mlp.up_proj, channels)
            mlp.down_proj.weight = _columns(mlp.down_proj, channels)
        else:
            layer.mlp, layer.post_attention_layernorm = NoMLP(), nn.Identity()
    sizes = [BlockSizes(len(b.groups) * readers, len(b.groups), len(b.channels)) for b in kept]
    return model, sizes


def export(checkpoint: Checkpoint, dense: Any, kept: Sequence[Kept], out: Path, expected: Expected | None) -> Path:
    """The export of the stitched model."""
    model, sizes = stitched(dense, kept)
    return export_hf(model, sizes, checkpoint.tokenizer, out, "A random part of SmolLM2-135M\n", expected)


def _group_width(model: Any) -> int:
    return model.config.head_dim * (model.config.num_attention_heads // model.config.num_key_value_heads)


def _spread(kept: Sequence[int], width: int) -> Tensor:
    return torch.tensor([structure * width + offset for structure in kept for offset in range(width)], dtype=torch.long)


def _narrow(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.data[rows])


def _columns(linear: nn.Linear, columns: Tensor) -> nn.Parameter:
    return nn.Parameter(linear.weight.data[:, columns])
