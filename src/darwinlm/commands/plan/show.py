"""`darwinlm plan`: what a run or a recipe will take on this machine, from a model's config alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from darwinlm.commands.plan.rates import block_rates, measure_rates
from darwinlm.commands.plan.work import plan, plan_search, plan_training
from darwinlm.config.training import GradualConfig
from darwinlm.model.checkpoint import PACKAGED, find_checkpoint
from darwinlm.model.families import find_family
from darwinlm.report import tables
from darwinlm.runtime.device import DTYPES, resolve_dtype
from darwinlm.types import UsageError


def find_config(model: str) -> PretrainedConfig:
    """The config that a user means by `MODEL_OR_CONFIG`: a model, a directory with a config, or the file itself.

    Raises:
        UsageError: if there is none.
    """
    path = Path(model).expanduser()
    if model in PACKAGED or path.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as directory:
            return find_checkpoint(model, Path(directory)).config
    try:
        return AutoConfig.from_pretrained(path if path.exists() else model)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"no config at {model}: expected a model, a directory with config.json, or such a file ({reason}); check it"
        ) from None


def show(config: GradualConfig) -> None:
    """Print what a recipe takes on this machine: the database of the dense model, then every stage.

    The database of a later stage takes less than that of the first, and is not counted.

    Raises:
        UsageError: as `find_config` and `plan`.
    """
    model, calibration, database = find_config(config.model), config.calibration, config.database
    find_family(model)  # before seconds are spent on rates
    rates = measure_rates(DTYPES[calibration.dtype])
    block = block_rates(model, resolve_dtype("auto", torch.device("cpu")))
    plans = [plan(model, calibration, database, stage.target_level, rates) for stage in config.stages]
    found = plans[0]
    rows = {
        "parameters": tables.parameters(found.parameters),
        f"calibration, {calibration.tokens:,} tokens": _duration(found.calibration_seconds),
        "elimination": _duration(found.elimination_seconds),
        "peak memory": f"{tables.size(found.memory_bytes)} beside the interpreter",
        "database on disk": tables.size(found.disk_bytes),
        "activations on disk": tables.size(found.spilled_bytes),
    }
    for stage, at in zip(config.stages, plans, strict=True):
        rows[f"at level {stage.target_level:g} of {database.levels}, {database.structure}"] = tables.parameters(
            at.target_parameters
        )
        search = plan_search(found.parameters, model, at.grid, at.even, config.search, config.refit)
        work = {
            "the start": search.start,
            f"{config.search.generations} generations": search.generations,
            "refit": search.refit,
        }
        rows[f"  its search at level {stage.target_level:g}"] = ", ".join(
            f"{name} {_duration(part.seconds(block))}" for name, part in work.items()
        )
        if stage.tokens:
            training = plan_training(at.target_parameters, found.parameters, stage.tokens, config)
            rows[f"training at level {stage.target_level:g}, {stage.tokens:,} tokens"] = (
                f"{training.steps:,} steps, {training.work.forward + training.work.training:.1e} operations, "
                f"{_duration(training.work.seconds(block))} on this machine"
            )
            rows[f"  its memory at level {stage.target_level:g}"] = (
                f"{tables.size(training.memory_bytes)} over all processes"
                + (f", the teacher's {tables.size(training.teacher_bytes)} in each" if training.teacher_bytes else "")
                + ", beside activations"
            )
            rows[f"  its disk at level {stage.target_level:g}"] = tables.size(training.disk_bytes)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
