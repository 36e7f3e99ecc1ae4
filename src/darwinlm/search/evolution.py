"""Evolutionary search with training-aware selection in stages (Algorithm 1 of the paper)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import inf, isfinite
from pathlib import Path
from random import Random
from typing import Any

from darwinlm.config.run import SearchConfig
from darwinlm.losses.metrics import label
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_json_lines, write_text
from darwinlm.runtime.progress import say, track
from darwinlm.search.budget import Budget, amount_of
from darwinlm.search.fitness import Scorer
from darwinlm.search.mutation import Move, priced, within_kinds
from darwinlm.types import DarwinError, Generation, Genome, SearchResult

MOVES: dict[str, Move] = {"priced": priced, "within_kinds": within_kinds}


DUPLICATE_TRIES = 100


def evolve(
    starts: Mapping[str, Genome], budget: Budget, fitness: Scorer, config: SearchConfig, seed: int, history_path: Path
) -> SearchResult:
    """Find a genome within the budget that is close to the dense model.

    The first parent is the best of `starts`, by name. Each generation draws offspring of the parent; stages train and
    score them and keep the best; the parent joins the last stage with the fitness that it was chosen by, so the best is
    never lost. A generation's randomness comes from the seed and its number alone. So the history, rewritten after each
    generation, is all that a search needs to go on from it, on any number of processes with as many threads each, as if
    it had never stopped. (Sums depend on the number of threads in their last bits.)

    Raises:
        DarwinError: if every start diverges.
    """
    history = _read(history_path)
    if not history:
        history.append(_begin(starts, fitness, config))
        _write(history_path, history)
    numbers, scarce = range(len(history), config.generations + 1), False

    def best() -> str:
        return f"{label(config.metric)} {history[-1].fitness:.4f}"

    for number in track(numbers, "search", config.generations, len(history) - 1, best):
        rng = Random(f"{seed} {number}")
        offspring = _offspring(history[-1].genome, budget, config, rng)
        if not offspring:
            say(
                f"search: it ends after {number - 1} generations, no genome within {amount_of(budget.limit)} "
                f"{budget.costs.measure} is a mutation away; raise --database.levels for more"
            )
            break
        if len(offspring) < config.offspring and not scarce:
            scarce = True
            say(
                f"search: generation {number} has {len(offspring)} distinct mutants, not {config.offspring}: no more "
                f"were found within {amount_of(budget.limit)} {budget.costs.measure}"
            )
        history.append(_generation(number, history[-1], offspring, fitness, config))
        _write(history_path, history)
    return SearchResult(history[-1].genome, history[-1].fitness, tuple(history))


def _begin(starts: Mapping[str, Genome], fitness: Scorer, config: SearchConfig) -> Generation:
    """The best of the starts, scored as the last stage scores."""
    began, last = time.monotonic(), config.stages[-1]
    names: dict[Genome, str] = {}
    for name, genome in starts.items():
        names.setdefault(genome, name)
    scores = dict(zip(names, fitness.scores(list(names), last), strict=True))
    best = min(scores, key=scores.__getitem__)
    if scores[best] == inf:
        raise DarwinError(
            "every start of the search diverges: expected a finite fitness, found NaN or infinity; "
            "lower --search.learning-rate, or take --dtype float32 and another --out"
        )
    tokens = (len(scores) * last.fitness_tokens, len(scores) * last.training_tokens)
    seconds = time.monotonic() - began
    return Generation(0, scores[best], best, len(scores), seconds, names[best], (scores[best],), *tokens)


def _offspring(parent: Genome, budget: Budget, config: SearchConfig, rng: Random) -> list[Genome]:
    """Distinct mutants of the parent; fewer than asked for, or none, where the grid has no more."""
    mutants: dict[Genome, None] = {}
    for _ in range(config.offspring + DUPLICATE_TRIES):
        mutant = MOVES[config.moves](parent, budget, rng, config.max_switches)
        if mutant is None:
            break
        mutants[mutant] = None
        if len(mutants) == config.offspring:
            break
    return list(mutants)


def _generation(
    number: int, before: Generation, offspring: Sequence[Genome], fitness: Scorer, config: SearchConfig
) -> Generation:
    """The best of offspring and parent after all stages. What diverges leaves at once."""
    began = time.monotonic()
    candidates, trained, scored, diverged = list(offspring), 0, 0, 0
    by_stage: list[float] = []
    scores: list[float] = []
    fitness_tokens = training_tokens = 0
    for stage in config.stages:
        scores = fitness.scores(candidates, stage, before.genome) if candidates else []
        # Untrained candidates keep what they were scored on, trained ones what they were trained on.
        fitness_tokens += len(candidates) * max(0, stage.fitness_tokens - (0 if stage.training_tokens else scored))
        training_tokens += len(candidates) * (stage.training_tokens - trained)
        trained, scored = stage.training_tokens, stage.fitness_tokens
        diverged += scores.count(inf)
        if stage is config.stages[-1]:  # the parent first, so that it wins a tie
            candidates, scores = [before.genome, *candidates], [before.fitness, *scores]
        finite = [index for index, score in enumerate(scores) if score < inf]
        ranked = sorted(finite, key=scores.__getitem__)[: stage.survivors]
        candidates, scores = [candidates[i] for i in ranked], [scores[i] for i in ranked]
        by_stage.append(scores[0] if scores else inf)
    if diverged:
        say(f"generation {number}: {diverged} of {len(offspring)} candidates diverged and are out")
    origin = "parent" if candidates[0] == before.genome else f"{config.moves} mutation"
    seconds = time.monotonic() - began
    spent = (fitness_tokens, training_tokens)
    return Generation(number, scores[0], candidates[0], len(offspring), seconds, origin, tuple(by_stage), *spent)


def _write(path: Path, history: Sequence[Generation]) -> None:
    """One line of JSON a generation, the genome's levels among them."""
    if parallel.first():
        write_text(path, "".join(json.dumps(_line(generation), allow_nan=False) + "\n" for generation in history))


def _line(generation: Generation) -> dict[str, Any]:
    """As JSON has it, where what diverged is null."""
    by_stage = [score if isfinite(score) else None for score in generation.stage_fitness]
    return asdict(generation) | {"genome": generation.genome.levels, "stage_fitness": by_stage}


def _read(path: Path) -> list[Generation]:
    lines = read_json_lines(path, *(field.name for field in fields(Generation))) if path.exists() else []
    parallel.wait_for_all()  # all have read it before the first process writes
    history = []
    for line in lines:
        by_stage = tuple(inf if score is None else score for score in line["stage_fitness"])
        history.append(Generation(**line | {"genome": Genome(tuple(line["genome"])), "stage_fitness": by_stage}))
    return history
