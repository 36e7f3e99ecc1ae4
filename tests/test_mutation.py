"""Mutations of genomes keep what they should, whatever genome they begin from."""

from __future__ import annotations

from random import Random
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from darwinlm.genome import level_grid
from darwinlm.search.budget import Bound, Budget
from darwinlm.search.costs import parameter_costs
from darwinlm.search.mutation import Move, adapt, priced, restore, spread, spread_within_kinds, within_kinds
from darwinlm.search.uniform import ceilings, later_start, uniform_genome
from darwinlm.types import Genome, MovesName
from test_genome import shapes, units

MOVES = {"priced": priced, "within_kinds": within_kinds}


def budget_of(genome: Genome, shape: tuple[int, int, int], below: float = 0.01, keep_attention: bool = False) -> Budget:
    """Return the budget that a genome fills."""
    grid = level_grid(units(*shape), 10, 32)
    costs = parameter_costs(grid, 10**5)
    limit = float(costs.of(genome))
    return Budget(grid, (Bound(costs, limit, (1 - below) * limit),), ceilings(grid, keep_attention))


def uniform_at(share: float, shape: tuple[int, int, int], rng: Random, keep_attention: bool = False) -> Genome:
    return uniform_genome(level_grid(units(*shape), 10, 32), share * 10, 10, rng, keep_attention)


of_two_sizes = given(shapes, st.floats(0.1, 0.5), st.floats(0.5, 0.9), st.integers(0, 1000))
"""The grid, the share that is removed before and after, and a seed."""


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0.15, 0.85), st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_a_mutant_keeps_limit_floor_and_ceilings(
    move: Move, shape: tuple[int, int, int], share: float, seed: int, switches: int, keep_attention: bool
) -> None:
    rng = Random(seed)
    parent = uniform_at(share, shape, rng, keep_attention)
    budget = budget_of(parent, shape, keep_attention=keep_attention)
    mutant = move(parent, budget, rng, switches)
    if mutant is None:
        return  # a grid of one step a unit may hold no mutant at all
    budget.grid.check(mutant)
    assert mutant != parent
    assert budget.main.floor <= budget.cost(mutant) <= budget.main.limit
    assert all(level <= top for level, top in zip(mutant.levels, budget.ceilings, strict=True))
    assert mutant.levels[0] < budget.grid.highest(0)
    if keep_attention:
        attentions = range(0, len(mutant.levels), 2)
        assert all(mutant.levels[i] < budget.grid.highest(i) for i in attentions)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0.15, 0.85), st.integers(0, 1000), st.integers(1, 4))
def test_level_switches_keep_each_kinds_level_sum(
    shape: tuple[int, int, int], share: float, seed: int, switches: int
) -> None:
    rng = Random(seed)
    parent = uniform_at(share, shape, rng)
    mutant = within_kinds(parent, budget_of(parent, shape), rng, switches)
    if mutant is None:
        return
    changes = [abs(a - b) for a, b in zip(parent.levels, mutant.levels, strict=True)]
    assert 2 <= sum(changes) <= 2 * switches
    for kind in (0, 1):
        assert sum(parent.levels[kind::2]) == sum(mutant.levels[kind::2])


@settings(max_examples=40, deadline=None)
@of_two_sizes
@example((2, 5, 480), 0.125, 0.75, 14)  # where a step of an attention is larger than what is to be saved
def test_a_genome_is_adapted_to_another_size_by_the_gentlest_steps(
    shape: tuple[int, int, int], before: float, after: float, seed: int
) -> None:
    """Its sensitivities are convex: then no single exchange of levels between two units can do better."""
    rng = Random(seed)
    earlier, smaller = uniform_at(before, shape, rng), uniform_at(after, shape, rng)
    weights = [rng.uniform(0.5, 2.0) for _ in earlier.levels]
    for start, end in ((earlier, smaller), (smaller, earlier)):
        budget = budget_of(end, shape)
        costs = budget.main.costs.units
        table = [
            [weight * (1 - cost / of_unit[0]) ** 2 for cost in of_unit]
            for weight, of_unit in zip(weights, costs, strict=True)
        ]
        found = adapt(start, budget, table)
        assert budget.fits(found)
        given_back = (budget.dearer(found, index) for index in range(len(found.levels)))
        larger = [found.replace({i: level}) for i, level in enumerate(given_back) if level is not None]
        assert not any(budget.fits(genome) for genome in larger), "there is no room left"
        reference = spread(start, budget, Random(seed))
        assert rise(table, found) <= 1.1 * rise(table, reference) + 1e-9


def rise(table: list[list[float]], genome: Genome) -> float:
    return sum(row[level] for row, level in zip(table, genome.levels, strict=True))


