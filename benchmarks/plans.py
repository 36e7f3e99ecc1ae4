"""What five models take on GPUs of 24, 48 and 80 GB and on eight of them, by `darwinlm plan`'s count. Nothing is run.

    python benchmarks/plans.py            # print the tables
    python benchmarks/plans.py --write    # and put them into docs/gpus.md

It needs no GPU and no network: shapes of models and data sheets of GPUs are files of `commands/plan`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from darwinlm.commands.plan.devices import Machine, gpus
from darwinlm.commands.plan.fits import first_misfit
from darwinlm.commands.plan.shapes import shape_of
from darwinlm.commands.plan.show import duration
from darwinlm.commands.plan.stages import Stage, stages_of
from darwinlm.config.files import read_settings
from darwinlm.config.run import CalibrationConfig
from darwinlm.config.training import GradualConfig, GradualStage, TrainingConfig
from darwinlm.report import tables
from darwinlm.runtime.device import DTYPES

ROOT = Path(__file__).parents[1]
PAGE, RECIPES = ROOT / "docs" / "gpus.md", ROOT / "src" / "darwinlm" / "recipes"
MARK = "<!-- benchmarks/plans.py -->\n"
MODELS = ("Llama-3.2-1B", "Llama-3.1-8B", "Qwen2.5-14B-Instruct", "Qwen2.5-32B-Instruct", "Llama-3.1-70B")
MACHINES = {
    "24 GB: one RTX 4090": ("rtx4090", 1),
    "48 GB: one L40S": ("l40s", 1),
    "80 GB: one H100": ("h100", 1),
    "8 x 80 GB: eight H100": ("h100", 8),
}
CONFIG = GradualConfig(
    model="-",
    data="-",
    out="-",
    stages=(GradualStage(5.0, 10_000_000_000),),
    calibration=CalibrationConfig(sequence_length=2048, batch_size=2, dtype="bfloat16"),
    training=TrainingConfig(gradient_checkpointing=True, fsdp=True),
)
TRAINING_TOKENS = (10_000, 50_000, 100_000, 200_000)  # of each stage of selection, the paper's
OF_RECIPES = {
    "llama-2-7b": "Llama-2-7b-hf",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen-2.5-14b-instruct": "Qwen2.5-14B-Instruct",
}
PRUNING = ("calibration", "elimination", "search", "refit", "export", "evaluation")
TITLES = ["model", "database", "search", "with training", "refit", "evaluation", "training", "host", "disk", "take"]


def with_training(config: GradualConfig) -> GradualConfig:
    """The same recipe, whose candidates' consumers are trained before they are selected."""
    pairs = zip(config.search.stages, TRAINING_TOKENS, strict=True)
    stages = tuple(replace(stage, training_tokens=tokens) for stage, tokens in pairs)
    return replace(config, search=replace(config.search, stages=stages))


def of_machines() -> str:
    """A table of all models for each machine, in Markdown."""
    lines = []
    for title, (name, count) in MACHINES.items():
        machine = gpus(name, count, DTYPES[CONFIG.calibration.dtype])
        rows = [[name, *_cells(model_of(name), CONFIG, machine)] for name in MODELS]
        lines += [f"**{title}**", "", tables.markdown(TITLES, rows), ""]
    return "\n".join(lines)


def of_recipes() -> str:
    """A table of the first stage of each recipe of the paper, in Markdown."""
    rows = []
    for recipe, name in OF_RECIPES.items():
        config = read_settings(RECIPES / f"{recipe}.yaml", GradualConfig)
        config = replace(config, stages=config.stages[:1])
        for count in (1, 8):
            machine = gpus("h100", count, DTYPES[config.calibration.dtype])
            rows.append([f"{recipe}, {machine}", *_cells(model_of(name), config, machine)])
    return tables.markdown(TITLES, rows)


def model_of(name: str) -> PretrainedConfig:
    """The config of a model in the table of shapes."""
    config = shape_of(name)
    assert config is not None
    return config


def _cells(model: PretrainedConfig, config: GradualConfig, machine: Machine) -> list[str]:
    """The cells of a model's row."""
    stages, trained = stages_of(model, config, machine), any(each.training_tokens for each in config.search.stages)
    other = stages if trained else stages_of(model, with_training(config), machine)
    misfit = first_misfit(model, config, machine, stages)
    pruning = [stage for stage in stages if stage.kind in PRUNING]
    return [
        _cell(stages, machine, "calibration", "elimination"),
        "-" if trained else _cell(stages, machine, "search"),
        _cell(other, machine, "search"),
        *(_cell(stages, machine, kind) for kind in ("refit", "evaluation", "training")),
        tables.size(max(stage.host for stage in pruning)),
        tables.size(max(stage.disk for stage in pruning)),
        "" if misfit is None else " ".join(misfit.settings) or f"more memory for {misfit.stage.name}",
    ]


def _cell(stages: list[Stage], machine: Machine, *kinds: str) -> str:
    """The time of the stages of some kinds and the most memory of a device in them, in italics where it has less."""
    these = [stage for stage in stages if stage.kind in kinds]
    if not these:
        return "-"
    most, time = max(stage.device for stage in these), duration(sum(stage.seconds for stage in these))
    if not most:
        return f"{time}, on the host"
    text = f"{time}, {tables.size(most)}"
    return f"*{text}*" if most > machine.limit else text


def page() -> str:
    """What stands between the marks in docs/gpus.md."""
    return f"\n{of_machines()}\n**The paper's recipes**, first stage\n\n{of_recipes()}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gpus.md")
    written = page()
    print(written)
    if parser.parse_args().write:
        before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
        PAGE.write_text(MARK.join((before, written, after)), encoding="utf-8")


if __name__ == "__main__":
    main()
