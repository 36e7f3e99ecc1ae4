"""`darwinlm plan`: what a run or a recipe will take on a machine, from a model's config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from huggingface_hub import hf_hub_download
from transformers import PretrainedConfig

from darwinlm.commands.plan.devices import machine_of
from darwinlm.commands.plan.fits import first_misfit, summary
from darwinlm.commands.plan.shapes import shape_of
from darwinlm.commands.plan.stages import Pruning, Stage, stages_of
from darwinlm.config.checks import expect_level, expect_one_size
from darwinlm.config.run import ServingConfig
from darwinlm.config.training import GradualConfig, GradualStage, PlanConfig
from darwinlm.export.groups import group_row
from darwinlm.genome import Grid
from darwinlm.model.adapter import base_of
from darwinlm.model.checkpoint import PACKAGED, find_checkpoint
from darwinlm.model.families import find_family, find_grid
from darwinlm.model.hub import HUB_ERRORS
from darwinlm.model.reading import read_config, skeleton
from darwinlm.model.size import parameter_count
from darwinlm.report import tables
from darwinlm.runtime.names import hub_name
from darwinlm.runtime.scratch import scratch_directory
from darwinlm.search.budget import TIMED, Target, limit_of
from darwinlm.search.costs import counted_costs, parameter_costs, shared_parameter_costs
from darwinlm.search.uniform import ceilings, uniform_genome
from darwinlm.types import UsageError

Row = tuple[str, str]  # what is counted, and how much it is


def find_config(model: str) -> PretrainedConfig:
    """Return the config that a user means by `MODEL_OR_CONFIG`: a model, a directory with a config, or the file itself.

    Raises:
        UsageError: if there is none.
    """
    path = Path(model).expanduser()
    shape = None if path.exists() else shape_of(model)
    if shape is not None:
        return shape
    if model in PACKAGED or path.suffix == ".gguf":
        with scratch_directory("plan") as directory:
            return find_checkpoint(model, Path(directory)).config
    name = hub_name(model)
    if name is None:
        base = base_of(path)
        return find_config(base) if base else read_config(path)
    try:
        file = hf_hub_download(name.repository, "config.json", revision=name.revision)
    except HUB_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"no config at {model}: expected a model, a directory with config.json, or such a file ({reason}); check it"
        ) from None
    return read_config(Path(file))


def plan_command(
    config: GradualConfig, served: PlanConfig, target: str | None = None, target_level: float | None = None
) -> None:
    """Print what a recipe takes on a machine, or one pruning to a size, and what is left of the model at each level.

    Raises:
        UsageError: as `find_config` and `_show`, if a target cannot be read or reached, or if two are given.
    """
    expect_one_size(target, target_level)
    model = find_config(config.model)
    if target is not None:
        target_level = _level_of(target, model, config, served.serving)
    if target_level is not None:
        expect_level(target_level, config.database.levels)
        config = replace(config, stages=(GradualStage(target_level, 0),))
    _show(model, config)


def _show(model: PretrainedConfig, config: GradualConfig) -> None:
    """Print what a recipe takes on a machine: the sizes, then every stage, and which of them does not fit.

    Raises:
        UsageError: if the model's family is not supported, or a setting cannot be used.
    """
    find_family(skeleton(model))  # before seconds are spent on rates
    machine = machine_of(config.device, model, config.calibration.dtype)
    stages = stages_of(model, config, machine)
    prunings = [Pruning.of(model, config, stage, machine) for stage in config.stages]
    first = prunings[0].at
    rows = [*_size_rows(first.grid, first.parameters, model, config), *map(_training_row, prunings)]
    rows.append(("4-bit weights, compressed-tensors", group_row(first.grid, model.hidden_size)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        if value:
            print(f"{name:{width}}  {value}")
    print()
    print(f"estimates for {machine}, by counting; memory is beside the interpreter and its libraries")
    tables.show(TITLES, [[cells(stage) for stage in stages]])
    print(f"in all {duration(sum(stage.seconds for stage in stages))}")
    print(summary(first_misfit(model, config, machine, stages), machine))


TITLES = ("stage", "time", "on each device", "on the host", "disk", "setting")


def cells(stage: Stage) -> tuple[str, ...]:
    """The cells of a stage's row in a table with `TITLES`."""
    sizes = (tables.size(size) if size else "-" for size in (stage.device, stage.host, stage.disk))
    return (stage.name, duration(stage.seconds), *sizes, stage.note)


def _training_row(this: Pruning) -> Row:
    """The row for the size and the training of a stage of the recipe."""
    level, pruned = f"{this.stage.target_level:g}", tables.parameters(this.at.target_parameters)
    if not this.stage.tokens:
        return f"pruned to level {level}", pruned
    counted = this.training
    received = f"; {tables.size(counted.communication_bytes)} to each process for every micro-batch"
    return (
        f"pruned to level {level}",
        f"{pruned}, trained on {this.stage.tokens:,} tokens in {counted.steps:,} steps, "
        f"{counted.work.forward + counted.work.training:.1e} operations"
        + (received if counted.communication_bytes else ""),
    )


def duration(seconds: float) -> str:
    """A time as people say it, in one unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 3600 * 72 else f"{seconds / 86400:.0f} days"


def _size_rows(grid: Grid, parameters: int, model: PretrainedConfig, config: GradualConfig) -> list[Row]:
    """Return a row for each level: parameters of the uniform model, the share that is kept of the dense one, and bytes.

    Where an export repeats K and V, they are those of the export, and the paper's count stands beside them.
    """
    costs, levels = parameter_costs(grid, parameters), config.database.levels
    shared = shared_parameter_costs(grid, parameters)
    each = (model.dtype or torch.float32).itemsize
    rows = [("parameters", f"{tables.parameters(parameters)}, {tables.size(each * parameters)}")]
    for level in range(1, levels):
        genome = uniform_genome(grid, float(level), levels, Random(0))
        left, counted = costs.of(genome), shared.of(genome)
        size = f"{tables.parameters(left)}, {tables.size(each * left)}, params={left / parameters:.3f}"
        if counted < left:
            size += f"; {tables.parameters(counted)} where heads that are left share K and V"
        if left >= parameters:
            size += "; refused, for it is no smaller than the dense model"
        rows.append((f"at level {level} of {levels}, {config.database.structure}", size))
    return rows


def _level_of(text: str, model: PretrainedConfig, config: GradualConfig, serving: ServingConfig) -> float:
    """Return the lowest uniform level, to a hundredth, at which a model costs no more than the targets.

    Raises:
        UsageError: if a target has to be measured, or no level in the database is as small.
    """
    levels, targets = config.database.levels, Target.parse_all(text)
    whole = skeleton(model)
    grid = find_grid(whole, model, config.database)
    timed = [target.measure for target in targets if target.measure in TIMED]
    if timed:
        raise UsageError(
            f"--target: expected params, flops, kv-cache or memory, which a plan can count, found {timed[0]}; "
            "darwinlm compress measures it"
        )
    sizes = parameter_count(whole), config.calibration.sequence_length, (model.dtype or torch.float32).itemsize
    costs = [counted_costs(target.measure, grid, model, *sizes, serving) for target in targets]
    budget = limit_of(targets, costs, grid, ceilings(grid))
    for hundredths in range(1, 100 * levels):
        level = hundredths / 100
        if not budget.exceeded(uniform_genome(grid, level, levels, Random(config.seed))):
            return level
    raise UsageError(
        f"--target: expected a size that a uniform model has below level {levels}, found less; give another value"
    )
