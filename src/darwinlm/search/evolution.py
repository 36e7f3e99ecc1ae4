"""Evolutionary search with training-aware selection in stages (Algorithm 1 of the paper)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from math import inf, isfinite
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from darwinlm.config.run import SearchConfig
from darwinlm.losses.metrics import label
from darwinlm.runtime import parallel
from darwinlm.runtime.files import as_json, read_lines, write_lines
from darwinlm.runtime.progress import figures, say, track
from darwinlm.search.budget import Budget
from darwinlm.search.fitness import Scorer
from darwinlm.search.mutation import Move, priced, within_kinds
from darwinlm.types import DarwinError, Generation, Genome, SearchResult

MOVES: dict[str, Move] = {"priced": priced, "within_kinds": within_kinds}


MayWin = Callable[[Genome, Genome | None], bool]
"""Whether a candidate may take its parent's place, or begin the search if it has no parent."""


DUPLICATE_TRIES = 100  # draws beyond the number of offspring, as mutants may repeat


def evolve(
    starts: Mapping[str, Genome],
    budget: Budget,
    fitness: Scorer,
    config: SearchConfig,
    seed: int,
    history_path: Path,
    length: int = 1,
    may_win: MayWin | None = None,
) -> SearchResult:
    """Search for the genome within the budget whose candidate is closest to the dense model (Algorithm 1).

    The first parent is the best of `starts`, which maps names to genomes. Each generation draws offspring of the
    parent, and selection stages train and score them and keep the best. The parent joins the last stage with the
    fitness by which it was chosen, so that the best genome is never lost.

    The random numbers of a generation depend only on the seed and the generation's number. The history, which is
    rewritten after each generation, is therefore all that an interrupted search needs to continue as if it had never
    stopped. The number of processes may change in between, but not the threads of each: the last bits of sums depend
    on these.

    Args:
        length: tokens in a sequence of the fitness's text, for the history's count of tokens.
        may_win: whether a candidate may take its parent's place, or begin the search if it has no parent.

    Raises:
        DarwinError: if the fitness of every start is NaN or infinite, or the history is damaged or of another search.
    """
    provenance = {"seed": seed, "search": asdict(replace(config, generations=0))}  # more of them may follow
    history = _read(history_path, provenance)
    if not history:
        history.append(_begin(starts, fitness, config, may_win))
        _write(history_path, history, provenance)
    numbers, scarce = range(len(history), config.generations + 1), False

    def state() -> str:
        """The best fitness, the candidates that were scored for it, and how long a generation takes."""
        times = [generation.seconds for generation in history[1:]]
        pace = f", {median(times):.1f} s a generation" if times else ""
        scored = sum(generation.scored for generation in history)
        return f"{label(config.metric)} {history[-1].fitness:.4f} of {scored:,} candidates{pace}"

    for number in track(numbers, "search", config.generations, len(history) - 1, state):
        rng = Random(f"{seed} {number}")
        offspring = _offspring(history[-1].genome, budget, config, rng)
        if not offspring:
            say(
                f"search: it ends after {number - 1} generations, no genome within {budget.text} is a mutation away; "
                "raise --database.levels for more"
            )
            break
        if len(offspring) < config.offspring and not scarce:
            scarce = True
            say(
                f"search: generation {number} has {len(offspring)} distinct mutants, not {config.offspring}: no more "
                f"were found within {budget.text}"
            )
        history.append(_generation(number, history[-1], offspring, fitness, config, length, may_win))
        _write(history_path, history, provenance)
        last = history[-1]
        figures("search", number, {"fitness": last.fitness, "seconds": last.seconds, "candidates": last.scored})
    return SearchResult(history[-1].genome, history[-1].fitness, tuple(history))


def _begin(
    starts: Mapping[str, Genome], fitness: Scorer, config: SearchConfig, may_win: MayWin | None = None
) -> Generation:
    """Return generation 0, whose parent is the best of the starts, scored as in the last stage.

    It is the best of those that may win, or the best if none may.
    """
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
    if may_win is not None:
        ranked = sorted((genome for genome in scores if scores[genome] < inf), key=scores.__getitem__)
        best = next((genome for genome in ranked if may_win(genome, None)), best)
    tokens = (len(scores) * last.fitness_tokens, len(scores) * last.training_tokens)
    seconds = time.monotonic() - began
    finite = {name: scores[genome] for name, genome in starts.items() if isfinite(scores[genome])}
    return Generation(0, scores[best], best, len(scores), seconds, names[best], (scores[best],), *tokens, finite)


