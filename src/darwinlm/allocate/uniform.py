"""Uniform allocation: every unit loses the same share. The baseline, and the paper's start of the search."""

from __future__ import annotations

from random import Random

from darwinlm.allocate.mutation import restore
from darwinlm.budget import BELOW, Budget, Costs, Target, amount_of, limit_of
from darwinlm.config import RunConfig
from darwinlm.genome import Grid, ceilings, uniform_genome
from darwinlm.progress import say
from darwinlm.types import Genome

FILLINGS = 32  # ways to give back single levels, of which the one that fills the budget best is taken


def uniform(grid: Grid, costs: Costs, config: RunConfig) -> tuple[Genome, Budget]:
    """The uniform genome at a run's target, and the budget within which other genomes are sought.

    At a target level the uniform genome's own cost is the limit. At `--target` it is the largest uniform genome that
    fits, with single levels given back.

    Raises:
        UsageError: if the target cannot be reached.
    """
    if config.target is not None:
        return _largest(grid, costs, config)
    levels = config.database.levels
    genome = uniform_genome(grid, config.target_level, levels, Random(config.seed), config.keep_attention)
    limit = float(costs.of(genome))
    return genome, Budget(grid, costs, limit, (1 - BELOW) * limit, ceilings(grid, config.keep_attention))


def _largest(grid: Grid, costs: Costs, config: RunConfig) -> tuple[Genome, Budget]:
    assert config.target is not None
    budget = limit_of(Target.parse(config.target), costs, grid, ceilings(grid, config.keep_attention))
    count, levels = len(grid.units), config.database.levels
    # From the dense model downwards, one unit's step at a time.
    targets = (step / count for step in range(1, levels * count))
    even = (uniform_genome(grid, target, levels, Random(config.seed), config.keep_attention) for target in targets)
    start = next((genome for genome in map(budget.worth, even) if budget.fits(genome)), budget.least)
    filled = [restore(start, budget, Random(f"{config.seed} {way}")) for way in range(FILLINGS)]
    genome = max(filled, key=budget.cost)
    if not budget.admits(genome):
        found = budget.cost(genome)
        say(
            f"the level grid is too coarse for {config.target} to {BELOW:.0%}: {amount_of(found)} {costs.measure} is "
            f"the closest found below {amount_of(budget.limit)}; raise --database.levels"
        )
    return genome, budget.down_to(genome)
