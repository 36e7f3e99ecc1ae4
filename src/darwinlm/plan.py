"""What a run will take, from a model's config alone: parameters, seconds, memory and disk, before anything is computed.

Work is counted in floating-point operations and bytes, and divided by rates that are measured on this machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from darwinlm import obs, tables
from darwinlm.budget import parameter_costs
from darwinlm.calibrate import PANEL, SPILL_BYTES
from darwinlm.checkpoint import PACKAGED, WEIGHTS, find_checkpoint, is_finite, skeleton
from darwinlm.config import CalibrationConfig, DatabaseConfig
from darwinlm.device import DTYPES, resolve_dtype
from darwinlm.families import find_family, find_grid, head_dim
from darwinlm.genome import Grid, level_grid, uniform_genome
from darwinlm.plan_search import BlockRates, Work, plan_search
from darwinlm.teacher_logits import LOGIT_BYTES
from darwinlm.train_config import GradualConfig, steps_of
from darwinlm.types import Genome, Unit, UsageError

FLOAT = 4  # bytes of float32, in which statistics and elimination are


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second.

    Attributes:
        products: floating-point operations of large float32 matrix products.
        forward: the same in the precision of the forward pass.
        solves: floating-point operations of the level solves.
        sweeps: matrix entries passed over between two products of an elimination of channels.
        fills: bytes of fresh memory that are written, as by every operation between two products.
        loads: bytes of stored weights that are read, checked and converted.
        disk: bytes written.
    """

    products: float
    forward: float
    solves: float
    sweeps: float
    fills: float
    loads: float
    disk: float


@dataclass(frozen=True)
class Plan:
    """What the dense model has, what is left of it, and what the database takes.

    Attributes:
        grid: its units and their levels.
        even: the uniform genome at the target level.
        parameters: of the dense model, embeddings in.
        target_parameters: of the uniform model at the target level as it is exported, which is a run's budget.
        calibration_seconds, elimination_seconds: of the whole model.
        memory_bytes: the most that is held at a time, beside the interpreter with torch.
        disk_bytes: the database.
        spilled_bytes: activations in a temporary file.
    """

    grid: Grid
    even: Genome
    parameters: int
    target_parameters: int
    calibration_seconds: float
    elimination_seconds: float
    memory_bytes: int
    disk_bytes: int
    spilled_bytes: int


def plan(
    config: PretrainedConfig,
    calibration: CalibrationConfig,
    database: DatabaseConfig,
    target_level: float,
    rates: Rates,
) -> Plan:
    """Work out what a run on a model of this config takes.

    Args:
        rates: measured with the precision of `calibration`.

    Raises:
        UsageError: if the family is not supported or a setting cannot be used.
    """
    model = skeleton(config)
    grid = find_grid(model, config, database)
    units = grid.units
    genome = uniform_genome(grid, target_level, database.levels, Random(0))
    size = sum(parameter.numel() for parameter in model.parameters())
    dtype = DTYPES[calibration.dtype]
    stored = (config.dtype or torch.float32).itemsize
    tokens, hidden = calibration.tokens, config.hidden_size
    disk = [_level_bytes(grid, index, hidden, stored) for index in range(len(units))]
    stream = tokens * hidden * dtype.itemsize
    return Plan(
        grid=grid,
        even=genome,
        parameters=size,
        target_parameters=parameter_costs(grid, size).of(genome),
        calibration_seconds=stored * config.vocab_size * hidden / rates.loads
        + sum(_measured(unit, config, calibration, rates) for unit in units),
        elimination_seconds=sum(
            _eliminated(grid, index, hidden, rates) + disk[index] / rates.disk for index in range(len(units))
        ),
        memory_bytes=stream * (stream <= SPILL_BYTES) + _working_bytes(units, config, calibration, dtype),
        disk_bytes=sum(disk),
        spilled_bytes=stream * (stream > SPILL_BYTES),
    )


def _columns(unit: Unit) -> int:
    return unit.structures * unit.structure_width


