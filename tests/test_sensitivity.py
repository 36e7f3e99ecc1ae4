"""The start of the search equals the result of exhaustive enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwinlm.config.run import SearchConfig
from darwinlm.genome import Grid, level_grid
from darwinlm.runtime.progress import console
from darwinlm.search import sensitivity
from darwinlm.search.budget import Bound, Budget
from darwinlm.search.costs import parameter_costs
from darwinlm.search.sensitivity import find_starts, least_sensitive, sensitivities
from darwinlm.search.uniform import ceilings
from darwinlm.types import DarwinError, Genome, SelectionStage
from test_genome import units

STAGE = SelectionStage(1, 100)
DENSE = 3.0  # the dense model's score, which is not 0 where the fitness is perplexity


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 0.9))
def test_it_is_the_best_of_all_genomes_within_the_budget(seed: int, share: float) -> None:
    grid, rng = level_grid(units(2, heads=3, channels=160), 5, 32), Random(seed)
    table = [sorted(rng.random() for _ in removed) for removed in grid.removed]
    costs = parameter_costs(grid, 5000)
    limit = costs.fixed + share * (costs.of(grid.dense()) - costs.fixed)
    budget = Budget(grid, (Bound(costs, limit),), ceilings(grid))

    def total(genome: Genome) -> float:
        return sum(row[level] for row, level in zip(table, genome.levels, strict=True))

    everything = (Genome(levels) for levels in itertools.product(*(range(len(removed)) for removed in grid.removed)))
    best = min((genome for genome in everything if budget.fits(genome)), key=total)
    genome = least_sensitive(budget, table)
    assert budget.fits(genome)
    # Costs are rounded up to cells, so a genome that fills the budget to the last parameter may be passed over.
    tight = replace(budget, bounds=(Bound(costs, limit - 0.001 * (limit - costs.fixed)),))
    assert total(genome) == pytest.approx(total(best)) or not tight.fits(best)


@pytest.mark.parametrize("share", [1.0, 1.0005])
def test_where_rounding_leaves_no_room_it_is_the_cheapest_genome(share: float) -> None:
    grid = level_grid(units(2, heads=3, channels=160), 5, 32)
    costs = parameter_costs(grid, 10**5)
    roomy = Budget(grid, (Bound(costs, 1e9),), ceilings(grid))
    budget = replace(roomy, bounds=(Bound(costs, share * costs.of(roomy.least)),))
    genome = least_sensitive(budget, [[float(level) for level in range(len(removed))] for removed in grid.removed])
    assert budget.fits(genome)


def test_a_start_that_is_smaller_than_asked_for_does_not_stand_in_for_one_that_is_not(tmp_path: Path) -> None:
    grid = level_grid(units(2, heads=3, channels=160), 5, 32)
    costs = parameter_costs(grid, 10**5)
    uniform = Genome(tuple(grid.highest(index) // 2 for index in range(len(grid.units))))
    limit = float(costs.of(uniform))
    smaller, config = uniform.replace({0: grid.highest(0)}), SearchConfig(stages=(STAGE,))
    budget = Budget(grid, (Bound(costs, limit, limit),), ceilings(grid))
    starts = find_starts(uniform, budget, Counting(grid), config, 0, tmp_path)
    assert starts
    assert all(budget.admits(genome) for genome in starts.values())
    near, none = (replace(budget, bounds=(b,)) for b in (Bound(costs, limit, 0.99 * limit), Bound(costs, limit - 1)))
    assert "uniform" not in find_starts(smaller, near, Counting(grid), config, 0, tmp_path)
    assert find_starts(smaller, none, Counting(grid), config, 0, tmp_path), "better than nothing"


class Counting:
    """Scores a genome by the sum of a cost for each unit's level, and records what it has scored."""

    def __init__(self, grid: Grid):
        self.grid, self.asked = grid, 0

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        return [self.score(genome, parent) for genome in genomes]

    def score(self, genome: Genome, parent: Genome | None) -> float:
        self.asked += 1
        if genome == self.grid.dense():
            return DENSE
        assert parent == self.grid.dense()
        (index,) = (i for i, level in enumerate(genome.levels) if level)
        return DENSE + (index + 1) * genome.levels[index] ** 2


def test_each_unit_is_measured_alone_and_between_levels_interpolated(tmp_path: Path) -> None:
    grid = level_grid(units(2, heads=3, channels=640), 20, 32)
    scorer = Counting(grid)
    table = sensitivities(grid, scorer, STAGE, tmp_path / "state.json")
    assert table[0] == pytest.approx([0, 1, 4, 9])
    assert [table[1][level] for level in (0, 1, 7, 13, 20)] == pytest.approx([0, 2, 2 * 49, 2 * 169, 2 * 400])
    assert table[1][4] == pytest.approx(2 * (1 * 49) ** 0.5)  # half way from 1 to 7, each level by the same factor
    asked = scorer.asked
    assert sensitivities(grid, scorer, STAGE, tmp_path / "state.json") == table
    assert scorer.asked == asked


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "TOGETHER", 2)
    grid = level_grid(units(3, heads=3, channels=640), 20, 32)

    class Stopped(Counting):
        def score(self, genome: Genome, parent: Genome | None) -> float:
            if genome.levels[3]:
                raise KeyboardInterrupt
            return super().score(genome, parent)

    with pytest.raises(KeyboardInterrupt):
        sensitivities(grid, Stopped(grid), STAGE, tmp_path / "state.json")
    again = Counting(grid)
    table = sensitivities(grid, again, STAGE, tmp_path / "state.json")
    whole = Counting(grid)
    assert table == sensitivities(grid, whole, STAGE, tmp_path / "other.json")
    assert again.asked < whole.asked


def test_sensitivities_of_another_grid_are_measured_again(tmp_path: Path) -> None:
    small, large = (level_grid(units(2, heads=3, channels=32 * steps), 20, 32) for steps in (10, 20))
    sensitivities(small, Counting(small), STAGE, tmp_path / "state.json")
    with console.capture() as said:
        table = sensitivities(large, Counting(large), STAGE, tmp_path / "state.json")
    assert "state.json is of another model or other levels: its sensitivities are measured again\n" in said.get()
    assert table == sensitivities(large, Counting(large), STAGE, tmp_path / "fresh.json")
    (tmp_path / "state.json").write_text("[[0.0, null], 7]")
    with pytest.raises(DarwinError, match=r"state\.json is damaged .* delete it"):
        sensitivities(large, Counting(large), STAGE, tmp_path / "state.json")


def test_a_unit_without_which_nothing_is_finite_is_kept(tmp_path: Path) -> None:
    grid = level_grid(units(2, heads=3, channels=160), 5, 32)

    class Diverging(Counting):
        def score(self, genome: Genome, parent: Genome | None) -> float:
            return float("inf") if genome.levels[3] > 2 else super().score(genome, parent)

    table = sensitivities(grid, Diverging(grid), STAGE, tmp_path / "state.json")
    costs = parameter_costs(grid, 5000)
    limit = costs.fixed + 0.5 * (costs.of(grid.dense()) - costs.fixed)
    assert least_sensitive(Budget(grid, (Bound(costs, limit),), ceilings(grid)), table).levels[3] <= 2
