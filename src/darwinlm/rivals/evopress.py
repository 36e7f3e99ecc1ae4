"""EvoPress for depth (Sieberling et al., 2024, arXiv 2410.14649): evolution over whole attention and MLP modules."""

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
from darwinlm.types import KINDS, Genome, SelectionStage


def evopress(problem: Problem) -> Genome:
    """The fittest model found that lacks whole modules: a step brings one back and removes another of its kind.

    It starts from the best of as many random removals as a generation has offspring, and scores on as many tokens as
    our search does.

    Raises:
        UsageError: if no removal of whole modules fits the budget.
    """
    grid, rng = problem.budget.grid, Random(problem.seed)
    budget = _of_modules(problem.budget)
    untrained = tuple(replace(stage, training_tokens=0) for stage in problem.config.stages)
    config = problem.config
    starts = {f"random {n}": _random(budget, rng) for n in range(config.offspring)}
    left = problem.scored_tokens - len(starts) * config.stages[-1].fitness_tokens
    generations = max(config.generations, left // config.generation_tokens)
    config = replace(config, stages=untrained, moves="within_kinds", generations=generations)
    if not all(map(budget.fits, starts.values())):
        raise too_large(problem.budget, _whole(grid, Genome(budget.ceilings)))
    scorer = _OfModules(problem.fitness, grid)
    return _whole(grid, evolve(starts, budget, scorer, config, problem.seed, problem.state / "history.jsonl").best)


def _of_modules(budget: Budget) -> Budget:
    """The same budget for genomes of two levels: there, and gone. What it must not fall below cannot be met."""
    grid = Grid(budget.grid.units, tuple((0, unit.structures) for unit in budget.grid.units))
    costs = replace(budget.costs, units=tuple((costs[0], costs[-1]) for costs in budget.costs.units))
    ceilings = tuple(int(top == budget.grid.highest(i)) for i, top in enumerate(budget.ceilings))
    return replace(budget, grid=grid, costs=costs, ceilings=ceilings, floor=0.0)


def _whole(grid: Grid, genome: Genome) -> Genome:
    """A genome of modules as one of the database's levels."""
    return Genome(tuple(gone * grid.highest(i) for i, gone in enumerate(genome.levels)))


@dataclass(frozen=True)
class _OfModules:
    """Scores genomes of modules."""

    scorer: Scorer
    grid: Grid

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        whole = [_whole(self.grid, genome) for genome in genomes]
        return self.scorer.scores(whole, stage, None if parent is None else _whole(self.grid, parent))


def _random(budget: Budget, rng: Random) -> Genome:
    """Random modules gone, of both kinds in turn, until the model fits; what room is left is given back."""
    members = [[i for i, u in enumerate(budget.grid.units) if u.kind == kind and budget.ceilings[i]] for kind in KINDS]
    orders = [rng.sample(indices, len(indices)) for indices in members]
    genome = budget.grid.dense()
    for turn in range(max(map(len, orders))):
        if budget.fits(genome):
            break
        genome = genome.replace({order[turn]: 1 for order in orders if turn < len(order)})
    return restore(genome, budget, rng)
