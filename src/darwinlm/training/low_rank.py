"""Low-rank updates of linear modules whose own weights are frozen: little memory, and more than their neighbours do.

peft's adapters (LoRA) are the same sum. Here one learning rate has to serve them and whole matrices at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from darwinlm.genome import Grid
from darwinlm.model.families import linear_at
from darwinlm.types import Genome

UP, DOWN = "low_rank_up", "low_rank_down"  # in names of weights, where no family has modules that are called so
SEED = 0  # of what the updates begin with: the same in all processes, and when a refit is resumed


class LowRank(nn.Linear):
    """`y = x (W + up down)^T + b`, in which only `up`, zero at first, and `down` train.

    The elements of `down` have a variance of 1 / rank, so that a step of `up` at some learning rate changes the
    elements of the product about as much as a step at that rate changes those of a whole matrix.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        rank = min(rank, *linear.weight.shape)
        down = torch.randn(rank, linear.weight.shape[1], generator=generator) / rank**0.5
        self.down = nn.Parameter(down.to(linear.weight.device))
        self.up = nn.Parameter(torch.zeros(len(linear.weight), rank, device=linear.weight.device))

    def forward(self, read: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(read) + nn.functional.linear(nn.functional.linear(read, self.down), self.up)


def add_updates(model: nn.Module, paths: Iterable[str], rank: int) -> dict[str, nn.Parameter]:
    """Give linear modules low-rank updates, and return what trains, in float32, by path with `.UP` or `.DOWN`."""
    generator, weights = torch.Generator().manual_seed(SEED), dict[str, nn.Parameter]()
    for path in paths:
        module = LowRank(linear_at(model, path), rank, generator)
        model.set_submodule(path, module)
        weights |= {f"{path}.{DOWN}": module.down, f"{path}.{UP}": module.up}
    return weights


def low_rank_weights(grid: Grid, genome: Genome, hidden: int, rank: int) -> int:
    """Count the weights of updates of all producers that a genome leaves, each of `rank` times its rows and columns."""
    count = 0
    for unit, left in zip(grid.units, grid.left(genome), strict=True):
        if left:
            rows = unit.parameters(unit.structures - left) // hidden - left * unit.structure_width
            count += rows + hidden * len({producer.module for producer in unit.producers})
    return rank * count
