"""The allocators of this package, as `darwinlm compare` runs them beside those of other papers."""

from __future__ import annotations

from dataclasses import replace

from darwinlm.config.run import SearchConfig
from darwinlm.rivals.problem import Problem
from darwinlm.search.evolution import evolve
from darwinlm.search.sensitivity import find_starts
from darwinlm.types import Genome


def uniform(problem: Problem) -> Genome:
    """Return the uniform genome, in which every unit has lost the same share."""
    return problem.uniform


def evolution(problem: Problem) -> Genome:
    """Search with candidates that are not trained."""
    untrained = tuple(replace(stage, training_tokens=0) for stage in problem.config.stages)
    return _search(problem, replace(problem.config, stages=untrained))


def training_aware(problem: Problem) -> Genome:
    """Search with candidates that are trained before selection (section 3.2 of the paper)."""
    return _search(problem, problem.config)


def _search(problem: Problem, config: SearchConfig) -> Genome:
    budget, state = problem.budget, problem.state
    starts = find_starts(problem.uniform, budget, problem.fitness, config, problem.seed, state)
    return evolve(starts, budget, problem.fitness, config, problem.seed, state / "history.jsonl", problem.length).best
