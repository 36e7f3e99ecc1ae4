"""Held-out KL of what `compress` finds by default, beside uniform, the plain published search, and the start alone.

python benchmarks/better_models.py OUT [--levels 2 3 5] [--seeds 0 1 2]      # resumes; hours on two cores

SmolLM2-135M, `vital-wiki`, nine levels; every seed draws its own text, and its database serves all its levels. KL to
the dense model in nats a token, in bfloat16, on 8,192 tokens each of held-out articles and of WikiText-2 validation,
which nothing here has seen. The plain search is that of `time_to_kl.py`: the paper's moves from the uniform genome, 40
generations of 16, no training; its weights are the database's, as those of the start and of the uniform model here.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from cells import cells
from held_out import HeldOut
from search import even_at, open_bench
from shared_database import run_over
from time_to_kl import plainly, texts

from darwinlm import load
from darwinlm.config.run import DatabaseConfig, RunConfig
from darwinlm.runtime.files import read_lines
from darwinlm.types import Genome

METHODS = ("uniform", "plain search", "start", "compress")
TEXTS = ("articles", "WikiText-2")
GOAL = 0.75


def measure(out: Path, level: float, seed: int) -> dict[str, list[float]]:
    """KL of every method on both texts."""
    path = out / f"compress-{level:g}-{seed}"
    settings = RunConfig(
        "smollm2-135m", "vital-wiki", str(path), target_level=level, seed=seed, database=DatabaseConfig(levels=9)
    )
    found = run_over(out / f"base-{seed}", settings, "export")
    bench, config = open_bench(path)
    even, budget = even_at(bench, config, level)
    plain = plainly(bench, even, budget, out / f"plain-{level:g}-{seed}.jsonl", seed)
    first = read_lines(found.history_path, "genome")[1][0]
    genomes = {"uniform": even, "plain search": plain, "start": Genome(tuple(first["genome"]))}
    held_out = HeldOut(bench.stitcher.dense, texts(config, out))
    models = {name: bench.stitcher.stitch(genome) for name, genome in genomes.items()}
    models["compress"] = load(found.exported, "bfloat16")
    return {name: list(held_out(model).values()) for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--levels", type=float, nargs="+", default=[2.0, 3.0, 5.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [{"level": level, "seed": seed} for seed in arguments.seeds for level in arguments.levels]
    known = cells(arguments.out / "cells.jsonl", wanted, partial(measure, arguments.out))
    print(f"{torch.get_num_threads()} threads\n\n| level | text | {' | '.join(METHODS)} | to plain | goal |")
    print(f"| --- | --- | {'---: | ' * len(METHODS)}---: | ---: |")
    for level in arguments.levels:
        of_level = [line for line in known if line["level"] == level]
        for index, text in enumerate(TEXTS):
            each = {name: [line[name][index] for line in of_level] for name in METHODS}
            row = " | ".join(f"{mean(values):.4f} ({min(values):.4f}-{max(values):.4f})" for values in each.values())
            ratio = mean(mine / its for mine, its in zip(each["compress"], each["plain search"], strict=True))
            print(f"| {level:g} | {text} | {row} | {ratio:.2f} | {GOAL} |")


if __name__ == "__main__":
    main()
