"""Evolutionary search with training-aware selection in stages (Algorithm 1 of the paper)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from darwinlm.artifact import read_json, write_json
from darwinlm.config import SearchConfig
from darwinlm.fitness import Scorer
from darwinlm.genome import Budget, mutate
from darwinlm.progress import say, track
from darwinlm.types import Generation, Genome, SearchResult

DUPLICATE_TRIES = 100


def evolve(
    starts: Sequence[Genome], budget: Budget, fitness: Scorer, config: SearchConfig, seed: int, state: Path
) -> SearchResult:
    """Find a genome within the budget that diverges little from the dense model.

    The first parent is the best of `starts`. Each generation draws offspring of the parent by level-switch mutation;
    stages train and score them and keep the best; the parent joins the last stage, so the best is never lost. The file
    `state` is rewritten after each generation; if it exists the search goes on from it and takes the same path as one
    that was never stopped.

    Raises:
        UsageError: if the level grid is too coarse for any mutation within the budget.
    """
    rng = Random(seed)
    history: list[Generation] = []
    if state.exists():
        history = _restore(read_json(state, "rng_state", "history"), rng)
    else:
        scores = {start: fitness.score(start, config.stages[-1]) for start in starts}
        best = min(scores, key=scores.__getitem__)
        history.append(Generation(0, scores[best], best, len(scores), seconds=0.0))
    for number in track(range(len(history), config.generations + 1), "search", config.generations, len(history) - 1):
        began = time.monotonic()
        parent = history[-1].genome
        offspring = _offspring(parent, budget, config, rng)
        best, score = _select(parent, offspring, fitness, config)
        history.append(Generation(number, score, best, len(offspring), time.monotonic() - began))
        write_json(state, _saved(history, rng))
        say(f"generation {number}: KL {score:.4f}, {len(offspring)} offspring, {history[-1].seconds:.0f} s")
    return SearchResult(history[-1].genome, history[-1].fitness, tuple(history))


def _offspring(parent: Genome, budget: Budget, config: SearchConfig, rng: Random) -> list[Genome]:
    """Distinct mutants of the parent; fewer than asked for where the grid has no more."""
    mutants: dict[Genome, None] = {}
    for _ in range(config.offspring + DUPLICATE_TRIES):
        mutants[mutate(parent, budget, rng, config.max_switches)] = None
        if len(mutants) == config.offspring:
            break
    return list(mutants)


def _select(parent: Genome, offspring: list[Genome], fitness: Scorer, config: SearchConfig) -> tuple[Genome, float]:
    """The best of offspring and parent after all stages, and its fitness at the last."""
    candidates, scores = offspring, [float("inf")]
    for stage in config.stages:
        last = stage is config.stages[-1]
        if last:
            candidates = [parent, *candidates]  # first, so that it wins a tie
        scores = [fitness.score(candidate, stage, parent) for candidate in candidates]
        ranked = sorted(range(len(candidates)), key=scores.__getitem__)[: stage.survivors]
        candidates, scores = [candidates[i] for i in ranked], [scores[i] for i in ranked]
    return candidates[0], scores[0]


def _saved(history: list[Generation], rng: Random) -> dict[str, Any]:
    lines = [
        {
            "generation": g.generation,
            "fitness": g.fitness,
            "levels": g.genome.levels,
            "scored": g.scored,
            "seconds": g.seconds,
        }
        for g in history
    ]
    return {"rng_state": rng.getstate(), "history": lines}


def _restore(saved: dict[str, Any], rng: Random) -> list[Generation]:
    version, words, gauss = saved["rng_state"]
    rng.setstate((version, tuple(words), gauss))
    return [
        Generation(g["generation"], g["fitness"], Genome(tuple(g["levels"])), g["scored"], g["seconds"])
        for g in saved["history"]
    ]
