"""The block runner: token ids in, hidden states through block after block, wherever the blocks' weights are.

Everything that goes through a model without training it runs so. A family's own blocks are called, never their parts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.family import Family
from darwinlm.model.frame import Recorder, is_handed_on

Handed = dict[str, tuple[Tensor, ...]]  # what blocks hand on, such as the keys and values of one kind of attention


@dataclass(frozen=True)
class Stream:
    """What goes from block to block.

    Attributes:
        states: the hidden states.
        handed: what the blocks so far hand on to later ones beside them, by its name.
    """

    states: Float[Tensor, "sequences length hidden"]
    handed: Handed = field(default_factory=dict)

    def to(self, device: torch.device) -> Stream:
        """The same stream on a device."""
        handed = {name: tuple(each.to(device) for each in tensors) for name, tensors in self.handed.items()}
        return Stream(self.states.to(device), handed)


@dataclass(frozen=True)
class Entry:
    """How token ids enter the blocks.

    Attributes:
        states: the hidden states in front of block 0.
        arguments: the keyword arguments of each block, such as masks and rotary angles.
    """

    states: Float[Tensor, "sequences length hidden"]
    arguments: list[dict[str, Any]]


def enter(model: PreTrainedModel, family: Family, token_ids: Int[Tensor, "sequences length"]) -> Entry:
    """Run a model's own forward pass with recorders in place of its blocks, so that it computes its family's masks.

    The blocks need no weights.
    """
    backbone: Any = model.get_submodule(family.backbone)
    parent = model.get_submodule(family.blocks.rpartition(".")[0])
    name = family.blocks.rpartition(".")[2]
    blocks: Any = getattr(parent, name)
    norm = model.get_submodule(family.final_norm)
    recorders = [Recorder(family.block(index), block, family.returns_more) for index, block in enumerate(blocks)]
    setattr(parent, name, nn.ModuleList(recorders))
    model.set_submodule(family.final_norm, nn.Identity())
    try:
        backbone(input_ids=token_ids, use_cache=False)
    finally:
        setattr(parent, name, blocks)
        model.set_submodule(family.final_norm, norm)
    assert recorders[0].states is not None
    return Entry(recorders[0].states, [recorder.calls[0] for recorder in recorders])


class Arguments:
    """What the blocks are called with on batches, kept once for all of one shape.

    What depends on the tokens is computed again for each block: of all blocks it can be larger than the hidden states.
    """

    def __init__(self, model: PreTrainedModel, family: Family):
        self.model, self.family = model, family
        self._kept: dict[torch.Size, list[dict[str, Any]]] = {}

    def enter(self, token_ids: Int[Tensor, "sequences length"]) -> Float[Tensor, "sequences length hidden"]:
        """The hidden states in front of block 0, of a batch that blocks will run on."""
        entry = enter(self.model, self.family, token_ids)
        self._kept[token_ids.shape] = entry.arguments
        return entry.states

    def of(self, token_ids: Int[Tensor, "sequences length"], block: int) -> dict[str, Any]:
        """The keyword arguments of a block."""
        kept = self._kept[token_ids.shape][block]
        if not self.family.given:
            return kept
        own = enter(self.model, self.family, token_ids).arguments[block]
        return kept | {name: own[name] for name in self.family.given}


def run_block(block: nn.Module, stream: Stream, arguments: Mapping[str, Any]) -> Stream:
    """Run a block and return the stream behind it, without what else some families' blocks return."""
    handed = {name: type(value)(stream.handed) for name, value in arguments.items() if is_handed_on(value)}
    output = block(stream.states, **{**arguments, **handed})
    behind = stream.handed.copy()
    for each in handed.values():
        behind |= each.data
    return Stream(output[0] if isinstance(output, tuple) else output, behind)


@runtime_checkable
class Blocks(Protocol):
    """The decoder blocks of a dense model, which come to the device in turn."""

    def walk(self, first: int, end: int) -> Iterator[tuple[int, nn.Module]]:
        """Yield the blocks from `first` up to `end`, which is left out, with their indices.

        A block may be used until the next one is asked for.
        """
        ...


@dataclass(frozen=True)
class Resident:
    """Blocks that stay on the device."""

    model: PreTrainedModel
    family: Family

    def walk(self, first: int, end: int) -> Iterator[tuple[int, nn.Module]]:
        """As `Blocks.walk`."""
        for index in range(first, end):
            yield index, self.model.get_submodule(self.family.block(index))


