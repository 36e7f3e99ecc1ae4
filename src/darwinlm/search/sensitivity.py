"""The start of the search: the genome of least summed sensitivity within the budget, by dynamic programming.

A unit's sensitivity at a level is the rise of the fitness when that unit alone is pruned. The sum over units estimates
a genome's fitness, and the genome with the least estimate is a far better start than the uniform genome.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from darwinlm.config.run import SearchConfig
from darwinlm.genome import Grid
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_record, write_record
from darwinlm.runtime.progress import say, track
from darwinlm.search.budget import Bound, Budget
from darwinlm.search.fitness import Scorer
from darwinlm.search.mutation import adapt, restore
from darwinlm.types import Genome, SelectionStage

SENSITIVITIES = "sensitivities.json"
MEASURED = 3  # levels of a unit that are measured besides level 1; those between are interpolated
TOGETHER = 16  # units that are measured at the same time: the dense model's logits are made once for all
LEAST = 1e-6  # nats a token: the least sensitivity of a level above 0
WORST = 1e6  # nats a token: the sensitivity of a level at which the fitness is not finite
CELLS = 20_000  # into which the budget is divided; costs are rounded up to whole cells


def find_starts(
    uniform: Genome, budget: Budget, scorer: Scorer, config: SearchConfig, seed: int, directory: Path
) -> dict[str, Genome]:
    """Return start genomes by name, as large as the budget allows; the best becomes a search's first parent.

    Args:
        uniform: the uniform genome of the budget.
        directory: where the measured sensitivities are kept.
    """
    starts = {"uniform": uniform}
    if config.start == "sensitivity":
        stage = SelectionStage(1, config.stages[0].fitness_tokens)
        table = sensitivities(budget.grid, scorer, stage, directory / SENSITIVITIES)
        genome = least_sensitive(budget, table)
        fits = budget.fits(genome)  # where two bounds limit the same units, it may not
        starts["sensitivity"] = restore(genome, budget, Random(seed)) if fits else adapt(genome, budget, table)
    exact = {name: genome for name, genome in starts.items() if budget.admits(genome)}
    return exact or {name: genome for name, genome in starts.items() if budget.fits(genome)}


def start_tokens(grid: Grid, config: SearchConfig) -> int:
    """Return how many tokens are scored, over all genomes, to find the first parent of a search."""
    if config.start != "sensitivity":
        return config.stages[-1].fitness_tokens
    single = sum(len(measured_levels(grid.highest(index))) for index in range(len(grid.units)))
    return (1 + single) * config.stages[0].fitness_tokens + 2 * config.stages[-1].fitness_tokens


def sensitivities(grid: Grid, scorer: Scorer, stage: SelectionStage, state: Path) -> list[list[float]]:
    """Return by how much the fitness rises with one unit at one level and all others dense: `result[unit][level]`.

    The file `state` keeps the rows that are measured, some units at a time. A later call continues from it unless the
    file belongs to another grid.
    """
    dense = grid.dense()
    table = _kept(grid, state)
    indices = range(len(table), len(grid.units))
    if not indices:
        return table
    (before,) = scorer.scores([dense], stage)
    groups = [indices[start : start + TOGETHER] for start in range(0, len(indices), TOGETHER)]
    for group in track(groups, "sensitivities", -(-len(grid.units) // TOGETHER), len(table) // TOGETHER):
        changes = [(index, level) for index in group for level in measured_levels(grid.highest(index))]
        scores = scorer.scores([dense.replace({index: level}) for index, level in changes], stage, dense)
        rises = {change: min(max(score - before, LEAST), WORST) for change, score in zip(changes, scores, strict=True)}
        table += [_interpolated(grid.highest(index), index, rises) for index in group]
        if parallel.first():
            write_record(state, {"rises": table}, _measured_on(grid))
    return table


def measured_sensitivities(state: Path) -> list[list[float]]:
    """Return what an earlier `sensitivities` has kept in a file, or nothing where there is none.

    Raises:
        DarwinError: if the file is damaged.
    """
    return read_record(state, "rises")["rises"] if state.exists() else []


def _interpolated(highest: int, index: int, rises: Mapping[tuple[int, int], float]) -> list[float]:
    """Return the rise at every level of a unit, given that at those that are measured."""
    levels = measured_levels(highest)
    # Removing more cannot help: where noise says so, the value of the lower level is taken.
    rising = np.maximum.accumulate([rises[index, level] for level in levels])
    # The rise grows roughly by a factor with each level, so it is interpolated on a logarithmic scale.
    between = np.exp(np.interp(range(1, highest + 1), levels, np.log(rising)))
    return [0.0, *between.tolist()]


def measured_levels(highest: int) -> list[int]:
    """Return, in ascending order, the levels that are measured of a unit whose highest level is `highest`."""
    return sorted({round(highest * i / MEASURED) for i in range(MEASURED + 1)} - {0} | {1})


def _kept(grid: Grid, state: Path) -> list[list[float]]:
    """Return the rows that an earlier call has measured of this grid, or none."""
    record = read_record(state, "rises") if state.exists() else {"rises": [], "provenance": _measured_on(grid)}
    parallel.wait_for_all()  # every process has read the file before the first one writes it
    if record["provenance"] == _measured_on(grid):
        return record["rises"]
    say(f"{state} is of another model or other levels: its sensitivities are measured again")
    return []


def _measured_on(grid: Grid) -> dict[str, Any]:
    """Return what a table of sensitivities is of: the structures that each level of each unit removes."""
    return {unit.name: list(removed) for unit, removed in zip(grid.units, grid.removed, strict=True)}


def least_sensitive(budget: Budget, table: list[list[float]]) -> Genome:
    """Return the genome within the budget whose sensitivities have the least sum.

    Each bound allots levels to the units that cost something by it and that no earlier bound has allotted levels to.
    Where two bounds limit the same units, the result can therefore exceed the later one.
    """
    levels = dict[int, int]()
    for bound in budget.bounds:
        costs = bound.costs.units
        levels |= _least_sensitive(
            budget, bound, [i for i in range(len(table)) if i not in levels and any(costs[i])], table
        )
    return budget.least.replace(levels)


def _least_sensitive(budget: Budget, bound: Bound, indices: list[int], table: list[list[float]]) -> dict[int, int]:
    """Return the levels of the units `indices` within one bound, by dynamic programming over these units.

    Costs are rounded up to whole cells, so the limit is never exceeded.
    """
    cell = (bound.limit - bound.costs.fixed) / CELLS
    best = np.zeros(CELLS + 1)  # the least sum of sensitivities over the units so far, for each cost in cells
    choices = []
    cells = {index: [int(np.ceil(cost / cell)) for cost in bound.costs.units[index]] for index in indices}
    for index in indices:
        sensitivity = table[index]
        options = np.full((len(sensitivity), CELLS + 1), np.inf)
        for level in budget.steps[index]:
            needed = cells[index][level]
            if needed <= CELLS:
                options[level, needed:] = best[: CELLS + 1 - needed] + sensitivity[level]
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if np.isinf(best[CELLS]):  # rounded up, even the cheapest genome may exceed the limit
        return {index: budget.least.levels[index] for index in indices}
    levels, remaining = {}, CELLS
    for index, choice in zip(reversed(indices), reversed(choices), strict=True):
        levels[index] = int(choice[remaining])
        remaining -= cells[index][levels[index]]
    return levels
