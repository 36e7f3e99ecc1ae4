"""Moves between genomes within a budget: level-switch mutation (section 3.2 of the paper), priced moves, spreading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from darwinlm.search.budget import Budget
from darwinlm.types import KINDS, Genome

TRIES = 1000


Move = Callable[[Genome, Budget, Random, int], Genome | None]


def within_kinds(genome: Genome, budget: Budget, rng: Random, max_switches: int) -> Genome | None:
    """Level-switch mutation: within a kind, one unit a level up and another a level down.

    `min(U{1..max}, U{1..max})` switches (Algorithm 1), so that small steps are the most frequent. A switch keeps the
    sum of levels within the kind; mutants outside the budget, or equal to the parent, are drawn again.

    Returns:
        The mutant, or None if none was found: the level grid is too coarse for the budget.
    """
    for _ in range(TRIES):
        mutant = genome
        for _ in range(_count(rng, max_switches)):
            mutant = _switch(mutant, budget, rng)
        if mutant != genome and budget.admits(mutant):
            return mutant
    return None


def priced(genome: Genome, budget: Budget, rng: Random, max_switches: int) -> Genome | None:
    """A mutation that trades by cost, between kinds too.

    `min(U{1..max}, U{1..max})` times a random unit is given a level back; others lose levels at random until the model
    fits again; what room is left then goes to units that lost nothing.

    Returns:
        The mutant, or None if none was found.
    """
    indices = range(len(genome.levels))
    for _ in range(TRIES):
        mutant = genome
        for _ in range(_count(rng, max_switches)):
            mutant = _restore(mutant, budget, indices, rng, fitting=False) or mutant
        grown = {i for i in indices if mutant.levels[i] != genome.levels[i]}
        mutant = _prune_until_it_fits(mutant, budget, [i for i in indices if i not in grown], rng)
        if mutant is None:
            continue
        mutant = restore(mutant, budget, rng, [i for i in indices if mutant.levels[i] <= genome.levels[i]])
        if mutant != genome and budget.admits(mutant):
            return mutant
    return None


def spread(genome: Genome, budget: Budget, rng: Random) -> Genome:
    """A start for a smaller model from an earlier result: it loses further levels at random units until it fits.

    Gradual pruning (section 4.1 of the paper). What room is left is given back at random.

    Raises:
        AssertionError: if nothing fits the budget, which `limit_of` refuses.
    """
    capped = Genome(tuple(min(level, top) for level, top in zip(genome.levels, budget.ceilings, strict=True)))
    smaller = _prune_until_it_fits(budget.worth(capped), budget, range(len(genome.levels)), rng)
    assert smaller is not None
    return restore(smaller, budget, rng)


def restore(genome: Genome, budget: Budget, rng: Random, indices: Sequence[int] | None = None) -> Genome:
    """Give single levels back to random units, of `indices` or of all, while the model fits."""
    indices = range(len(genome.levels)) if indices is None else indices
    while (larger := _restore(genome, budget, indices, rng, fitting=True)) is not None:
        genome = larger
    return genome


def _count(rng: Random, most: int) -> int:
    return min(rng.randint(1, most), rng.randint(1, most))


def _switch(genome: Genome, budget: Budget, rng: Random) -> Genome:
    """One unit a level up and another of its kind a level down, where the grid allows it."""
    kind = rng.choice(KINDS)
    members = [i for i, unit in enumerate(budget.grid.units) if unit.kind == kind]
    lowerable = [i for i in members if genome.levels[i] > 0]
    if not lowerable:
        return genome
    down = rng.choice(lowerable)
    raisable = [i for i in members if i != down and genome.levels[i] < budget.ceilings[i]]
    if not raisable:
        return genome
    up = rng.choice(raisable)
    return genome.replace({up: genome.levels[up] + 1, down: genome.levels[down] - 1})


def _restore(genome: Genome, budget: Budget, indices: Sequence[int], rng: Random, fitting: bool) -> Genome | None:
    """A random unit of `indices` a level down, or None if no unit can take it; `fitting`: within the limit."""
    room = budget.limit - budget.cost(genome)
    options = []
    for i in indices:
        level, costs = budget.dearer(genome, i), budget.costs.units[i]
        if level is not None and (not fitting or costs[level] - costs[genome.levels[i]] <= room):
            options.append((i, level))
    return genome.replace(dict([rng.choice(options)])) if options else None


def _prune_until_it_fits(genome: Genome, budget: Budget, indices: Sequence[int], rng: Random) -> Genome | None:
    """Random units of `indices` lose levels until the model fits; None if it never does."""
    while budget.cost(genome) > budget.limit:
        options = [(i, level) for i in indices if (level := budget.cheaper(genome, i)) is not None]
        if not options:
            return None
        genome = genome.replace(dict([rng.choice(options)]))
    return genome
