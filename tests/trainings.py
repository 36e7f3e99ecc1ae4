"""Trainings of a second on the tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pruned
from darwinlm.config.training import DistillationConfig, StreamConfig, TrainConfig, TrainingConfig
from darwinlm.types import Genome

STEPS, BATCH, LENGTH = 12, 4, 32
SHORT = TrainConfig(
    model="MODEL",
    data="DATA",
    out="OUT",
    tokens=STEPS * BATCH * LENGTH,
    verify=False,
    stream=StreamConfig(sequence_length=LENGTH),
    training=TrainingConfig(
        learning_rate=3e-3,
        warmup_steps=2,
        batch_size=BATCH,
        micro_batch_size=2,
        dtype="float32",
        log_every=1,
        evaluate_every=4,
        save_every=4,
        evaluation_tokens=10 * LENGTH,
    ),
)


def short(model: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    """A training of 12 steps; `training`, `stream` and `distillation` take dictionaries of changes."""
    for name in ("training", "stream", "distillation"):
        if name in changes:
            changes[name] = replace(getattr(SHORT, name), **changes[name])
    return replace(SHORT, model=str(model), data=str(data), out=str(out), **changes)


def distilled(model: Path, data: Path, out: Path, teacher: Path, **changes: Any) -> TrainConfig:
    """The same with a teacher, half of the loss."""
    return replace(
        short(model, data, out, **changes), teacher=str(teacher), distillation=DistillationConfig(weight=0.5)
    )


def write_pruned(dense: Path, root: Path) -> Path:
    """An export of a tiny Llama whose second MLP and last attention are gone, the rest smaller."""
    case = pruned.prune(dense, root / "database")
    grid = case.database.grid
    genome = Genome(tuple(grid.highest(i) if i in (3, 4) else 1 + i % 2 for i in range(len(grid.units))))
    return pruned.write_export(case, genome, root / "model")


def losses(history: list[dict[str, Any]]) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in history if "loss" in line]
