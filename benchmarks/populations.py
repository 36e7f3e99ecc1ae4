"""What does scoring a population take, beside an earlier commit?  Seconds, counted products and memory of generations.

    python benchmarks/populations.py RUN 3b37bdf            # RUN: of `darwinlm database smollm2-135m --data vital-wiki`
    python benchmarks/populations.py RUN 3b37bdf --count    # operations, which other work cannot disturb

Each side scores the same parent, then the first 16 units alone at four levels each, as sensitivities are measured, then
two generations of 16 mutants in the stages of the default search, in a process of its own with its own sources and the
same installed packages. Memory is that of the process beyond what it had when its libraries were loaded, or what
tensors on a GPU took at most.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from between_commits import ROOT, run_in, unpacked
from torch.utils.flop_counter import FlopCounterMode

from darwinlm.config.run import DatabaseConfig, SearchConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import MANIFEST, Database
from darwinlm.genome import Grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_grid
from darwinlm.runtime.device import processor_name
from darwinlm.search.fitness import Fitness
from darwinlm.types import Genome, SelectionStage

WORKS = ("first scoring", "sensitivities", "generation", "generation")


def measure(run: Path, count: bool) -> dict[str, Any]:
    """What each of `WORKS` takes, its best score, and memory in GB."""
    begun, on_gpu = resident(), torch.cuda.is_available()
    taken, scores = taken_by(opened(run, torch.device("cuda" if on_gpu else "cpu")), count)
    memory = torch.cuda.max_memory_allocated() if on_gpu else resident() - begun
    return {"taken": taken, "scores": scores, "GB": memory / 1e9}


def resident() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def taken_by(fitness: Fitness, count: bool) -> tuple[list[float], list[float]]:
    """What each of `WORKS` takes, and its best score."""
    search, rng = SearchConfig(), Random(0)
    grid = fitness.stitcher.grid
    parent = Genome(tuple(max(1, round(grid.highest(index) * 0.3)) for index in range(len(grid.units))))
    taken, scores = [], []

    def first() -> list[float]:
        return fitness.scores([grid.dense(), parent], search.stages[-1])

    def sensitivities() -> list[float]:
        highest = [grid.highest(index) for index in range(16)]
        levels = [{1, round(most / 3), round(most * 2 / 3), most} - {0} for most in highest]
        single = [grid.dense().replace({index: level}) for index, own in enumerate(levels) for level in sorted(own)]
        return fitness.scores(single, SelectionStage(1, search.stages[0].fitness_tokens), grid.dense())

    def generation() -> list[float]:
        candidates, found = [mutant(grid, parent, rng) for _ in range(search.offspring)], [0.0]
        for stage in search.stages:
            found = fitness.scores(candidates, stage, parent)
            ranked = sorted(range(len(candidates)), key=found.__getitem__)
            candidates = [candidates[index] for index in ranked[: stage.survivors]]
        return found

    for work in (first, sensitivities, generation, generation):
        scored, spent = spent_on(work, count)
        taken.append(spent)
        scores.append(min(scored))
    return taken, scores


def opened(run: Path, device: torch.device) -> Fitness:
    """The fitness of a run's candidates, as `darwinlm search` would have it."""
    checkpoint = Checkpoint(run / "dense")
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, DatabaseConfig())
    provenance = json.loads((run / "database" / MANIFEST).read_text())["provenance"]
    dense = checkpoint.load(torch.bfloat16, device)  # on both sides, whatever they would take
    text = read_corpus("vital-wiki", checkpoint.tokenizer, 512, 0).draw_held_out(8192)
    stitcher = Stitcher(dense, checkpoint.family, Database(run / "database", grid, provenance))
    return Fitness(stitcher, text, text[:1], SearchConfig())


def mutant(grid: Grid, parent: Genome, rng: Random) -> Genome:
    """A genome one to three level switches away."""
    levels = list(parent.levels)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        kind = rng.choice(["attention", "mlp"])
        up, down = rng.sample([index for index, unit in enumerate(grid.units) if unit.kind == kind], 2)
        if levels[up] < grid.highest(up) and levels[down] > 0:
            levels[up], levels[down] = levels[up] + 1, levels[down] - 1
    return Genome(tuple(levels))


def spent_on(work: Callable[[], list[float]], count: bool) -> tuple[list[float], float]:
    """What a work returns, and the seconds or the operations that it took."""
    if count:
        with FlopCounterMode(display=False) as counter:
            result = work()
        return result, counter.get_total_flops()
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="What does scoring a population take, beside an earlier commit?")
    parser.add_argument("run", type=Path)
    parser.add_argument("commit", nargs="?", help="if it is missing, only the sources that are imported are measured")
    parser.add_argument("--count", action="store_true")
    arguments = parser.parse_args()
    if arguments.commit is None:
        print(json.dumps(measure(arguments.run, arguments.count)))
        return
    print(f"{datetime.date.today()}, {processor_name()}, {os.cpu_count()} cores, against {arguments.commit}")
    command = [__file__, str(arguments.run.resolve()), *(["--count"] if arguments.count else [])]
    sides = {}
    with unpacked(arguments.commit) as earlier:
        for name, tree in (("earlier", earlier), ("now", ROOT)):
            printed = run_in(tree, *command)
            sides[name] = json.loads(printed)
            print(name, printed, end="", flush=True)
    for name, before, now in zip(WORKS, sides["earlier"]["taken"], sides["now"]["taken"], strict=True):
        print(f"{name}, now / earlier: {now / before:.3f}")
    print(f"memory, now / earlier: {sides['now']['GB'] / sides['earlier']['GB']:.2f}")


if __name__ == "__main__":
    main()
