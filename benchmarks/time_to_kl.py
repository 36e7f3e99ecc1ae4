"""How long the plain published search takes to its KL after 40 generations on SmolLM2-135M, and ours to the same KL.

darwinlm database smollm2-135m --data vital-wiki --out RUN --database.levels 9 --target-level 3
python benchmarks/time_to_kl.py RUN OUT [--levels 3 5] [--seed 0]      # the plain searches resume

The plain search is the paper's: from the uniform genome, level-switch mutation within kinds, 16 offspring, survivors
8 4 2 1 on 1,024 to 8,192 tokens, no training. It runs on our scorer, which gives the same choices in a fraction of the
time; its seconds are its generations times those of one generation in the published form (`search.py`), measured in
this run. Ours is what `compress` does without its refit: sensitivities, the start, and generations from there, from a
cold start, everything counted. Both are judged on the last stage's tokens as the plain search saw them, on held-out
articles and on WikiText-2 validation, which neither has seen; a ratio is given to a moment at which ours is no worse.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from held_out import HeldOut
from refit import HELD_OUT, wikitext
from search import LENGTH, Bench, even_at, mutants, open_bench, plan_of, seconds, staged, stages
from torch import Tensor

from darwinlm.config.run import RunConfig, SearchConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.search.budget import Budget
from darwinlm.search.evolution import evolve
from darwinlm.search.fitness import Fitness
from darwinlm.search.sensitivity import find_starts
from darwinlm.types import Genome

PLAIN = SearchConfig(start="uniform", moves="within_kinds", scrambled=0, generations=40, stages=stages(training=False))
OURS = SearchConfig(generations=4, stages=stages(training=False))


@dataclass(frozen=True)
class Moment:
    """A search at some time: its KL on the last stage's tokens, on articles and on WikiText-2."""

    name: str
    seconds: float
    divergences: tuple[float, ...]


def scorer(bench: Bench, config: SearchConfig) -> Fitness:
    return Fitness(bench.stitcher, bench.text, bench.training_text, config)


def judge(name: str, genome: Genome, seconds: float, bench: Bench, held_out: HeldOut) -> Moment:
    return Moment(name, seconds, tuple(held_out(bench.stitcher.stitch(genome)).values()))


def plainly(bench: Bench, even: Genome, budget: Budget, history: Path, seed: int) -> Genome:
    """The plain search's genome after all generations."""
    return evolve({"uniform": even}, budget, scorer(bench, PLAIN), PLAIN, seed, history).best


def published_seconds(bench: Bench, even: Genome, budget: Budget, repeats: int) -> float:
    """Of a generation in the published form."""
    plan = plan_of(even, mutants(even, budget, PLAIN.offspring), scorer(bench, PLAIN), training=False)
    return median(
        seconds(lambda: staged(bench, plan, narrow=False, chunked=False, nested=False)) for _ in range(repeats)
    )


def ours(bench: Bench, even: Genome, budget: Budget, seed: int, held_out: HeldOut) -> list[Moment]:
    """Our search from nothing: the start, and every generation."""
    with tempfile.TemporaryDirectory() as scratch:
        directory, began = Path(scratch), time.perf_counter()
        fitness = scorer(bench, OURS)
        starts = find_starts(even, budget, fitness, OURS, seed, directory)
        before = time.perf_counter() - began
        history = evolve(starts, budget, fitness, OURS, seed, directory / "history.jsonl").history
    moments = []
    for line in history:
        before += line.seconds
        name = f"{line.generation} generations" if line.generation else f"the start, {line.origin}"
        moments.append(judge(name, line.genome, before, bench, held_out))
    return moments


def texts(config: RunConfig, out: Path) -> dict[str, Tensor]:
    """Which no search has seen."""
    checkpoint = find_checkpoint(config.model, out)
    articles = read_corpus(config.data, checkpoint.tokenizer, LENGTH, config.seed).draw_held_out(HELD_OUT)
    return {"articles": articles, "wikitext": wikitext(checkpoint)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with the database of SmolLM2-135M, nine levels")
    parser.add_argument("out", type=Path, help="keeps the plain searches")
    parser.add_argument("--levels", type=float, nargs="+", default=[3.0, 5.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="published generations that are timed, for their median")
    parser.add_argument("--only-plain", action="store_true", help="run the plain searches and time nothing")
    arguments = parser.parse_args()
    bench, config = open_bench(arguments.run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    search = {"search": bench.text[: PLAIN.stages[-1].fitness_tokens // LENGTH]}
    held_out = HeldOut(bench.stitcher.dense, search | texts(config, arguments.out))
    print(f"{torch.get_num_threads()} threads, seed {arguments.seed}")
    for level in arguments.levels:
        even, budget = even_at(bench, config, level)
        history = arguments.out / f"plain-{level:g}-{arguments.seed}.jsonl"
        genome = plainly(bench, even, budget, history, arguments.seed)
        if arguments.only_plain:
            continue
        generation = published_seconds(bench, even, budget, arguments.repeats)
        taken = PLAIN.generations * generation
        plain = judge(f"plain, {PLAIN.generations} generations", genome, taken, bench, held_out)
        print(f"\nlevel {level:g} of {config.database.levels}, a published generation takes {generation:.1f} s\n")
        print("| search | seconds | KL, search tokens | articles | WikiText-2 | sooner |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for moment in (plain, *ours(bench, even, budget, arguments.seed, held_out)):
            pairs = zip(moment.divergences, plain.divergences, strict=True)
            sooner = f"{taken / moment.seconds:.1f}x" if all(mine <= its for mine, its in pairs) else "worse"
            cells = " | ".join(f"{value:.4f}" for value in moment.divergences)
            print(f"| {moment.name} | {moment.seconds:.0f} | {cells} | {sooner} |", flush=True)


if __name__ == "__main__":
    main()
