"""`darwinlm plan`: what a run or a recipe will take on this machine, from a model's config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from huggingface_hub import hf_hub_download
from transformers import PretrainedConfig

from darwinlm.commands.plan.rates import BlockRates, block_rates, measure_rates
from darwinlm.commands.plan.work import Plan, plan, plan_search, plan_training
from darwinlm.config.checks import expect_level, expect_one_size
from darwinlm.config.training import GradualConfig, GradualStage
from darwinlm.genome import Grid
from darwinlm.model.adapter import base_of
from darwinlm.model.checkpoint import PACKAGED, find_checkpoint
from darwinlm.model.families import find_family, find_grid
from darwinlm.model.hub import HUB_ERRORS
from darwinlm.model.reading import read_config, skeleton
from darwinlm.model.size import parameter_count
from darwinlm.report import tables
from darwinlm.runtime.device import DTYPES, resolve_dtype
from darwinlm.runtime.names import hub_name
from darwinlm.runtime.scratch import scratch_directory
from darwinlm.search.budget import Target, limit_of
from darwinlm.search.costs import counted_costs, parameter_costs, shared_parameter_costs
from darwinlm.search.memory import HEADROOM, SearchMemory, count_memory
from darwinlm.search.uniform import ceilings, uniform_genome
from darwinlm.types import UsageError

Row = tuple[str, str]  # what is counted, and how much it is


def find_config(model: str) -> PretrainedConfig:
    """Return the config that a user means by `MODEL_OR_CONFIG`: a model, a directory with a config, or the file itself.

    Raises:
        UsageError: if there is none.
    """
    path = Path(model).expanduser()
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


def plan_command(config: GradualConfig, target: str | None = None, target_level: float | None = None) -> None:
    """Print what a recipe takes on this machine, or one pruning to a size, and what is left of the model at each level.

    Raises:
        UsageError: as `find_config` and `_show`, if a target cannot be read or reached, or if two are given.
    """
    expect_one_size(target, target_level)
    model = find_config(config.model)
    if target is not None:
        target_level = _level_of(Target.parse(target), model, config)
    if target_level is not None:
        expect_level(target_level, config.database.levels)
        config = replace(config, stages=(GradualStage(target_level, 0),))
    _show(model, config)


def _show(model: PretrainedConfig, config: GradualConfig) -> None:
    """Print what a recipe takes on this machine: the sizes, the database of the dense model, then every stage.

    The database of a later stage takes less than that of the first, and is not counted.

    Raises:
        UsageError: if the model's family is not supported, or a setting cannot be used.
    """
    calibration, database = config.calibration, config.database
    find_family(skeleton(model))  # before seconds are spent on rates
    rates = measure_rates(DTYPES[calibration.dtype])
    block = block_rates(model, resolve_dtype("auto", torch.device("cpu")))
    plans = [plan(model, calibration, database, stage.target_level, rates) for stage in config.stages]
    rows = [*_size_rows(plans[0].grid, plans[0].parameters, model, config), *_database_rows(plans[0], config)]
    for stage, at in zip(config.stages, plans, strict=True):
        rows += _stage_rows(stage, at, model, block, config)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


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


def _level_of(target: Target, model: PretrainedConfig, config: GradualConfig) -> float:
    """Return the lowest uniform level, to a hundredth, at which a model costs no more than the target.

    Raises:
        UsageError: if the target has to be measured, or no level in the database is as small.
    """
    levels = config.database.levels
    whole = skeleton(model)
    grid = find_grid(whole, model, config.database)
    if target.measure == "latency":
        raise UsageError("--target: expected params, flops or kv-cache, which a plan can count, found latency")
    context, bytes_each = config.calibration.sequence_length, (model.dtype or torch.float32).itemsize
    costs = counted_costs(target.measure, grid, model, parameter_count(whole), context, bytes_each)
    limit = limit_of(target, costs, grid, ceilings(grid)).main.limit
    for hundredths in range(1, 100 * levels):
        level = hundredths / 100
        if costs.of(uniform_genome(grid, level, levels, Random(config.seed))) <= limit:
            return level
    raise UsageError(
        f"--target: expected a size that a uniform model has below level {levels}, found less; give another value"
    )


def _database_rows(first: Plan, config: GradualConfig) -> list[Row]:
    """Return the rows for measuring the dense model and building its database."""
    return [
        (f"calibration, {config.calibration.tokens:,} tokens", _duration(first.calibration_seconds)),
        ("elimination", _duration(first.elimination_seconds)),
        ("peak memory", f"{tables.size(first.memory_bytes)} beside the interpreter"),
        ("database on disk", tables.size(first.disk_bytes)),
        ("activations on disk", tables.size(first.spilled_bytes)),
    ]


def _stage_rows(
    stage: GradualStage, at: Plan, model: PretrainedConfig, block: BlockRates, config: GradualConfig
) -> list[Row]:
    """Return the rows for the search, the refit and the training of a stage."""
    name = f"level {stage.target_level:g}"
    length = config.calibration.sequence_length
    search = plan_search(at.parameters, model, at.grid, at.uniform, config.search, config.refit, length)
    parts = {
        "the start": search.start,
        f"{config.search.generations} generations": search.generations,
        "refit": search.refit,
    }
    seconds = ", ".join(f"{part} {_duration(work.seconds(block))}" for part, work in parts.items())
    held = count_memory(at.parameters, model, at.grid, at.uniform, config.search, config.refit, length, torch.bfloat16)
    rows = [
        (f"pruned to {name}", tables.parameters(at.target_parameters)),
        (f"  its search at {name}", seconds),
        (f"  its memory on a GPU at {name}", _memory(held)),
    ]
    if not stage.tokens:
        return rows
    training = plan_training(at.target_parameters, at.parameters, stage.tokens, config)
    teacher = f", the teacher's {tables.size(training.teacher_bytes)} in each" if training.teacher_bytes else ""
    received = f"{tables.size(training.communication_bytes)} to each process for every micro-batch"
    return [
        *rows,
        (
            f"training at {name}, {stage.tokens:,} tokens",
            f"{training.steps:,} steps, {training.work.forward + training.work.training:.1e} operations, "
            f"{_duration(training.work.seconds(block))} on this machine",
        ),
        (
            f"  its memory at {name}",
            f"{tables.size(training.memory_bytes)} over all processes{teacher}, beside activations",
        ),
        *([(f"  its communication at {name}", received)] if training.communication_bytes else []),
        (f"  its disk at {name}", tables.size(training.disk_bytes)),
    ]


def _memory(held: SearchMemory) -> str:
    """What a search and its refit hold in bfloat16, with what an allocator wastes, and what more would save time."""
    least, resident, refit = (tables.size(count / HEADROOM) for count in (held.search, held.resident, held.refitting))
    search = least if held.training else f"{least} (with all blocks there {resident})"
    return f"{search} for the search, {refit} for the refit; {tables.size(held.caches / HEADROOM)} more save time"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
