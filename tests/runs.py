"""Runs of seconds on the tiny models, from Python and from the command line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from darwinlm.cli import main
from darwinlm.config.run import (
    CalibrationConfig,
    DatabaseConfig,
    EvaluationConfig,
    RefitConfig,
    RunConfig,
    SearchConfig,
)
from darwinlm.runtime.files import read_lines
from darwinlm.types import SelectionStage

SHORT = RunConfig(
    model="MODEL",
    data="DATA",
    out="OUT",
    target_level=2.0,
    calibration=CalibrationConfig(tokens=1024, sequence_length=32, batch_size=4),
    database=DatabaseConfig(levels=4, granularity=8),
    search=SearchConfig(
        generations=2,
        offspring=3,
        stages=(
            SelectionStage(survivors=2, fitness_tokens=64),
            SelectionStage(survivors=1, fitness_tokens=128, training_tokens=64),
        ),
        learning_rate=1e-3,
    ),
    refit=RefitConfig(tokens=128, batch_size=2),
    evaluation=EvaluationConfig(
        tokens=256, prompts=("Hello there",), continuation_tokens=4, speed_tokens=16, decode_tokens=4, repeats=1
    ),
    verify=False,
)


def short(model: Path, data: Path, out: Path, **changes: Any) -> RunConfig:
    """A run of every stage, with training before selection, in about a second."""
    size = {"target_level": None} if "target" in changes else {}
    return replace(SHORT, model=str(model), data=str(data), out=str(out), **size, **changes)


def command(config: Any, *flags: str, name: str = "compress") -> list[str]:
    """The arguments that mean `config`; its settings are in a YAML file beside the run directory."""
    settings = json.loads(json.dumps(asdict(config)))
    model, data, out, verify = (settings.pop(key) for key in ("model", "data", "out", "verify"))
    # Named by its text, so that two settings never share a file.
    text = yaml.safe_dump(settings)
    recipe = next(parent for parent in Path(out).parents if parent.is_dir()) / f"recipe-{abs(hash(text))}.yaml"
    recipe.write_text(text)
    check = "--verify" if verify else "--no-verify"
    return [name, model, "--data", data, "--out", out, "--config", str(recipe), check, *flags]


def call(*arguments: str) -> int:
    """The exit code of a command, run in this process."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)


def process(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a command in a process of its own."""
    # One thread: several are slower on models this small, by far when other processes compete for the cores.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "darwinlm", *arguments], environment


def history(run: Path) -> list[dict[str, Any]]:
    """The generations of a run's search, without how long they took."""
    _, lines = read_lines(run / "search" / "history.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def files(run: Path) -> dict[str, bytes]:
    """All files of a run directory by name, but its lock."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
