"""Calibration: one pass of the dense model over the calibration tokens, block by block (section 3.1).

Never more than one block's weights, its statistics and the activations in flight are held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from darwinlm.checkpoint import Checkpoint
from darwinlm.types import DarwinError, Unit, UnitStatistics


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    token_ids: Int[Tensor, "sequences length"],
    *,
    batch_size: int,
    device: torch.device,
    finished: Collection[str] = (),
) -> Iterator[UnitStatistics]:
    """Yield the statistics of each unit of the dense model, in order: `H = 2/tokens * sum x x^T` in float32.

    Units named in `finished` are passed through without being measured; blocks after the last unfinished one are not
    run at all.

    Raises:
        DarwinError: if weights or activations are not finite; it names the unit.
    """
    pending = [unit for unit in checkpoint.units if unit.name not in finished]
    if not pending:
        return
    model = checkpoint.skeleton()
    batches = token_ids.split(batch_size)
    hidden, arguments = _embed(checkpoint, model, batches, device)
    for block in range(pending[-1].block + 1):
        path = checkpoint.family.block(block)
        layer = checkpoint.fill(model, path, torch.float32, device)
        measured = {unit: _Gram(unit) for unit in pending if unit.block == block}
        with ExitStack() as hooks:
            for unit, gram in measured.items():
                consumer = model.get_submodule(unit.consumer)
                hooks.callback(consumer.register_forward_pre_hook(gram).remove)
            for index, states in enumerate(hidden):
                hidden[index] = layer(states, **arguments[block][len(states)])
        for unit, gram in measured.items():
            yield gram.statistics(model.get_submodule(unit.consumer).weight)
        layer.to("meta")


class _Gram:
    """A forward pre-hook that sums `x x^T` over a consumer's inputs."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.sum: Tensor | None = None
        self.tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        if self.sum is None:
            self.sum = x.new_zeros(x.shape[1], x.shape[1])
        self.sum.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def statistics(self, weight: Float[Tensor, "d_out d_in"]) -> UnitStatistics:
        assert self.sum is not None
        if not torch.isfinite(self.sum).all():
            raise DarwinError(
                f"the inputs of {self.unit.consumer} hold NaN or infinity on the calibration text; "
                "the model overflows: check its weights"
            )
        return UnitStatistics(self.unit, weight.detach(), self.sum * (2 / self.tokens), self.tokens)


class _Recorder(nn.Module):
    """Stands in for a decoder block: keeps the arguments it is called with and passes the stream on."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = [block]  # in a list, so that it is no submodule
        self.states: list[Tensor] = []
        self.arguments: dict[int, dict[str, Any]] = {}  # by batch size, on which masks may depend

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    def forward(self, states: Tensor, **arguments: Any) -> Tensor:
        self.states.append(states)
        self.arguments[len(states)] = arguments
        return states


def _embed(
    checkpoint: Checkpoint, model: nn.Module, batches: tuple[Tensor, ...], device: torch.device
) -> tuple[list[Tensor], list[dict[int, dict[str, Any]]]]:
    """The stream into block 0 for every batch, and what each block is called with (masks, rotary angles) by batch size.

    The model's own forward runs over stand-ins for its blocks, so that no family's masks are rebuilt here.
    """
    family = checkpoint.family
    checkpoint.fill(model, family.embedding, torch.float32, device)
    parent = model.get_submodule(family.blocks.rpartition(".")[0])
    name = family.blocks.rpartition(".")[2]
    blocks, norm = getattr(parent, name), model.get_submodule(family.final_norm)
    recorders = nn.ModuleList([_Recorder(block) for block in blocks])
    run = partial(model.get_submodule(family.backbone), use_cache=False)
    setattr(parent, name, recorders)
    model.set_submodule(family.final_norm, nn.Identity())
    try:
        for batch in batches:
            run(input_ids=batch.to(device))
    finally:
        setattr(parent, name, blocks)
        model.set_submodule(family.final_norm, norm)
        model.get_submodule(family.embedding).to("meta")
    return recorders[0].states, [recorder.arguments for recorder in recorders]