def _offspring(parent: Genome, budget: Budget, config: SearchConfig, rng: Random) -> list[Genome]:
    """Return distinct mutants of the parent: fewer than the setting asks for, or none, where the grid has no more."""
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
    number: int,
    before: Generation,
    offspring: Sequence[Genome],
    fitness: Scorer,
    config: SearchConfig,
    length: int,
    may_win: MayWin | None = None,
) -> Generation:
    """Return the generation that the selection stages make of parent and offspring.

    Candidates that diverge leave, and so do those that would win and may not.
    """
    began = time.monotonic()
    candidates, trained, diverged = list(offspring), 0, 0
    by_stage: list[float] = []
    scores: list[float] = []
    fitness_tokens = training_tokens = 0
    for stage, added in zip(config.stages, config.added_tokens(length), strict=True):
        scores = fitness.scores(candidates, stage, before.genome) if candidates else []
        # Training counts only the tokens that a stage adds; so does scoring where nothing is trained.
        fitness_tokens += len(candidates) * (stage.fitness_tokens if stage.training_tokens else added)
        training_tokens += len(candidates) * (stage.training_tokens - trained)
        trained = stage.training_tokens
        diverged += scores.count(inf)
        if stage is config.stages[-1]:  # the parent first, so that it wins a tie
            candidates, scores = [before.genome, *candidates], [before.fitness, *scores]
        finite = [index for index, score in enumerate(scores) if score < inf]
        ranked = sorted(finite, key=scores.__getitem__)
        if may_win is not None and stage is config.stages[-1]:
            ranked = _guarded(ranked, candidates, may_win)
        ranked = ranked[: stage.survivors]
        candidates, scores = [candidates[i] for i in ranked], [scores[i] for i in ranked]
        by_stage.append(scores[0] if scores else inf)
    if diverged:
        say(f"generation {number}: {diverged} of {len(offspring)} candidates diverged and are out")
    origin = "parent" if candidates[0] == before.genome else f"{config.moves} mutation"
    seconds = time.monotonic() - began
    spent = (fitness_tokens, training_tokens)
    return Generation(number, scores[0], candidates[0], len(offspring), seconds, origin, tuple(by_stage), *spent)


def _guarded(ranked: list[int], candidates: Sequence[Genome], may_win: MayWin) -> list[int]:
    """The places of candidates from the first that may win; the parent, at place 0, may."""
    first = next(i for i, place in enumerate(ranked) if not place or may_win(candidates[place], candidates[0]))
    if first:
        say(f"guard: {first} better candidates are passed over, for too many of their answers do not end")
    return ranked[first:]


def _write(path: Path, history: Sequence[Generation], provenance: Mapping[str, Any]) -> None:
    """Write the history, one line for each generation."""
    if parallel.first():
        write_lines(path, [_line(generation) for generation in history], provenance)


def _line(generation: Generation) -> dict[str, Any]:
    """Return a generation as JSON holds it, with null where a stage left no finite fitness."""
    by_stage = [score if isfinite(score) else None for score in generation.stage_fitness]
    return asdict(generation) | {"genome": generation.genome.levels, "stage_fitness": by_stage}


def _read(path: Path, provenance: Mapping[str, Any]) -> list[Generation]:
    """Return the generations of an interrupted search. Raise `DarwinError` if the file holds another search."""
    if path.exists():
        needed = (field.name for field in fields(Generation) if field.name != "starts")  # 0.2.0 wrote none
        recorded, lines = read_lines(path, *needed)
        if recorded != as_json(provenance):
            raise DarwinError(f"{path} holds another search, with other settings or another seed; delete it or move it")
    else:
        lines = []
    parallel.wait_for_all()  # every process has read the file before the first one writes it
    history = []
    for line in lines:
        by_stage = tuple(inf if score is None else score for score in line["stage_fitness"])
        history.append(Generation(**line | {"genome": Genome(tuple(line["genome"])), "stage_fitness": by_stage}))
    return history
