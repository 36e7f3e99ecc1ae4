"""The start of the search: least summed sensitivity within the budget, by dynamic programming.

A unit's sensitivity at a level is what the fitness rises by when that unit alone is pruned. Summed over units it is a
first guess of a genome's fitness, and the genome of least guess is a far better start than a uniform one.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from darwinlm.config.run import SearchConfig
from darwinlm.genome import Grid
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_json, write_json
from darwinlm.runtime.progress import say, track
from darwinlm.search.budget import Budget
from darwinlm.search.fitness import Scorer
from darwinlm.search.mutation import restore
from darwinlm.types import Genome, SelectionStage

MEASURED = 3  # levels of a unit that are measured, and the first; those between are interpolated


LEAST = 1e-6  # nats a token: what no level costs less than


WORST = 1e6  # nats a token: what a unit's removal costs that leaves no finite fitness


CELLS = 20_000  # of the budget, into which costs are rounded up


def find_starts(
    even: Genome, budget: Budget, scorer: Scorer, config: SearchConfig, seed: int, directory: Path
) -> dict[str, Genome]:
    """The genomes by name, as large as the budget allows, of which the best is to be a search's first parent.

    Args:
        even: the uniform genome of the budget.
        directory: keeps the sensitivities that are measured.
    """
    starts = {"uniform": even}
    if config.start == "sensitivity":
        stage = SelectionStage(1, config.stages[0].fitness_tokens)
        table = sensitivities(budget.grid, scorer, stage, directory / "sensitivities.json")
        starts["sensitivity"] = restore(least_sensitive(budget, table), budget, Random(seed))
    exact = {name: genome for name, genome in starts.items() if budget.admits(genome)}
    return exact or {name: genome for name, genome in starts.items() if budget.fits(genome)}


def start_tokens(grid: Grid, config: SearchConfig) -> int:
    """Tokens that finding the first parent scores genomes on."""
    if config.start != "sensitivity":
        return config.stages[-1].fitness_tokens
    alone = sum(len(measured_levels(grid.highest(index))) for index in range(len(grid.units)))
    return (1 + alone) * config.stages[0].fitness_tokens + 2 * config.stages[-1].fitness_tokens


def sensitivities(grid: Grid, scorer: Scorer, stage: SelectionStage, state: Path) -> list[list[float]]:
    """Rise of the fitness with one unit at one level and all others dense: `result[unit][level]`.

    The file `state` keeps what is measured, unit by unit; a later call goes on from it, unless it is of another grid.
    Processes share the levels of each unit.
    """
    dense = grid.dense()
    table = _kept(grid, state)
    indices = range(len(table), len(grid.units))
    if not indices:
        return table
    (before,) = scorer.scores([dense], stage)
    for index in track(indices, "sensitivities", len(grid.units), len(table)):
        highest = grid.highest(index)
        levels = measured_levels(highest)
        alone = [dense.replace({index: level}) for level in levels]
        found = [min(max(score - before, LEAST), WORST) for score in scorer.scores(alone, stage, dense)]
        # More is never better than less: what noise says otherwise is flattened.
        rising = np.maximum.accumulate(found)
        # Every level multiplies it, roughly; straight lines would be too high between the measured levels.
        between = np.exp(np.interp(range(1, highest + 1), levels, np.log(rising)))
        table.append([0.0, *between.tolist()])
        if parallel.first():
            write_json(state, table)
    return table


def measured_levels(highest: int) -> list[int]:
    """Of a unit whose highest level this is, rising."""
    return sorted({round(highest * i / MEASURED) for i in range(MEASURED + 1)} - {0} | {1})


def _kept(grid: Grid, state: Path) -> list[list[float]]:
    """What an earlier call has measured of this grid."""
    table: Any = read_json(state) if state.exists() else []
    rows: list[Any] = table if isinstance(table, list) and len(table) <= len(grid.units) else [None]
    if all(isinstance(row, list) and len(row) == grid.highest(index) + 1 for index, row in enumerate(rows)):
        parallel.wait_for_all()  # all have read it before the first writes
        return list(rows)
    say(f"{state} is of another model or other levels: its sensitivities are measured again")
    parallel.wait_for_all()
    return []


def least_sensitive(budget: Budget, table: list[list[float]]) -> Genome:
    """The genome within the budget's limit whose sensitivities sum up to least.

    Dynamic programming over units, the cost so far rounded up to one of `CELLS` cells, so the limit is never passed.
    """
    cell = (budget.limit - budget.costs.fixed) / CELLS
    best = np.zeros(CELLS + 1)  # least sum of sensitivities at each cost, over the units so far
    chosen = []
    cells = [[int(np.ceil(cost / cell)) for cost in costs] for costs in budget.costs.units]
    for index, sensitivity in enumerate(table):
        options = np.full((len(sensitivity), CELLS + 1), np.inf)
        for level in budget.steps[index]:
            needed = cells[index][level]
            if needed <= CELLS:
                options[level, needed:] = best[: CELLS + 1 - needed] + sensitivity[level]
        chosen.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if np.isinf(best[CELLS]):  # costs are rounded up: only the cheapest genome may be left
        return budget.least
    levels, left = [], CELLS
    for index in reversed(range(len(table))):
        level = int(chosen[index][left])
        levels.append(level)
        left -= cells[index][level]
    return Genome(tuple(reversed(levels)))
