"""What predicts how good a candidate will be?  KL before training, after a little of several kinds, and after much.

    darwinlm database smollm2-135m --data vital-wiki --out RUN
    python benchmarks/predictors.py RUN OUT [--genomes 16] [--recovery 200000]      # resumes
    python benchmarks/predictors.py RUN OUT --report                                # of what is measured so far

Genomes that keep 60 % of the parameters and differ as candidates do and more: two starts, mutants of both at 1, 4 and
16 moves (of the better start twice), one between the starts, depth only, width only, and two of other papers. Each is
judged on articles (the search's text) untrained, after the paper's training (cross-entropy, all weights, 1e-5), and
after short trainings towards the dense model's distribution, of consumers and of all weights, at several rates and
lengths. The truth is KL on held-out articles and on WikiText-2, and the log-likelihood of right answers (ARC-easy),
after the whole refit of consumers and after a recovery of all weights.
`OUT/measured.jsonl` has a line for each genome and training; rank correlations with
bootstrap intervals over genomes are over all of them and over the better half by the truth.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from answers import right_answers
from cells import cells
from held_out import judged_texts
from scipy.stats import spearmanr
from search import open_bench
from torch import Tensor

from darwinlm.commands.run_directory import Run
from darwinlm.config.run import RefitConfig, RunConfig, SearchConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.size import parameter_count
from darwinlm.report import tables
from darwinlm.rivals.methods import METHODS
from darwinlm.rivals.problem import Problem
from darwinlm.runtime.device import resolve_device
from darwinlm.runtime.files import read_json_lines
from darwinlm.search.budget import Budget
from darwinlm.search.candidate_training import CandidateTrainer
from darwinlm.search.costs import parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.mutation import adapt, priced
from darwinlm.search.sensitivity import WORST, least_sensitive, sensitivities
from darwinlm.search.uniform import uniform
from darwinlm.training.refit import refit, set_refitted
from darwinlm.types import Genome, SelectionStage

FITNESS_TOKENS, HELD_OUT, LENGTH = 8192, 16_384, 512
TRUTHS = {"refit": "after the whole refit", "recovery": "after recovery"}
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Way:
    """A training before a genome is judged: nothing where there are no tokens."""

    name: str
    tokens: int = 0
    rate: float = 0.0
    trains: str = "all"
    loss: str = "distillation"


def ways(recovery: int) -> list[Way]:
    """The predictors, and the two trainings after which the truth is measured."""
    paper = Way("the paper's training", 4096, 1e-5, loss="cross-entropy")
    refits = [
        Way(f"consumers, {tokens:,} tokens, {rate:g}", tokens, rate, "consumers")
        for tokens in (512, 2048, 8192)
        for rate in (1e-4, 3e-4, 1e-3)
    ]
    whole = [
        Way(f"all weights, {tokens:,} tokens, {rate:g}", tokens, rate)
        for tokens in (2048, 8192)
        for rate in (1e-5, 1e-4)
    ]
    truths = [Way("refit", 131_072, 3e-4, "consumers"), Way("recovery", recovery, 1e-4)]
    return [Way("untrained"), paper, *refits, *whole, *truths]


class Bench:
    """The dense model, its database, the genomes and the texts of a run."""

    def __init__(self, path: Path, out: Path, count: int, recovery: int, first: int = 0):
        self.out, self.run = out, Run.open(path)
        self.device = resolve_device("auto")
        bench, config = open_bench(path, torch.float32, self.device)
        self.stitcher, self.dense = bench.stitcher, bench.stitcher.dense
        self.tokenizer = find_checkpoint(config.model, path).tokenizer
        corpus = read_corpus(config.data, self.tokenizer, LENGTH, config.seed)
        most = max(131_072, recovery)
        drawn = corpus.draw(calibration=config.calibration.tokens, search=FITNESS_TOKENS, training=most)
        self.search, self.training = drawn["search"], drawn["training"]
        self.texts = judged_texts(corpus, self.tokenizer, HELD_OUT, LENGTH)
        self.of_dense: dict[str, list[Tensor]] = {"search": [], **{name: [] for name in self.texts}}
        self.genomes = dict(list(self._genomes(config).items())[first : first + count])

    def _genomes(self, config: RunConfig) -> dict[str, Genome]:
        """The genomes by name."""
        grid, dense = self.stitcher.grid, parameter_count(self.dense)
        wanted = RunConfig("M", "D", "O", target="params=0.6", database=config.database)
        even, budget = uniform(grid, parameter_costs(grid, dense), wanted, dense)
        fitness = Fitness(self.stitcher, self.search, self.search[:1], SearchConfig())
        table = sensitivities(grid, fitness, SelectionStage(1, 1024), self.out / "sensitivities.json")
        start = least_sensitive(budget, table)
        found = {"uniform": even, "sensitivity": start}
        for name, parent, moves in (
            ("sensitivity", start, 1), ("sensitivity", start, 4), ("sensitivity", start, 16),
            ("uniform", even, 1), ("uniform", even, 4), ("uniform", even, 16),
            ("sensitivity, other", start, 1), ("sensitivity, other", start, 4), ("sensitivity, other", start, 16),
        ):  # fmt: skip
            found[f"{name}, {moves} moves"] = moved(parent, budget, moves, Random(f"{name} {moves}"))
        between = tuple((a + b) // 2 for a, b in zip(even.levels, start.levels, strict=True))
        found["between the starts"] = adapt(Genome(between), budget, table)
        highest = [grid.highest(index) for index in range(len(grid.units))]
        ends = [[0.0, *[WORST] * (most - 1), row[most]] for most, row in zip(highest, table, strict=True)]
        inner = [[*row[:most], WORST] for most, row in zip(highest, table, strict=True)]
        found["depth only"], found["width only"] = (least_sensitive(budget, each) for each in (ends, inner))
        problem = Problem(
            self.stitcher, budget, even, fitness, self.search, self.training, SearchConfig(), 0, self.out / "rivals"
        )
        for method in ("shortened-llama-taylor", "shortgpt"):
            found[method] = METHODS[method].allocate(problem)
        return {name: genome for name, genome in found.items() if budget.fits(genome)}

    def measure(self, genome: str, way: str, chosen: Way) -> dict[str, Any]:
        """Train a genome's model in one way, and judge it; what ends with the truth is judged on more."""
        began, levels = time.monotonic(), self.genomes[genome]
        model = self._trained(levels, chosen, re.sub(r"\W+", "-", f"{genome} {way}"))
        trained = time.monotonic() - began
        found: dict[str, Any] = {"kl": self._kl(model, self.search, "search")}
        found |= {"seconds": time.monotonic() - began, "training seconds": trained}
        if way in TRUTHS:
            found |= {name: self._kl(model, text, name) for name, text in self.texts.items()}
            found["answers"] = right_answers(model, self.tokenizer)
        return found

    def _trained(self, genome: Genome, way: Way, name: str) -> Any:
        """The model of a genome after a training, whose state a file of this name keeps."""
        if not way.tokens:
            return self.stitcher.stitch(genome)
        tokens = self.training[: max(1, way.tokens // LENGTH)]
        if way.trains == "consumers":
            model = copy.deepcopy(self.stitcher.stitch(genome))
            file = self.out / "refits" / f"{name}.safetensors"
            settings = RefitConfig(way.tokens, way.rate, batch_size=min(4, len(tokens)), rank=0)
            set_refitted(model, refit(self.stitcher, genome, tokens, settings, file, {"way": way.name}))
            file.unlink()
            return model
        teacher = self.dense if way.loss == "distillation" else None
        trainer = CandidateTrainer(list(tokens.split(1)), way.rate, self.device, teacher)
        return trainer.train(genome, lambda: self.stitcher.stitch(genome), tokens.numel()).model

    def _kl(self, model: Any, text: Tensor, name: str) -> float:
        return perplexity_and_kl({"dense": self.dense, "model": model}, text, self.of_dense[name])["model"].kl


def moved(genome: Genome, budget: Budget, moves: int, rng: Random) -> Genome:
    """A genome some priced moves away."""
    for _ in range(moves):
        genome = priced(genome, budget, rng, 1) or genome
    return genome


def correlation(of: Sequence[float], truth: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's rank correlation, and 95 % of what it is in bootstrap samples of the genomes."""
    pairs, rng = np.array([of, truth]), np.random.default_rng(0)
    samples = []
    for _ in range(BOOTSTRAPS):
        first, second = pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])]
        if len({*first}) > 1 and len({*second}) > 1:
            samples.append(spearmanr(first, second).statistic)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(spearmanr(*pairs).statistic), float(low), float(high)