def _measured(unit: Unit, config: PretrainedConfig, calibration: CalibrationConfig, rates: Rates) -> float:
    """Seconds to load a unit, and of its forward pass and its Hessian."""
    tokens, d, hidden = calibration.tokens, _columns(unit), config.hidden_size
    operations = 2 * tokens * unit.parameters(0)
    # Tensors a token between two residual streams: norm, sum, output; then gate, up, activation and product, or
    # queries, keys and values, the former two turned, and what is attended to.
    entries = 5 * hidden + 4 * d
    if unit.kind == "attention":
        width = config.num_attention_heads * head_dim(config)
        operations += 4 * tokens * calibration.sequence_length * width  # scores and values
        entries = 5 * hidden + 7 * width + 6 * config.num_key_value_heads * head_dim(config)
    stored = (config.dtype or torch.float32).itemsize * unit.parameters(0)
    return (
        stored / rates.loads
        + operations / rates.forward
        + tokens * d * (d + PANEL) / rates.products
        + (FLOAT * d * d + DTYPES[calibration.dtype].itemsize * tokens * entries) / rates.fills
    )


def _eliminated(grid: Grid, index: int, d_out: int, rates: Rates) -> float:
    """Seconds of a unit's elimination and of its level solves."""
    unit = grid.units[index]
    swept = _columns(unit) ** 2 / rates.sweeps if unit.structure_width == 1 else 0.0
    solved = _solve_operations(grid, index, d_out) / rates.solves
    return _elimination_operations(unit, d_out) / rates.products + swept + solved


def _elimination_operations(unit: Unit, d_out: int) -> int:
    """The inverse, `W^T W`, and three symmetric updates a column."""
    d = _columns(unit)
    return 2 * d**3 + d_out * d**2


def _solve_operations(grid: Grid, index: int, d_out: int) -> int:
    """One Cholesky factor, and for every level that keeps `k` columns a product and a triangular solve."""
    unit, d = grid.units[index], _columns(grid.units[index])
    kept = [(unit.structures - removed) * unit.structure_width for removed in grid.removed[index][1:-1]]
    return d**3 // 3 + sum(d_out * (2 * k * (d - k) + k * k) for k in kept)


def _level_bytes(grid: Grid, index: int, d_out: int, stored: int) -> int:
    unit = grid.units[index]
    return sum(
        (unit.structures - removed) * unit.structure_width * d_out * stored for removed in grid.removed[index][1:-1]
    )


def _working_bytes(
    units: tuple[Unit, ...], config: PretrainedConfig, calibration: CalibrationConfig, dtype: torch.dtype
) -> int:
    """The most that a block holds: in its forward pass, or in the elimination of its larger unit."""
    first = [unit for unit in units if unit.block == 0]
    squares = [FLOAT * _columns(unit) ** 2 for unit in first]
    weights = [FLOAT * _columns(unit) * config.hidden_size for unit in first]
    block = dtype.itemsize * sum(unit.parameters(0) for unit in first)
    in_flight = calibration.batch_size * calibration.sequence_length * FLOAT * 4 * max(map(_columns, first))
    forward = block + sum(squares) + in_flight
    # The Hessian as summed, damped and sorted, its inverse, the Gram matrix, and a Cholesky factor.
    return max(forward, 6 * max(squares) + 2 * max(weights))


def measure_rates(dtype: torch.dtype = torch.float32, size: int = 3072) -> Rates:
    """A few seconds of the real work on a small matrix tell the rates."""
    products = _product_rate(torch.float32, size)
    forward = products if dtype == torch.float32 else _product_rate(dtype, size)
    d_out = size // 3
    unit = Unit("plan", 0, "mlp", "", (), 1, size, 0, 0)
    grid = level_grid((unit,), 10, 1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, size, generator=generator)
    inputs = torch.randn(2 * size, size, generator=generator)
    hessian = obs.dampen(inputs.T @ inputs / size)
    start = time.perf_counter()
    elimination = obs.eliminate(unit, weight, hessian)
    swept = time.perf_counter() - start - _elimination_operations(unit, d_out) / products
    solving = _seconds(lambda: obs.solve_levels(unit, weight, hessian, elimination, grid.removed[0]))
    return Rates(
        products=products,
        forward=forward,
        solves=_solve_operations(grid, 0, d_out) / solving,
        sweeps=size**2 / max(swept, 1e-3),
        fills=_fill_rate(),
        loads=_load_rate(dtype),
        disk=_disk_rate(),
    )


