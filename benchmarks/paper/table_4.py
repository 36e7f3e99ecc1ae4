"""Table 4 of the paper on SmolLM2-135M: is a search that trains its offspring better, before and after post-training?

python benchmarks/paper/table_4.py OUT [--seeds 0 1 2]      # resumes; an hour a seed on two cores

Level 3 of 9, the same start, generations and tokens of fitness, no refit; start, moves and scrambled text are this
package's defaults, not the paper's. With training an offspring's weights have all seen 512 to 4,096 tokens by the stage
it is judged in. Both models are then trained on the same 102,400 tokens of articles by
cross-entropy (AdamW, 1e-4). KL to the dense model in nats a token, in bfloat16, on 8,192 tokens each of held-out
articles and of WikiText-2 validation; every seed draws its own text.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from held_out import HeldOut
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import cells
from search import open_bench, stages
from shared_database import run_over
from time_to_kl import texts

from darwinlm import load
from darwinlm.commands.train import train
from darwinlm.config.run import DatabaseConfig, RefitConfig, RunConfig, SearchConfig
from darwinlm.config.training import DistillationConfig, StreamConfig, TrainConfig, TrainingConfig
from darwinlm.report.comparison import COLOURS
from darwinlm.report.figures import save_figure

GENERATIONS, TOKENS = 8, 102_400
SEARCHES = {
    "without training": SearchConfig(generations=GENERATIONS, stages=stages(training=False)),
    "with training": SearchConfig(generations=GENERATIONS, stages=stages(training=True), trains="all"),
}


def measure(out: Path, search: str, seed: int) -> dict[str, dict[str, float]]:
    """KL on every text, before and after post-training."""
    settings = RunConfig(
        model="smollm2-135m",
        data="vital-wiki",
        out=str(out / f"{search.replace(' ', '-')}-{seed}"),
        target_level=3.0,
        seed=seed,
        verify=False,
        database=DatabaseConfig(levels=9),
        search=SEARCHES[search],
        refit=RefitConfig(tokens=0),
    )
    found = run_over(out / f"base-{seed}", settings, "export")
    trained = train(
        TrainConfig(
            model=str(found.path),
            data=settings.data,
            out=f"{found.path}-trained",
            tokens=TOKENS,
            seed=seed,
            verify=False,
            stream=StreamConfig(sequence_length=512),
            distillation=DistillationConfig(weight=0.0),
            training=TrainingConfig(warmup_steps=5, batch_size=4, micro_batch_size=4, evaluate_every=TOKENS),
        )
    )
    bench, config = open_bench(found.path)
    held_out = HeldOut(bench.stitcher.dense, texts(config, out))
    models = {"before": found.exported, "after": trained.exported}
    return {when: held_out(load(path, "bfloat16")) for when, path in models.items()}


def draw(known: list[dict[str, Any]], path: Path) -> None:
    """KL before and after post-training, a panel a text, a line a seed."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, text in zip(figure.subplots(1, 2), known[0]["before"], strict=True):
        for name, colour in zip(SEARCHES, COLOURS[1:], strict=False):
            chosen = [line for line in known if line["search"] == name]
            for number, line in enumerate(chosen):
                label = name if number == 0 else None
                values = [line[when][text] for when in ("before", "after")]
                axes.plot(("before", "after"), values, marker="o", color=colour, label=label)
        axes.set(title=text, ylabel="KL to the dense model (nats a token)", xlabel="post-training")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    save_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [{"search": name, "seed": seed} for seed in arguments.seeds for name in SEARCHES]
    known = cells(arguments.out / "cells.jsonl", wanted, partial(measure, arguments.out))
    print(f"{torch.get_num_threads()} threads\n\n| search | text | before post-training | after |")
    print("| --- | --- | ---: | ---: |")
    for name in SEARCHES:
        chosen = [line for line in known if line["search"] == name]
        for text in chosen[0]["before"]:
            each = [[line[when][text] for line in chosen] for when in ("before", "after")]
            row = " | ".join(f"{mean(values):.4f} ({min(values):.4f}-{max(values):.4f})" for values in each)
            print(f"| {name} | {text} | {row} |")
    draw(known, arguments.out / "table_4.png")


if __name__ == "__main__":
    main()
