"""EvoPress (Sieberling et al., 2024, arXiv 2410.14649): evolutionary search over whole attention and MLP modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from darwinlm.genome import Grid
from darwinlm.rivals.depth import too_large
from darwinlm.rivals.problem import Problem
from darwinlm.search.budget import Budget
from darwinlm.search.evolution import evolve
from darwinlm.search.fitness import Scorer
from darwinlm.search.mutation import restore
from darwinlm.types import Genome, SelectionStage


def evopress(problem: Problem) -> Genome:
    """Return the fittest model found among those that lack whole modules.

    A mutation brings one module back and removes another of its kind. The search starts from the best of as many random
    removals as a generation has offspring, and scores on as many tokens as the search of this package.

    Raises:
        UsageError: if no removal of whole modules fits the budget.
    """
    grid, rng = problem.budget.grid, Random(problem.seed)
    budget = _of_modules(problem.budget)
    untrained = tuple(replace(stage, training_tokens=0) for stage in problem.config.stages)
    config = problem.config
    starts = {f"random {n}": _random(budget, rng) for n in range(config.offspring)}
    remaining = problem.scored_tokens - len(starts) * config.stages[-1].fitness_tokens
    generations = max(config.generations, remaining // config.generation_tokens(problem.length))
    config = replace(config, stages=untrained, moves="within_kinds", generations=generations)
    if not all(map(budget.fits, starts.values())):
        raise too_large(problem.budget, _whole(grid, Genome(budget.ceilings)))
    scorer, history = _OfModules(problem.fitness, grid), problem.state / "history.jsonl"
    return _whole(grid, evolve(starts, budget, scorer, config, problem.seed, history, problem.length).best)


def _of_modules(budget: Budget) -> Budget:
    """Return the budget for genomes of two levels, present and removed. Their steps are too large for a floor."""
    grid = Grid(budget.grid.units, tuple((0, unit.structures) for unit in budget.grid.units))
    costs = replace(budget.main.costs, units=tuple((costs[0], costs[-1]) for costs in budget.main.costs.units))
    bound = replace(budget.main, costs=costs, floor=0.0)
    ceilings = tuple(int(top == budget.grid.highest(i)) for i, top in enumerate(budget.ceilings))
    return Budget(grid, (bound,), ceilings)


def _whole(grid: Grid, genome: Genome) -> Genome:
    """Return a genome of modules as a genome of the database's levels."""
    return Genome(tuple(removed * grid.highest(i) for i, removed in enumerate(genome.levels)))


@dataclass(frozen=True)
class _OfModules:
    """Scores genomes of modules with a scorer for genomes of the database's levels."""

    scorer: Scorer
    grid: Grid

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        whole = [_whole(self.grid, genome) for genome in genomes]
        return self.scorer.scores(whole, stage, None if parent is None else _whole(self.grid, parent))


def _random(budget: Budget, rng: Random) -> Genome:
    """Return a genome from which random modules are removed, of all kinds in turn, and as few as the budget allows."""
    members = [[i for i in indices if budget.ceilings[i]] for indices in budget.grid.kinds().values()]
    orders = [rng.sample(indices, len(indices)) for indices in members]
    genome = budget.grid.dense()
    for turn in range(max(map(len, orders))):
        if budget.fits(genome):
            break
        genome = genome.replace({order[turn]: 1 for order in orders if turn < len(order)})
    return restore(genome, budget, rng)
