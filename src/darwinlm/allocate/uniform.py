"""Uniform allocation: every unit loses the same share. The baseline, and the start of the search."""

from __future__ import annotations

from random import Random

from darwinlm.genome import Budget, Grid, ceilings, prunable_parameters, uniform_genome
from darwinlm.types import Genome


def uniform(grid: Grid, target_level: float, levels: int, seed: int) -> tuple[Genome, Budget]:
    """The uniform genome at a target level, and the budget that its size sets for every other allocator."""
    genome = uniform_genome(grid, target_level, levels, Random(seed))
    return genome, Budget(grid, prunable_parameters(grid, genome), ceilings(grid))