def block_rates(config: PretrainedConfig, dtype: torch.dtype, length: int = 512, sequences: int = 4) -> BlockRates:
    """Measured on a model's first block: search and training are made of it. Weights that train are float32."""
    decoder, weights = _first_block(config, dtype)
    stream = torch.ones(sequences, length, config.hidden_size, dtype=dtype)
    operations = 2 * sum(weight.numel() for weight in weights) * length
    with torch.inference_mode():
        forward = sequences * operations / _seconds(lambda: decoder(inputs_embeds=stream, use_cache=False))
    decoder, weights = _first_block(config, torch.float32)
    sequence = torch.ones(1, length, config.hidden_size, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = decoder(inputs_embeds=sequence, use_cache=False).last_hidden_state
        states.backward(torch.ones_like(states))
        for weight in weights:
            weight.grad = None

    return BlockRates(forward, 3 * operations / _seconds(step))


def _first_block(config: PretrainedConfig, dtype: torch.dtype) -> tuple[nn.Module, list[nn.Parameter]]:
    """A decoder of one block and the last norm, and the block's weights."""
    model, family = skeleton(config, dtype), find_family(config)
    blocks: Any = model.get_submodule(family.blocks)
    del blocks[1:]
    for module in (blocks, model.get_submodule(family.final_norm)):
        module.to_empty(device="cpu")
        for weight in module.parameters():
            nn.init.constant_(weight, 1 / config.hidden_size)  # what memory holds may be no numbers, which are slow
    return model.get_decoder(), list(blocks.parameters())


def _product_rate(dtype: torch.dtype, size: int) -> float:
    matrix = torch.randn(size, size).to(dtype)
    return 2 * size**3 / _seconds(lambda: matrix @ matrix)


def _fill_rate(count: int = 1 << 25) -> float:
    numbers = torch.ones(count)
    return numbers.nbytes / _seconds(lambda: numbers * 2)


def _load_rate(dtype: torch.dtype, count: int = 1 << 26) -> float:
    weight = torch.ones(count, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / WEIGHTS
        save_file({"weight": weight}, file)

        def load() -> torch.Tensor:
            with safe_open(file, framework="pt") as opened:
                tensor = opened.get_tensor("weight")
            assert is_finite(tensor)
            return tensor.to(dtype)

        return weight.nbytes / _seconds(load)


def _disk_rate(count: int = 1 << 28) -> float:
    with tempfile.NamedTemporaryFile() as file:
        content = os.urandom(1 << 20) * (count >> 20)
        return count / _seconds(lambda: (file.write(content), file.flush()))


def _seconds(work: Callable[[], object]) -> float:
    """The shorter of two goes: the first one warms up."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


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


@dataclass(frozen=True)
class TrainingPlan:
    """What a training takes.

    Attributes:
        work: of the student in training, and of the teacher forwards.
        memory_bytes: float32 weights, gradients and both moments of AdamW, over all processes, without activations.
        teacher_bytes: the dense model in each process; none where its logits are read from the disk.
        disk_bytes: tokens, the teacher's top-k logits, and the two checkpoints that are kept.
    """

    steps: int
    work: Work
    memory_bytes: int
    teacher_bytes: int
    disk_bytes: int


def plan_training(parameters: int, teacher_parameters: int, tokens: int, config: GradualConfig) -> TrainingPlan:
    """Six operations a weight and token, two more where activations are computed again, two a weight of the teacher."""
    student = parameters * (8 if config.training.gradient_checkpointing else 6)
    distillation = config.distillation
    taught = distillation.weight > 0  # online or once to the disk: a pass either way
    logits = LOGIT_BYTES * distillation.top_k * tokens if taught else 0
    return TrainingPlan(
        steps=steps_of(tokens, config.training, config.stream),
        work=Work(2.0 * teacher_parameters * tokens if taught else 0.0, float(tokens) * student),
        memory_bytes=4 * FLOAT * parameters,
        teacher_bytes=0 if distillation.top_k else DTYPES["bfloat16"].itemsize * teacher_parameters,
        disk_bytes=FLOAT * tokens + logits + 2 * 3 * FLOAT * parameters,
    )


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
