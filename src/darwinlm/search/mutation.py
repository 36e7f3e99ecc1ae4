"""Mutations of genomes within a budget: level-switch mutation (section 3.2 of the paper) and trades by cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from darwinlm.search.budget import Budget
from darwinlm.types import Genome

TRIES = 1000
TINY = 1e-12  # of a sum of sensitivities, which rounding may change


Choice = Callable[[Genome, Sequence[tuple[int, int]]], tuple[int, int]]
"""Chooses which unit of a genome goes to which level, among pairs of both."""


Move = Callable[[Genome, Budget, Random, int], Genome | None]
"""Maps a genome, its budget, a generator and the most steps to a mutant, or to None if there is none."""


def within_kinds(genome: Genome, budget: Budget, rng: Random, max_switches: int) -> Genome | None:
    """Mutate a genome by level switches: within a kind, one unit goes a level up and another a level down.

    There are `min(U{1..max}, U{1..max})` switches (Algorithm 1), so that small steps are the most frequent. A switch
    keeps the sum of levels within the kind. Mutants outside the budget, or equal to the parent, are drawn again.

    Returns:
        The mutant, or None if none was found because the level grid is too coarse for the budget.
    """
    for _ in range(TRIES):
        mutant = genome
        for _ in range(_count(rng, max_switches)):
            mutant = _switch(mutant, budget, rng)
        if mutant != genome and budget.admits(mutant):
            return mutant
    return None


def priced(genome: Genome, budget: Budget, rng: Random, max_switches: int) -> Genome | None:
    """Mutate a genome by moves that trade cost between units of any kind.

    A random unit is given a level back, `min(U{1..max}, U{1..max})` times. Other units then lose levels at random until
    the model fits again, and the room that remains goes to units that have lost nothing in this mutation.

    Returns:
        The mutant, or None if none was found.
    """
    indices = range(len(genome.levels))
    for _ in range(TRIES):
        mutant = genome
        for _ in range(_count(rng, max_switches)):
            mutant = _restore(mutant, budget, indices, _at_random(rng), fitting=False) or mutant
        grown = {i for i in indices if mutant.levels[i] != genome.levels[i]}
        mutant = _prune_until_it_fits(mutant, budget, [i for i in indices if i not in grown], _at_random(rng))
        if mutant is None:
            continue
        mutant = restore(mutant, budget, rng, [i for i in indices if mutant.levels[i] <= genome.levels[i]])
        if mutant != genome and budget.admits(mutant):
            return mutant
    return None


def spread(genome: Genome, budget: Budget, rng: Random) -> Genome:
    """Return a start genome for a smaller model, made from an earlier result, as gradual pruning needs (section 4.1).

    Random units lose further levels until the model fits; then levels are given back at random while it still does.

    Raises:
        AssertionError: if no genome fits the budget; `limit_of` refuses such budgets.
    """
    everywhere = range(len(genome.levels))
    smaller = _prune_until_it_fits(budget.worth(_capped(genome, budget)), budget, everywhere, _at_random(rng))
    assert smaller is not None
    return restore(smaller, budget, rng)


def adapt(genome: Genome, budget: Budget, sensitivities: Sequence[Sequence[float]]) -> Genome:
    """Return a genome of another size, made from an earlier result by the steps that cost least for what they save.

    Units lose levels where their sensitivity rises least for the cost that it saves, until the model fits. Then they
    get levels back where it falls most for the cost, while the model still fits. As steps can be as large as what is
    saved, each unit is then tried a step away, with the others filling up in the same way, while sensitivities fall.

    Args:
        sensitivities: of each unit at each level.

    Raises:
        AssertionError: if no genome fits the budget; `limit_of` refuses such budgets.
    """
    everywhere, costs = range(len(genome.levels)), budget.main.costs.units

    def rate(now: Genome, step: tuple[int, int]) -> float:
        """The rise of the sensitivity for what a step saves; for a step back, the fall for what it costs."""
        index, level = step
        before = now.levels[index]
        saved = costs[index][before] - costs[index][level]
        return (sensitivities[index][level] - sensitivities[index][before]) / saved if saved else 0.0

    def gentlest(now: Genome, steps: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return min(steps, key=lambda step: rate(now, step))

    def dearest(now: Genome, steps: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return max(steps, key=lambda step: rate(now, step))

    def fitted(start: Genome, indices: Sequence[int]) -> Genome | None:
        found = _prune_until_it_fits(start, budget, indices, gentlest)
        if found is None:
            return None
        for those in (indices, everywhere):
            while (larger := _restore(found, budget, those, dearest, fitting=True)) is not None:
                found = larger
        return found

    def total(now: Genome) -> float:
        return sum(row[level] for row, level in zip(sensitivities, now.levels, strict=True))

    adapted = fitted(budget.worth(_capped(genome, budget)), everywhere)
    assert adapted is not None
    better: Genome | None = adapted
    while better is not None:
        adapted, others = better, []
        for index in everywhere:
            rest = [other for other in everywhere if other != index]
            away = (budget.cheaper(adapted, index), budget.dearer(adapted, index))
            others += [fitted(adapted.replace({index: level}), rest) for level in away if level is not None]
        best = min((each for each in others if each is not None), key=total, default=adapted)
        better = best if total(best) < total(adapted) - TINY else None
    return adapted


def spread_within_kinds(genome: Genome, sums: Genome, budget: Budget, rng: Random) -> Genome:
    """Return a start genome for a smaller model as in the paper: each kind's residual levels go to random units of it.

    Args:
        sums: a genome of the smaller model's size, whose sums of levels of each kind the result has.
    """
    levels = list(_capped(genome, budget).levels)
    for members in budget.grid.kinds().values():
        residual = sum(sums.levels[i] - levels[i] for i in members)
        step = 1 if residual > 0 else -1
        for _ in range(abs(residual)):
            open_to_it = [i for i in members if 0 <= levels[i] + step <= budget.ceilings[i]]
            levels[rng.choice(open_to_it)] += step
    return Genome(tuple(levels))


def restore(genome: Genome, budget: Budget, rng: Random, indices: Sequence[int] | None = None) -> Genome:
    """Give single levels back to random units while the model fits; if `indices` is given, only to those units."""
    indices = range(len(genome.levels)) if indices is None else indices
    while (larger := _restore(genome, budget, indices, _at_random(rng), fitting=True)) is not None:
        genome = larger
    return genome


def _at_random(rng: Random) -> Choice:
    return lambda _, steps: rng.choice(steps)


def _capped(genome: Genome, budget: Budget) -> Genome:
    """Return the genome with no level above its ceiling."""
    return Genome(tuple(min(level, top) for level, top in zip(genome.levels, budget.ceilings, strict=True)))


def _count(rng: Random, most: int) -> int:
    return min(rng.randint(1, most), rng.randint(1, most))


def _switch(genome: Genome, budget: Budget, rng: Random) -> Genome:
    """Move one random unit a level up and another of its kind a level down, where the grid allows it."""
    members = rng.choice([*budget.grid.kinds().values()])
    lowerable = [i for i in members if genome.levels[i] > 0]
    if not lowerable:
        return genome
    down = rng.choice(lowerable)
    raisable = [i for i in members if i != down and genome.levels[i] < budget.ceilings[i]]
    if not raisable:
        return genome
    up = rng.choice(raisable)
    return genome.replace({up: genome.levels[up] + 1, down: genome.levels[down] - 1})


def _restore(genome: Genome, budget: Budget, indices: Sequence[int], choose: Choice, fitting: bool) -> Genome | None:
    """Move one unit of `indices` a level down, within the limits if `fitting`; None if no unit allows it."""
    options = [(i, level) for i in indices if (level := budget.dearer(genome, i)) is not None]
    for bound in budget.bounds if fitting else ():
        costs, room = bound.costs.units, bound.limit - bound.costs.of(genome)
        options = [(i, level) for i, level in options if costs[i][level] - costs[i][genome.levels[i]] <= room]
    return genome.replace(dict([choose(genome, options)])) if options else None


def _prune_until_it_fits(genome: Genome, budget: Budget, indices: Sequence[int], choose: Choice) -> Genome | None:
    """Remove levels from units of `indices` until the model fits; return None if it never does."""
    while exceeded := budget.exceeded(genome):
        costs = exceeded[0].costs.units
        options = [(i, level) for i in indices if (level := budget.cheaper(genome, i, costs[i])) is not None]
        if not options:
            return None
        genome = genome.replace(dict([choose(genome, options)]))
    return genome
