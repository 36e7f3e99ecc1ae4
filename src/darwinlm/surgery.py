"""Surgery: a genome and the database make a physically smaller model. Weights are never zeroed, they are left out."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.database import Database
from darwinlm.families import Family, linear_at
from darwinlm.types import Genome, Unit

Module = TypeVar("Module", bound=nn.Module)


class NoAttn(nn.Module):
    """What is left where a block's attention was removed; the block adds its zero to the stream."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """What is left where a block's MLP was removed."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class Stitcher:
    """Stitches narrow models from a dense one and its database.

    A stitched model is an ordinary model of its family. It shares every weight that no genome changes with the dense
    model, and narrow modules with other stitched models: copy it before training it.
    """

    def __init__(self, dense: PreTrainedModel, family: Family, database: Database):
        self.dense = dense
        self.family = family
        self.database = database
        self.grid = database.grid
        # Mutants differ from their parent by a level or two: a few levels a unit are in use at a time.
        self._narrow = lru_cache(maxsize=4 * len(self.grid.units))(self._narrow_linears)

    def stitch(self, genome: Genome) -> PreTrainedModel:
        """The model that `genome` describes. Raises `UsageError` if the genome is for another model."""
        self.grid.check(genome)
        model = _open_up(self.dense, self.family)
        for index, (unit, level) in enumerate(zip(self.grid.units, genome.levels, strict=True)):
            if level == self.grid.highest(index):
                self._remove(model, unit)
            elif level > 0:
                for path, linear in self._narrow(index, level).items():
                    model.set_submodule(path, linear)
        return model

    def _remove(self, model: PreTrainedModel, unit: Unit) -> None:
        block = self.family.block(unit.block)
        if unit.kind == "attention":
            gone, stub, norms = self.family.attention, NoAttn(), self.family.attention_norms
        else:
            gone, stub, norms = self.family.mlp, NoMLP(), self.family.mlp_norms
        model.set_submodule(f"{block}.{gone}", stub)
        for norm in norms:
            model.set_submodule(f"{block}.{norm}", nn.Identity())

    def _narrow_linears(self, index: int, level: int) -> dict[str, nn.Linear]:
        """The linear modules of a unit at a level, by path: producers lose rows, the consumer is the database's."""
        found = self.database.level(index, level)
        unit = found.unit
        rows: dict[str, list[Tensor]] = {}
        for producer in unit.producers:
            offsets = torch.arange(producer.width)
            owned = producer.start + found.kept[:, None] * producer.width + offsets
            rows.setdefault(producer.module, []).append(owned.flatten())
        narrow = {path: _take_rows(linear_at(self.dense, path), torch.cat(parts)) for path, parts in rows.items()}
        narrow[unit.consumer] = _with_weight(linear_at(self.dense, unit.consumer), found.weight)
        return narrow


def _take_rows(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    rows = rows.to(linear.weight.device)
    bias = None if linear.bias is None else linear.bias.detach()[rows]
    return _linear(linear.weight.detach()[rows], bias)


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    bias = None if linear.bias is None else linear.bias.detach()
    return _linear(weight.to(device=linear.weight.device, dtype=linear.weight.dtype), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _open_up(dense: PreTrainedModel, family: Family) -> PreTrainedModel:
    """A copy of the dense model whose unit modules can be replaced, and which shares all weights with it."""
    model = _shallow(dense)
    paths = {family.blocks[:at] for at, letter in enumerate(family.blocks) if letter == "."} | {family.blocks}
    for block in range(dense.config.num_hidden_layers):
        root = family.block(block)
        paths |= {root, f"{root}.{family.attention}", f"{root}.{family.mlp}"}
    for path in sorted(paths, key=lambda path: path.count(".")):
        model.set_submodule(path, _shallow(model.get_submodule(path)))
    return model


def _shallow(module: Module) -> Module:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._parameters = dict(module._parameters)
    return clone