@dataclass(frozen=True)
class InHostMemory:
    """Blocks in the host's memory, each of which is copied to the device while the one before it computes.

    Attributes:
        model: what it has beside its blocks is on the device.
    """

    model: PreTrainedModel
    family: Family

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family, device: torch.device) -> InHostMemory:
        """The blocks of a model in the host's memory, all of whose other modules are moved to the device."""
        blocks = model.get_submodule(family.blocks)
        inside = set(blocks.modules())
        there: dict[Tensor, nn.Parameter] = {}  # of tied weights, one
        for module in model.modules():
            if module not in inside:
                for name, weight in module.named_parameters(recurse=False):
                    if weight not in there:
                        there[weight] = nn.Parameter(weight.detach().to(device), requires_grad=False)
                    module._parameters[name] = there[weight]
                move_buffers(module, device)
        if device.type == "cuda":  # pages that stay where they are can be copied while the device computes
            for weight in blocks.parameters():
                weight.data = weight.data.pin_memory()
        return cls(model, family)

    def walk(self, first: int, end: int) -> Iterator[tuple[int, nn.Module]]:
        """As `Blocks.walk`. Two blocks are on the device at a time."""
        copying = _Copying.to(self.model.device)
        following = self._copied(first, copying) if first < end else None
        for index in range(first, end):
            block = following
            assert block is not None
            copying.wait()
            following = self._copied(index + 1, copying) if index + 1 < end else None
            yield index, block
            block.to("meta")  # whoever asked for it may hold it until the next one is there

    def _copied(self, index: int, copying: _Copying) -> nn.Module:
        block = self.model.get_submodule(self.family.block(index))
        weights, buffers = list(block.parameters()), list(block.buffers())
        there = copying.begin([*weights, *buffers])
        copies: dict[int, Any] = {
            id(weight): nn.Parameter(copied, requires_grad=False)
            for weight, copied in zip(weights, there, strict=False)
        }
        copies |= {id(buffer): copied for buffer, copied in zip(buffers, there[len(weights) :], strict=True)}
        return copy.deepcopy(block, copies)


@dataclass(frozen=True)
class _Copying:
    """Copies to a device while it computes.

    The copies are the computing stream's memory. That of another stream would be kept apart by torch and never be used
    again: 40 GiB of an H100 within one search.
    """

    device: torch.device
    stream: torch.cuda.Stream | None

    @classmethod
    def to(cls, device: torch.device) -> _Copying:
        return cls(device, torch.cuda.Stream(device) if device.type == "cuda" else None)

    def begin(self, tensors: list[Tensor]) -> list[Tensor]:
        """Begin to copy tensors once the device is done with what it was told so far."""
        there = [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # which does nothing without one
            for copied, tensor in zip(there, tensors, strict=True):
                copied.copy_(tensor, non_blocking=True)
        return there

    def wait(self) -> None:
        """Let the device compute nothing more before what was begun is there."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


@dataclass(frozen=True)
class InShards:
    """Blocks in a checkpoint's files, of which one is read at a time.

    Attributes:
        skeleton: the checkpoint's model without weights, whose blocks are filled and emptied in turn.
    """

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> InShards:
        """The blocks of a checkpoint, with a skeleton that has on the device all that is not in them.

        Raises:
            DarwinError: as `Checkpoint.fill`.
        """
        model = checkpoint.skeleton()
        fill_ends(checkpoint, model, [checkpoint.family.blocks], dtype, device)
        return cls(checkpoint, model, dtype, device)

    def walk(self, first: int, end: int) -> Iterator[tuple[int, nn.Module]]:
        """As `Blocks.walk`. Raises as `Checkpoint.fill`."""
        for index in range(first, end):
            block = self.checkpoint.fill(self.skeleton, self.checkpoint.family.block(index), self.dtype, self.device)
            yield index, block
            block.to("meta")


def fill_ends(
    checkpoint: Checkpoint, model: PreTrainedModel, blocks: Sequence[str], dtype: torch.dtype, device: torch.device
) -> None:
    """Give a skeleton the weights that are not in its blocks, on a device. Raises as `Checkpoint.fill`.

    Args:
        blocks: the paths of the blocks, or of what holds them.
    """
    inside = {module for path in blocks for module in model.get_submodule(path).modules()}
    seen: set[nn.Parameter] = set()  # a tied weight is stored once
    for path, module in list(model.named_modules()):
        own = set(module.parameters(recurse=False))
        if module in inside:
            continue
        if own - seen:
            seen |= own
            checkpoint.fill(model, path, dtype, device)
        move_buffers(module, device)
    model.tie_weights()


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move a module's own buffers to a device: not all families move the frequencies of their rotary angles."""
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
