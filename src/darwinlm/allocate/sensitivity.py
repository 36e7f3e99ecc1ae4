"""The start of the search: least summed sensitivity within the budget, by dynamic programming.

A unit's sensitivity at a level is the KL divergence of the model in which that unit alone is pruned. Summed over units
it is a first guess of a genome's divergence, and the genome of least guess is a far better start than a uniform one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from darwinlm.artifact import read_json, write_json
from darwinlm.fitness import Scorer
from darwinlm.genome import Budget, Grid
from darwinlm.progress import track
from darwinlm.types import Genome, SelectionStage

MEASURED = 6  # levels of a unit that are measured; those between are interpolated
CELLS = 20_000  # of the budget, into which costs are rounded up


def sensitivities(grid: Grid, scorer: Scorer, stage: SelectionStage, state: Path) -> list[list[float]]:
    """KL divergence of the model with one unit at one level and all others dense: `result[unit][level]`.

    The file `state` keeps what is measured, unit by unit; a later call goes on from it.
    """
    dense = grid.dense()
    table: list[list[float]] = read_json(state) if state.exists() else []
    indices = range(len(table), len(grid.units))
    for index in track(indices, "sensitivities", len(grid.units), len(table)):
        highest = grid.highest(index)
        levels = sorted({round(highest * i / MEASURED) for i in range(MEASURED + 1)} | {1})
        found = [scorer.score(dense.replace({index: level}), stage, dense) if level else 0.0 for level in levels]
        # More is never better than less: what noise says otherwise is flattened.
        rising = np.maximum.accumulate(found)
        table.append(np.interp(range(highest + 1), levels, rising).tolist())
        write_json(state, table)
    return table


def least_sensitive(budget: Budget, table: list[list[float]]) -> Genome:
    """The genome within the budget whose sensitivities sum up to least.

    Dynamic programming over units, the cost so far rounded up to one of `CELLS` cells, so the budget is never passed.
    """
    grid, cell = budget.grid, budget.limit / CELLS
    best = np.zeros(CELLS + 1)  # least sum of sensitivities at each cost, over the units so far
    chosen = []
    for index, (unit, removed) in enumerate(zip(grid.units, grid.removed, strict=True)):
        options = np.full((budget.ceilings[index] + 1, CELLS + 1), np.inf)
        for level in range(len(options)):
            cells = int(np.ceil(unit.parameters(removed[level]) / cell))
            if cells <= CELLS:
                options[level, cells:] = best[: CELLS + 1 - cells] + table[index][level]
        chosen.append(options.argmin(axis=0))
        best = options.min(axis=0)
    levels, left = [], CELLS
    for index in reversed(range(len(grid.units))):
        level = int(chosen[index][left])
        levels.append(level)
        left -= int(np.ceil(grid.units[index].parameters(grid.removed[index][level]) / cell))
    return Genome(tuple(reversed(levels)))
