"""The start of the search against exhaustive enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwinlm.allocate.sensitivity import least_sensitive, sensitivities
from darwinlm.genome import Budget, Grid, ceilings, level_grid, prunable_parameters
from darwinlm.types import Genome, SelectionStage
from test_genome import units

STAGE = SelectionStage(1, 100)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 0.9))
def test_it_is_the_best_of_all_genomes_within_the_budget(seed: int, share: float) -> None:
    grid, rng = level_grid(units(2, heads=3, channels=160), 5, 32), Random(seed)
    table = [sorted(rng.random() for _ in removed) for removed in grid.removed]
    budget = Budget(grid, int(share * prunable_parameters(grid, grid.dense())), ceilings(grid))

    def total(genome: Genome) -> float:
        return sum(row[level] for row, level in zip(table, genome.levels, strict=True))

    everything = (Genome(levels) for levels in itertools.product(*(range(len(removed)) for removed in grid.removed)))
    best = min((genome for genome in everything if budget.admits(genome)), key=total)
    found = least_sensitive(budget, table)
    assert budget.admits(found)
    # Costs are rounded up to cells, so a genome that fills the budget to the last parameter may be passed over.
    tight = Budget(grid, int(budget.limit * 0.999), budget.ceilings)
    assert total(found) == pytest.approx(total(best)) or not tight.admits(best)


class Counting:
    """Adds up what each unit's level costs; notes what it is asked."""

    def __init__(self, grid: Grid):
        self.grid, self.asked = grid, 0

    def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
        self.asked += 1
        assert parent == self.grid.dense()
        (index,) = (i for i, level in enumerate(genome.levels) if level)
        return (index + 1) * genome.levels[index] ** 2


def test_each_unit_is_measured_alone_and_between_levels_interpolated(tmp_path: Path) -> None:
    grid = level_grid(units(2, heads=3, channels=640), 20, 32)
    scorer = Counting(grid)
    table = sensitivities(grid, scorer, STAGE, tmp_path / "state.json")
    assert table[0] == [0, 1, 4, 9]
    assert [table[1][level] for level in (0, 1, 3, 10, 20)] == [0, 2, 2 * 9, 2 * 100, 2 * 400]
    assert table[1][2] == 2 * (1 + 9) / 2
    asked = scorer.asked
    assert sensitivities(grid, scorer, STAGE, tmp_path / "state.json") == table
    assert scorer.asked == asked


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    grid = level_grid(units(3, heads=3, channels=640), 20, 32)

    class Stopped(Counting):
        def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
            if genome.levels[3]:
                raise KeyboardInterrupt
            return super().score(genome, stage, parent)

    with pytest.raises(KeyboardInterrupt):
        sensitivities(grid, Stopped(grid), STAGE, tmp_path / "state.json")
    again = Counting(grid)
    table = sensitivities(grid, again, STAGE, tmp_path / "state.json")
    whole = Counting(grid)
    assert table == sensitivities(grid, whole, STAGE, tmp_path / "other.json")
    assert again.asked < whole.asked
