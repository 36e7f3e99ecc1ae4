"""Stitching: a genome and the database make a physically smaller model. Weights are left out, never zeroed."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.database.levels import Level
from darwinlm.database.store import Database
from darwinlm.model.blocks import Blocks, Resident
from darwinlm.model.families import HEADS, key_value_heads, linear_at
from darwinlm.model.family import Family
from darwinlm.model.flow import is_selection
from darwinlm.model.layers import head_counts, head_dim
from darwinlm.types import Genome, Producer, Unit

Module = TypeVar("Module", bound=nn.Module)


LEVELS_KEPT = 2  # of each unit, on average: the parent's, and those in which mutants differ from it


class NoAttn(nn.Module):
    """Takes the place of an attention that was removed: its output, which the block adds to the stream, is zero.

    Args:
        adds: whether the attention itself adds the stream, its second argument; then that is the output.
    """

    def __init__(self, adds: bool = False):
        super().__init__()
        self.adds = adds

    def forward(self, hidden_states: Tensor, *others: Any, **_: object) -> tuple[Tensor, None]:
        return others[0] if self.adds else torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Takes the place of an MLP or a mixer that was removed: its output is zero, or the stream if it adds that."""

    def forward(self, hidden_states: Tensor, *stream: Tensor, **__: object) -> Tensor:
        return stream[0] if stream else torch.zeros_like(hidden_states)


class Selected(nn.Module):
    """Some outputs of a module, in any order and any number of times.

    Where KV heads have become unequal in how many query heads read them, it repeats each KV head's outputs for the
    query heads that read it, without holding a weight twice.

    Attributes:
        index: for each output of this module, which output of the inner module it is, `[outputs]`.
    """

    def __init__(self, module: nn.Module, index: Tensor):
        super().__init__()
        self.module = module
        self.index: Tensor
        self.register_buffer("index", index)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs).index_select(-1, self.index)


def select_heads(name: str, count: int, attention: Any, others: Any, arguments: Any) -> Any:
    """A hook: of what an attention is given for each of `count` heads, keep what is for those that it has.

    Args:
        name: of an argument, `[sequences * heads, 1, length]`, or `[sequences, heads, length, length]`.
    """
    given = arguments[name]
    if given is not None and given.shape[-3] % count == 0:
        arguments[name] = given.unflatten(-3, (-1, count))[..., getattr(attention, HEADS).index, :, :].flatten(-4, -3)
    return others, arguments


