"""ZipLM's allocation (Kurtic et al., 2023, arXiv 2302.04089): layer errors, dynamic programming, random re-weighting.

SPDY (Frantar and Alistarh, 2022, arXiv 2201.13096) minimises a weighted sum of layer errors within a budget, and
searches for the weights that give the stitched model of least loss. In ZipLM, the error of a unit is its squared error
relative to that of removing it, and a step of the search draws new weights for a tenth of the units.
"""

from __future__ import annotations

from random import Random

from darwinlm.database.store import Database
from darwinlm.rivals.problem import Problem
from darwinlm.runtime.progress import track
from darwinlm.search.sensitivity import least_sensitive
from darwinlm.types import Genome, SelectionStage

MUTATED = 0.1  # the share of the weights that a step draws again


def ziplm(problem: Problem) -> Genome:
    """Return the best genome found among those that minimise a weighted sum of layer errors.

    All weights begin at 1, and a step that makes the stitched model worse is undone. There are as many steps (1,000 in
    the paper) as can be scored on the tokens that the search of this package scores on.
    """
    config, rng = problem.config, Random(problem.seed)
    errors = relative_errors(problem.stitcher.database)
    stage = SelectionStage(1, config.stages[-1].fitness_tokens)
    weights = [1.0] * len(errors)
    best = _allocate(problem, errors, weights)
    (least,) = problem.fitness.scores([best], stage)
    steps = problem.scored_tokens // config.stages[-1].fitness_tokens
    for _ in track(range(steps), "ziplm", steps):
        redrawn = rng.sample(range(len(weights)), max(1, round(MUTATED * len(weights))))
        redrawn_weights = [rng.random() if index in redrawn else weight for index, weight in enumerate(weights)]
        genome = _allocate(problem, errors, redrawn_weights)
        (score,) = problem.fitness.scores([genome], stage, best)
        if score <= least:
            weights, best, least = redrawn_weights, genome, score
    return best


def relative_errors(database: Database) -> list[list[float]]:
    """Return `|W'X - WX|^2 / |WX|^2` of each unit at each level: 0 where it is dense, 1 where it is removed."""
    tables = [database.errors(index) for index in range(len(database.grid.units))]
    return [[error / (errors[-1] or 1.0) for error in errors] for errors in tables]


def _allocate(problem: Problem, errors: list[list[float]], weights: list[float]) -> Genome:
    weighted = [[weight * error for error in row] for weight, row in zip(weights, errors, strict=True)]
    return least_sensitive(problem.budget, weighted)
