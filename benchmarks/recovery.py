"""How a pruned SmolLM2 recovers: by which loss, from which allocation, in one stage or in two.

    python benchmarks/recovery.py losses --out /tmp/recovery      line 4 of issue 6
    python benchmarks/recovery.py stages --out /tmp/recovery      line 5

`losses` prunes as `darwinlm demo` does, or takes a run that has searched. It tries learning rates with few tokens, logs
them, and trains the searched and the uniform model with the best one on cross-entropy, on distillation, and on both.
`stages` prunes at once or in two steps to one size, with one sum of training tokens. Each training goes on where it was
stopped, and what is finished is only read again. Both print a markdown table, of held-out articles that nothing was
trained on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from darwinlm.commands import compress
from darwinlm.commands.gradual import gradual
from darwinlm.commands.run_directory import Run
from darwinlm.commands.train import train
from darwinlm.config.run import DEMO, RefitConfig, RunConfig
from darwinlm.config.training import (
    DistillationConfig,
    GradualConfig,
    GradualStage,
    StreamConfig,
    TrainConfig,
    TrainingConfig,
)
from darwinlm.database.stitch import Stitcher, repeat_shared
from darwinlm.database.store import MANIFEST, Database
from darwinlm.export.hf import export_hf
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes, find_units
from darwinlm.model.size import parameter_count
from darwinlm.runtime.files import read_json, write_json
from darwinlm.search.costs import parameter_costs
from darwinlm.search.uniform import uniform
from darwinlm.training.directory import Training

LOSSES = {"cross-entropy": 0.0, "distillation": 1.0, "mixed": 0.5}


def models(run: Run, out: Path) -> dict[str, Path]:
    """Exports of the searched and of the uniform genome, as the database has them: nothing is trained or refitted."""
    dense = Checkpoint(run.dense)
    settings: RunConfig = run.config
    units = find_units(dense.skeleton(), dense.config, settings.database.structure)
    grid = level_grid(units, settings.database.levels, settings.database.granularity)
    database = Database(run.database, grid, read_json(run.database / MANIFEST)["provenance"])
    dense_parameters = parameter_count(dense.skeleton())
    even, _ = uniform(grid, parameter_costs(grid, dense_parameters), settings, dense_parameters)
    found = {}
    for name, genome in (("searched", run.genome), ("uniform", even)):
        found[name] = out / name
        if not found[name].exists():
            stitcher = Stitcher(dense.load(dense.dtype, torch.device("cpu")), dense.family, database)
            model = repeat_shared(stitcher.stitch(genome))
            export_hf(model, block_sizes(grid, genome, dense.config), dense.tokenizer, found[name], f"# {name}\n")
    return found


def training(arguments: argparse.Namespace, learning_rate: float, steps: int) -> TrainingConfig:
    """A step is 8 sequences of 256 tokens, evaluated at the start and at the end."""
    return TrainingConfig(
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 20),
        batch_size=arguments.batch,
        micro_batch_size=min(4, arguments.batch),
        log_every=1,
        save_every=25,
        evaluate_every=max(steps, 1),
        evaluation_tokens=arguments.evaluation_tokens,
    )


def trained(
    arguments: argparse.Namespace, model: Path, name: str, weight: float, learning_rate: float, tokens: int
) -> Training:
    """One training, resumed or read again."""
    steps = -(-tokens // (arguments.batch * arguments.length))
    return train(
        TrainConfig(
            model=str(model),
            data=arguments.data,
            out=str(arguments.out / name),
            tokens=tokens,
            teacher=str(Run(arguments.run).dense),
            cache=str(arguments.out / "cache"),
            verify=False,
            stream=StreamConfig(sequence_length=arguments.length),
            distillation=DistillationConfig(weight=weight),
            training=training(arguments, learning_rate, steps),
        )
    )


def compare_losses(arguments: argparse.Namespace) -> None:
    """The sweep of learning rates, then every loss from both allocations."""
    if not (arguments.run / "search" / "result.json").exists():
        config = replace(DEMO, out=str(arguments.run), data=arguments.data)
        search = replace(DEMO.search, generations=arguments.generations)
        compress.run(replace(config, search=search), until="search")
    exports = models(Run(arguments.run), arguments.out)
    sweep: dict[str, dict[str, float]] = {}
    best: dict[str, float] = {}
    for loss, weight in LOSSES.items():
        sweep[loss] = {}
        for rate in arguments.learning_rates:
            name = f"sweep-{loss}-{rate:g}"
            found = trained(arguments, exports["searched"], name, weight, rate, arguments.sweep_tokens)
            sweep[loss][f"{rate:g}"] = found.result["after"]["perplexity"]
        best[loss] = float(min(sweep[loss], key=sweep[loss].__getitem__))
    write_json(arguments.out / "sweep.json", sweep)
    lines = []
    for allocation, export in exports.items():
        for loss, weight in LOSSES.items():
            found = trained(arguments, export, f"{allocation}-{loss}", weight, best[loss], arguments.tokens).result
            before, after = found["before"], found["after"]
            lines.append(
                f"| {allocation} | {loss} | {best[loss]:g} | {before['perplexity']:.2f} | {after['perplexity']:.2f} | "
                f"{before['kl']:.4f} | {after['kl']:.4f} |"
            )
    print(f"\nLearning rates, held-out perplexity after {arguments.sweep_tokens:,} tokens:\n")
    print("| loss |", " | ".join(f"{rate:g}" for rate in arguments.learning_rates), "|")
    print("| --- |", " ---: |" * len(arguments.learning_rates))
    for loss, row in sweep.items():
        print(f"| {loss} |", " | ".join(f"{value:.2f}" for value in row.values()), "|")
    print(f"\nAfter {arguments.tokens:,} tokens:\n")
    print("| allocation | loss | learning rate | perplexity before | after | KL before | after |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(lines))


def compare_stages(arguments: argparse.Namespace) -> None:
    """One size and one sum of training tokens, reached at once and in two stages."""
    half, level = arguments.tokens // 2, DEMO.level
    plans = {
        "one": (GradualStage(level, 2 * half),),
        "two": (GradualStage(level / 2, half), GradualStage(level, half)),
    }
    lines = []
    for name, stages in plans.items():
        steps = -(-stages[-1].tokens // (arguments.batch * arguments.length))
        config = GradualConfig(
            model=DEMO.model,
            data=arguments.data,
            out=str(arguments.out / f"{name}-stage"),
            stages=stages,
            cache=str(arguments.out / "cache"),
            verify=False,
            calibration=replace(DEMO.calibration, tokens=arguments.calibration_tokens),
            database=DEMO.database,
            search=replace(DEMO.search, generations=arguments.generations),
            refit=RefitConfig(tokens=0),
            evaluation=replace(DEMO.evaluation, tokens=arguments.evaluation_tokens, repeats=1),
            stream=StreamConfig(sequence_length=arguments.length),
            distillation=DistillationConfig(weight=LOSSES[arguments.loss]),
            training=training(arguments, arguments.learning_rates[0], steps),
        )
        gradual(config)
        lines += [
            f"| {name} | {row['stage']} | {row['level']:g} | {row['parameters'] / 1e6:.1f} M | "
            f"{row['before']['perplexity']:.2f} | {row['after']['perplexity']:.2f} | "
            f"{row['before']['kl']:.4f} | {row['after']['kl']:.4f} |"
            for row in read_json(arguments.out / f"{name}-stage" / "table.json")
        ]
    print(f"\n{2 * half:,} training tokens in all, {arguments.loss}:\n")
    print("| stages | stage | level | parameters | perplexity as pruned | trained | KL as pruned | trained |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(lines))


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("losses", "stages"))
    parser.add_argument("--run", type=Path, help="a run that has searched, or its place; OUT/run by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="vital-wiki")
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--sweep-tokens", type=int, default=40_960)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4])
    parser.add_argument("--loss", choices=LOSSES, default="distillation", help="of the stages")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--generations", type=int, default=6)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.run = arguments.run or arguments.out / "run"
    compare = compare_losses if arguments.what == "losses" else compare_stages
    compare(arguments)


if __name__ == "__main__":
    main()