class Stitcher:
    """Stitches narrow models from a dense one and its database.

    A stitched model is an ordinary model of its family. It shares with the dense model every weight that its genome
    leaves alone, and narrow modules with other stitched models: copy it before training it.

    Args:
        kept_bytes: the most that narrow modules take which are kept for later models, the latest used ones; if None,
            some of every unit are.
    """

    def __init__(self, dense: PreTrainedModel, family: Family, database: Database, kept_bytes: int | None = None):
        self.dense = dense
        self.family = family
        self.database = database
        self.grid = database.grid
        self.kept_bytes = kept_bytes
        self._narrow: OrderedDict[tuple[int, int], dict[str, nn.Module]] = OrderedDict()  # the latest used last
        self._bytes = 0  # of what is in it
        self._units: defaultdict[int, list[tuple[int, Unit]]] = defaultdict(list)  # by block, with their positions
        for index, unit in enumerate(self.grid.units):
            self._units[unit.block].append((index, unit))

    def stitch(self, genome: Genome, blocks: Blocks | None = None) -> PreTrainedModel:
        """The model that `genome` describes.

        Args:
            blocks: the dense model's blocks, if they are elsewhere; each is needed only while its narrow one is made.

        Raises:
            UsageError: if the genome is for another model.
        """
        self.grid.check(genome)
        model = _shallow(self.dense)
        for path in sorted(_above(self.family.blocks) | {self.family.blocks}, key=len):
            model.set_submodule(path, _shallow(model.get_submodule(path)))
        source = blocks or Resident(self.dense, self.family)
        for number, dense in source.walk(0, self.dense.config.num_hidden_layers):
            block = self.block(number, genome, dense)
            # Modules that a narrow block shares with a visiting one lose their weights when that one leaves.
            model.set_submodule(self.family.block(number), block if blocks is None else _separate(block))
        return model

    def block(self, number: int, genome: Genome, dense: nn.Module) -> nn.Module:
        """Decoder block `number` of the model that `genome` describes.

        Args:
            dense: the dense model's block of this number, whose weights may be elsewhere than the dense model's own.
        """
        block = _opened(dense, self.family)
        for index, unit in self._units[number]:
            level = genome.levels[index]
            if level == self.grid.highest(index):
                self._remove(block, unit)
            elif level > 0:
                for path, module in self._narrow_modules(index, level, dense).items():
                    block.set_submodule(path, module)
                if unit.kind == "attention":
                    self._count_heads(block, unit, unit.structures - self.grid.removed[index][level])
                    self._select_heads(block, dense)
        return block

    def levels_of(self, number: int, genome: Genome) -> tuple[int, ...]:
        """The levels of the units of block `number`."""
        return tuple(genome.levels[index] for index, _ in self._units[number])

    def _remove(self, block: nn.Module, unit: Unit) -> None:
        family = self.family
        stubs: dict[str, nn.Module] = {}
        if unit.kind == "attention":
            stubs |= dict.fromkeys(family.attention_norms, nn.Identity())
            stubs[family.attention] = NoAttn(family.attention_adds)
        elif unit.kind == "mixer":
            stubs |= dict.fromkeys(family.mixer_norms, nn.Identity()) | {family.mixer: NoMLP()}
        elif family.mlp:
            stubs |= dict.fromkeys(family.mlp_norms, nn.Identity()) | {family.mlp: NoMLP()}
        else:  # its modules lie in the block itself
            stubs |= dict.fromkeys((*family.mlp_norms, *family.mlp_inputs), nn.Identity())
            stubs[family.mlp_output] = NoMLP()
        for path, stub in stubs.items():
            block.set_submodule(path, stub)

    def _count_heads(self, block: nn.Module, unit: Unit, remaining: int) -> None:
        """Set a narrow attention's numbers of heads wherever its forward pass reads them."""
        attention: Any = block.get_submodule(self.family.attention)
        width = head_dim(self.dense.config, unit.block)
        queries = remaining * unit.structure_width // width
        keys = key_value_heads(unit, remaining, queries)
        attention.num_key_value_groups = queries // keys
        counts = (self.family.query_counts, queries), (self.family.key_value_counts, keys)
        widths = self.family.query_widths, queries * width
        for names, count in (*counts, widths):
            for name in names:
                if name.startswith("config."):
                    attention.config = copy.copy(attention.config)
                    setattr(attention.config, name.removeprefix("config."), count)
                else:
                    setattr(attention, name, count)

    def _select_heads(self, block: nn.Module, dense: nn.Module) -> None:
        """Let a narrow attention pick what the model gives to each head before pruning."""
        if hasattr(dense.get_submodule(self.family.attention), HEADS):  # it does already
            return
        for name in self.family.biases:
            hook = partial(select_heads, name, head_counts(self.dense.config)[0])
            block.get_submodule(self.family.attention).register_forward_pre_hook(hook, with_kwargs=True)

    def _narrow_modules(self, index: int, level: int, dense: nn.Module) -> dict[str, nn.Module]:
        """The modules of a unit at a level, by path, made once while they stay among the latest used."""
        key = index, level
        if key in self._narrow:
            self._narrow.move_to_end(key)
        else:
            inside = f"{self.family.block(self.grid.units[index].block)}."
            found = self.database.level(index, level)
            self._narrow[key] = _narrow_modules(dense, inside, found)
            if self.family.biases and found.unit.kind == "attention":
                self._narrow[key][f"{self.family.attention}.{HEADS}"] = self._heads(found, dense)
            self._bytes += _bytes(self._narrow[key])
            while self._too_many():
                self._bytes -= _bytes(self._narrow.popitem(last=False)[1])
        return self._narrow[key]

    def _heads(self, level: Level, dense: nn.Module) -> Selected:
        """Which heads before pruning an attention at a level has."""
        before = getattr(dense.get_submodule(self.family.attention), HEADS, None)
        count = level.unit.structure_width // head_dim(self.dense.config, level.unit.block)
        heads = (level.kept[:, None] * count + torch.arange(count)).flatten()
        device = next(dense.parameters()).device
        return Selected(nn.Identity(), heads.to(device) if before is None else before.index[heads.to(device)])

    def _too_many(self) -> bool:
        """Whether fewer narrow modules must be kept; those just made are."""
        large = self.kept_bytes is not None and self._bytes > self.kept_bytes and len(self._narrow) > 1
        return large or len(self._narrow) > LEVELS_KEPT * len(self.grid.units)