def test_small_mutations_are_the_most_frequent() -> None:
    shape, rng = (12, 8, 320), Random(0)
    parent = uniform_at(0.4, shape, rng)
    budget = budget_of(parent, shape, below=1.0)
    changed = []
    for _ in range(2000):
        mutant = within_kinds(parent, budget, rng, 3)
        assert mutant is not None
        changed.append(sum(abs(a - b) for a, b in zip(parent.levels, mutant.levels, strict=True)) // 2)
    # min(U{1..3}, U{1..3}) is 1, 2, 3 with 5/9, 3/9, 1/9; a switch that undoes another adds a few to the small ones.
    assert changed.count(1) / 2000 == pytest.approx(5 / 9, abs=0.06)
    assert changed.count(3) / 2000 == pytest.approx(1 / 9, abs=0.04)


def test_priced_moves_trade_between_kinds_and_level_switches_do_not() -> None:
    shape, rng = (6, 8, 640), Random(0)
    parent = uniform_at(0.5, shape, rng)
    budget = budget_of(parent, shape)

    def kinds_trade(move: Move) -> bool:
        mutants = [move(parent, budget, rng, 3) for _ in range(50)]
        sums = {sum(mutant.levels[::2]) for mutant in mutants if mutant}
        return sums != {sum(parent.levels[::2])}

    assert kinds_trade(priced)
    assert not kinds_trade(within_kinds)


def test_every_neighbour_is_reached_by_priced_moves() -> None:
    """Moves can be reversed: a unit that has grown can shrink again."""
    shape, rng = (2, 4, 128), Random(0)
    start = uniform_at(0.5, shape, rng)
    budget = budget_of(start, shape, below=0.5)
    seen, parent = {start}, start
    for _ in range(2000):
        parent = priced(parent, budget, rng, 3) or start
        seen.add(parent)
    assert start in {priced(genome, budget, rng, 3) for genome in seen for _ in range(20)}
    highest = {i: max(genome.levels[i] for genome in seen) for i in range(4)}
    assert all(highest[i] == budget.ceilings[i] for i in range(4))


def test_where_no_mutant_exists_there_is_none() -> None:
    shape = (2, 1, 32)
    dense = level_grid(units(*shape), 10, 32).dense()
    for move in MOVES.values():
        assert move(dense, budget_of(dense, shape), Random(0), 3) is None


@settings(max_examples=40, deadline=None)
@of_two_sizes
def test_spreading_only_removes_until_the_model_fits(
    shape: tuple[int, int, int], before: float, after: float, seed: int
) -> None:
    rng = Random(seed)
    earlier, later = uniform_at(before, shape, rng), uniform_at(after, shape, rng)
    budget = budget_of(later, shape)
    smaller = spread(earlier, budget, rng)
    assert budget.fits(smaller)
    # What is left over does not suffice to give any unit a level back.
    for index in range(len(smaller.levels)):
        level = budget.dearer(smaller, index)
        assert level is None or not budget.fits(smaller.replace({index: level}))


def test_spreading_keeps_the_earlier_result_and_is_random() -> None:
    shape = (12, 8, 640)
    earlier, later = uniform_at(0.5, shape, Random(0)), uniform_at(0.6, shape, Random(0))
    levels = [*earlier.levels[2:], *earlier.levels[:2]]
    levels[1], levels[3] = 9, 0  # not uniform any more
    earlier = Genome(tuple(levels))
    budget = budget_of(later, shape)
    starts = [spread(earlier, budget, Random(seed)) for seed in range(5)]
    assert len(set(starts)) == 5
    for genome in starts:
        given_back = sum(max(0, a - b) for a, b in zip(earlier.levels, genome.levels, strict=True))
        assert given_back <= 1  # the last gap
        assert budget.cost(genome) >= 0.97 * budget.main.limit


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0.1, 0.9), st.integers(0, 1000))
def test_what_fits_is_given_back(shape: tuple[int, int, int], share: float, seed: int) -> None:
    rng = Random(seed)
    genome = uniform_at(share, shape, rng)
    budget = budget_of(genome, shape)
    smaller = budget.least
    restored = restore(smaller, budget, rng)
    assert budget.fits(restored)
    assert all(a >= b for a, b in zip(smaller.levels, restored.levels, strict=True))


@settings(max_examples=40, deadline=None)
@of_two_sizes
def test_residual_levels_stay_within_their_kind(
    shape: tuple[int, int, int], before: float, after: float, seed: int
) -> None:
    """As in the paper: each kind has the sum of levels of the smaller model, from whatever an earlier search found."""
    rng = Random(seed)
    earlier, later = uniform_at(before, shape, rng), uniform_at(after, shape, rng)
    found = within_kinds(earlier, budget_of(earlier, shape), rng, 3) or earlier
    budget = budget_of(later, shape)
    smaller = spread_within_kinds(found, later, budget, rng)
    for kind in ("attention", "mlp"):
        members = [i for i, unit in enumerate(budget.grid.units) if unit.kind == kind]
        assert sum(smaller.levels[i] for i in members) == sum(later.levels[i] for i in members)
    assert all(0 <= level <= top for level, top in zip(smaller.levels, budget.ceilings, strict=True))


def test_a_later_stage_within_kinds_starts_with_the_sums_of_its_level() -> None:
    shape = (12, 8, 640)
    earlier, later = uniform_at(0.5, shape, Random(0)), uniform_at(0.6, shape, Random(0))
    budget = budget_of(later, shape)
    starts = {moves: later_start(earlier, later, budget, moves, 0)[0] for moves in get_args(MovesName)}
    members = [i for i, unit in enumerate(budget.grid.units) if unit.kind == "attention"]
    sums = {moves: sum(start.levels[i] for i in members) for moves, start in starts.items()}
    assert sums["within_kinds"] == sum(later.levels[i] for i in members)
    assert budget.fits(starts["within_kinds"])
    assert budget.fits(starts["priced"])
