"""Figure 2 of the paper on SmolLM2-135M: does KL after a little training predict KL after much?

darwinlm database smollm2-135m --data vital-wiki --out RUN --database.levels 9 --target-level 3
python benchmarks/paper/figure_2.py RUN OUT      # resumes

16 offspring of the uniform genome at level 3 of 9, by the paper's mutation, are scored on 8,192 tokens before training,
after 4,096 training tokens and after 40,960 (AdamW, 1e-5, one step a sequence): by cross-entropy and by distillation,
of all weights and of consumers alone. Neither text was calibrated on. Spearman's rank correlation of each of the former
two with the last says which predicts better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from search import Bench, even_at, mutants, open_bench

from darwinlm.config.run import SearchConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.runtime.files import read_json_lines
from darwinlm.search.fitness import Fitness
from darwinlm.types import Genome, SelectionStage

TRAININGS = {
    f"{loss}, {trains}": SearchConfig(loss=loss, trains=trains)
    for loss in ("cross-entropy", "distillation")
    for trains in ("all", "consumers")
}
OFFSPRING, FITNESS_TOKENS, LITTLE, MUCH = 16, 8192, 4096, 40_960


@dataclass(frozen=True)
class Candidate:
    """KL of an offspring before training, and after little and much."""

    training: str
    number: int
    before: float
    little: float
    much: float


def score(bench: Bench, training_text: torch.Tensor, genomes: Sequence[Genome], training: str, out: Path) -> None:
    """Append the candidates that `out` lacks, a line of JSON each."""
    stages = tuple(SelectionStage(1, FITNESS_TOKENS, tokens) for tokens in (0, LITTLE, MUCH))
    fitness = Fitness(
        bench.stitcher, bench.text, training_text, replace(TRAININGS[training], stages=stages, scrambled=0.0)
    )
    known = {candidate.number for candidate in read(out) if candidate.training == training}
    for number, genome in enumerate(genomes):
        if number not in known:
            found = Candidate(training, number, *(fitness.score(genome, stage) for stage in stages))
            with out.open("a") as file:
                file.write(json.dumps(vars(found)) + "\n")
            print(found, flush=True)


def read(out: Path) -> list[Candidate]:
    return [Candidate(**line) for line in read_json_lines(out, "training", "number")] if out.exists() else []


def rank(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation."""
    return float(spearmanr(first, second).statistic)


def draw(candidates: list[Candidate], path: Path) -> None:
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, training in zip(figure.subplots(2, 2).flat, TRAININGS, strict=True):
        chosen = [candidate for candidate in candidates if candidate.training == training]
        much = [candidate.much for candidate in chosen]
        for name, label, marker in (("before", "before training", "o"), ("little", "after a little", "x")):
            found = [getattr(candidate, name) for candidate in chosen]
            shift = [value - min(found) for value in found]
            axes.scatter(shift, much, label=label, marker=marker)
        axes.set(title=training, xlabel="KL above the best of the 16", ylabel="KL after much training")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with the database of SmolLM2-135M, nine levels")
    parser.add_argument("out", type=Path, help="keeps what was measured, and the picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench, config = open_bench(arguments.run)
    tokenizer = find_checkpoint(config.model, arguments.run).tokenizer
    corpus = read_corpus(config.data, tokenizer, bench.text.shape[1], config.seed)
    wanted = {"calibration": config.calibration.tokens, "search": bench.text.numel(), "training": MUCH}
    training_text = corpus.draw(**wanted)["training"]
    even, budget = even_at(bench, config, 3.0)
    genomes = mutants(even, budget, OFFSPRING)
    lines = arguments.out / "candidates.jsonl"
    for training in TRAININGS:
        score(bench, training_text, genomes, training, lines)
    candidates = read(lines)
    print("| trained by | before training predicts | after little training predicts |\n| --- | ---: | ---: |")
    for training in TRAININGS:
        chosen = (candidate for candidate in candidates if candidate.training == training)
        before, little, much = zip(*((each.before, each.little, each.much) for each in chosen), strict=True)
        print(f"| {training} | {rank(before, much):.2f} | {rank(little, much):.2f} |")
    draw(candidates, arguments.out / "figure_2.png")


if __name__ == "__main__":
    main()