def _bytes(modules: Mapping[str, nn.Module]) -> int:
    return sum(weight.nbytes for module in modules.values() for weight in module.parameters())


def _narrow_modules(dense: nn.Module, inside: str, level: Level) -> dict[str, nn.Module]:
    """The modules of a unit at a level, by path in its block: producers lose rows, the consumer is the database's.

    Args:
        dense: the block of the dense model.
        inside: the prefix of paths in the block.
    """
    rows: dict[str, list[Tensor]] = {}
    for producer in level.unit.producers:
        rows.setdefault(producer.module.removeprefix(inside), []).append(_rows_read(producer, level))
    narrow = {path: _select(dense.get_submodule(path), torch.cat(parts)) for path, parts in rows.items()}
    consumer = level.unit.consumer.removeprefix(inside)
    narrow[consumer] = _with_weight(linear_at(dense, consumer), level.weight)
    return narrow


def repeat_shared(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, each `Selected` linear module by one that holds the repeated rows, as a checkpoint needs."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Selected) and isinstance(module.module, nn.Linear):
            model.set_submodule(path, _take_rows(module.module, module.index))
    return model


def _rows_read(producer: Producer, level: Level) -> Tensor:
    """The producer's rows that a level's structures read: once a structure, or once a group if groups stay equal."""
    owners = level.kept // producer.readers
    if producer.readers > 1 and not level.unit.uneven:
        owners = owners.unique()
    return (producer.start + owners[:, None] * producer.width + torch.arange(producer.width)).flatten()


def _select(module: nn.Module, rows: Tensor) -> nn.Module:
    if not isinstance(module, nn.Linear):
        rows = rows.to(next(module.parameters()).device)
        # A block that visits loses its weights when it leaves, and what is made here is kept.
        if is_selection(module):
            return Selected(_shallow(module.module), module.index[rows])
        return Selected(_shallow(module), rows)
    stored, index = rows.unique(return_inverse=True)
    if len(stored) == len(rows):
        return _take_rows(module, rows)
    return Selected(_take_rows(module, stored), index.to(module.weight.device))


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


def _opened(dense: nn.Module, family: Family) -> nn.Module:
    """A copy of a dense block whose unit modules can be replaced, and which shares all weights with it."""
    block = _shallow(dense)
    inside = (
        family.attention, family.attention_output, family.query, family.key, family.value, *family.attention_norms,
        family.mlp, family.mlp_output, *family.mlp_inputs, *family.mlp_norms, family.mixer, *family.mixer_norms,
    )  # fmt: skip
    present = {path for path, _ in dense.named_modules()}  # an earlier pruning removes some
    open_up(block, present.intersection(inside))
    return block


def open_up(model: nn.Module, paths: Iterable[str]) -> None:
    """Give a model copies of its own, which share all weights, of the modules above some paths.

    Modules at these paths can be replaced then without changing the model that it shares modules with.
    """
    for outer in sorted({outer for path in paths for outer in _above(path)}, key=len):
        model.set_submodule(outer, _shallow(model.get_submodule(outer)))


def _shallow(module: Module) -> Module:
    """A copy that shares submodules and weights, but no dictionary of them or of hooks.

    It is without accelerate's hook, which would run the module itself instead of its copy.
    """
    clone = copy.copy(module)
    own = {name: value for name, value in vars(module).items() if name not in ("forward", "_old_forward", "_hf_hook")}
    clone.__dict__ = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in own.items()}
    return clone


def _separate(block: nn.Module) -> nn.Module:
    """A copy of a block that shares its weights and no module."""
    tensors = (*block.parameters(), *block.buffers())
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


def _above(path: str) -> set[str]:
    """The paths of the modules that contain a module."""
    return {path[:at] for at, letter in enumerate(path) if letter == "."}
