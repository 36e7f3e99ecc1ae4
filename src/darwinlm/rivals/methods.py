"""All allocators by name."""

from __future__ import annotations

from dataclasses import replace

from darwinlm.config.run import SearchConfig
from darwinlm.rivals.cosine import cosine
from darwinlm.rivals.evopress import evopress
from darwinlm.rivals.problem import Allocator, Problem
from darwinlm.rivals.sheared_llama import sheared_llama
from darwinlm.rivals.shortened_llama import shortened_llama, shortened_llama_taylor
from darwinlm.rivals.shortgpt import shortgpt
from darwinlm.rivals.ziplm import ziplm
from darwinlm.search.evolution import evolve
from darwinlm.search.sensitivity import find_starts
from darwinlm.types import Genome


def evolution(problem: Problem) -> Genome:
    """The search of this package on untrained candidates."""
    untrained = tuple(replace(stage, training_tokens=0) for stage in problem.config.stages)
    return _evolution(problem, replace(problem.config, stages=untrained))


def training_aware(problem: Problem) -> Genome:
    """The search of this package with training before selection (section 3.2 of the paper)."""
    return _evolution(problem, problem.config)


def _evolution(problem: Problem, config: SearchConfig) -> Genome:
    budget, state = problem.budget, problem.state
    starts = find_starts(problem.even, budget, problem.fitness, config, problem.seed, state)
    return evolve(starts, budget, problem.fitness, config, problem.seed, state / "history.jsonl").best


ALLOCATORS: dict[str, Allocator] = {
    "uniform": lambda problem: problem.even,
    "shortgpt": shortgpt,
    "cosine": cosine,
    "shortened-llama": shortened_llama,
    "shortened-llama-taylor": shortened_llama_taylor,
    "evopress": evopress,
    "ziplm": ziplm,
    "sheared-llama": sheared_llama,
    "evolution": evolution,
    "training-aware": training_aware,
}


OURS = ("evolution", "training-aware")