def report(lines: Sequence[dict[str, Any]], all_ways: Sequence[Way]) -> str:
    """The table of correlations, over the genomes for which everything is measured."""
    by: dict[tuple[str, str], dict[str, Any]] = {(line["genome"], line["way"]): line for line in lines}
    names = [way.name for way in all_ways]
    genomes = [name for name in dict.fromkeys(line["genome"] for line in lines) if all((name, w) in by for w in names)]
    if len(genomes) < 4:
        return f"{len(genomes)} genomes are measured; a correlation wants 4"
    truths: dict[str, Callable[[str], float]] = {
        f"{what} {TRUTHS[way]}": lambda name, what=what, way=way: by[name, way][what]
        for way in TRUTHS
        for what in ("articles", "WikiText-2", "answers")
    }
    rows = []
    for way in names:
        seconds = float(np.median([by[name, way]["seconds"] for name in genomes]))
        row = [way, f"{seconds:.0f}"]
        for what, truth in truths.items():
            sign = -1.0 if what.startswith("answers") else 1.0  # of which more is better
            ranked = sorted(genomes, key=lambda name: sign * truth(name))
            for chosen in (ranked, ranked[: len(ranked) // 2]):
                found, low, high = correlation(
                    [by[name, way]["kl"] for name in chosen], [sign * truth(name) for name in chosen]
                )
                row.append(f"{found:.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    titles = ["judged after", "seconds", *(f"{what}, {of}" for what in truths for of in ("all", "best half"))]
    return f"{len(genomes)} genomes\n\n{tables.markdown(titles, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--genomes", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="the first genome, so that processes can share them")
    parser.add_argument("--recovery", type=int, default=200_000)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file, all_ways = given.out / "measured.jsonl", ways(given.recovery)
    if not given.report:
        bench = Bench(given.run, given.out, given.genomes, given.recovery, given.first)
        by_name = {way.name: way for way in all_ways}
        wanted = [
            {"genome": name, "way": way, "levels": list(genome.levels), "tokens": by_name[way].tokens}
            for name, genome in bench.genomes.items() for way in by_name
        ]  # fmt: skip
        cells(file, wanted, lambda genome, way, levels, tokens: bench.measure(genome, way, by_name[way]))
    print(report(read_json_lines(file) if file.exists() else [], all_ways))


if __name__ == "__main__":
    main()
