"""What the database, a search, the refit and a training will take: operations, memory and disk, by counting."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from transformers import PretrainedConfig

from darwinlm.commands.plan.rates import FLOAT, BlockRates, Rates, columns, elimination_operations, solve_operations
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, RefitConfig, SearchConfig
from darwinlm.config.training import GradualConfig, steps_of
from darwinlm.database.calibrate import PANEL, SPILL_BYTES
from darwinlm.genome import Grid, prunable_parameters
from darwinlm.model.families import find_grid, head_dim
from darwinlm.model.reading import skeleton
from darwinlm.runtime.device import DTYPES
from darwinlm.search.costs import parameter_costs
from darwinlm.search.sensitivity import measured_levels
from darwinlm.search.uniform import uniform_genome
from darwinlm.training.teacher_logits import LOGIT_BYTES
from darwinlm.types import Genome, SelectionStage, Unit


@dataclass(frozen=True)
class Work:
    """Floating-point operations of forward passes and of training steps, which run at different rates."""

    forward: float
    training: float = 0.0

    def seconds(self, rates: BlockRates) -> float:
        """Return the seconds that the work takes at these rates."""
        return self.forward / rates.forward + self.training / rates.training


@dataclass(frozen=True)
class SearchPlan:
    """The work that follows the database. Attention scores are not counted.

    Attributes:
        start: the work before the first generation.
        generations: the work of all generations. Blocks that mutants share with their parent are counted for each
            mutant, although they are computed once.
        refit: the work of refitting the searched and the uniform model.
    """

    start: Work
    generations: Work
    refit: Work


def plan_search(
    parameters: int,
    config: PretrainedConfig,
    grid: Grid,
    uniform: Genome,
    search: SearchConfig,
    refit: RefitConfig,
    length: int,
) -> SearchPlan:
    """Count the work of a search and of its refits.

    A forward pass takes two operations for each weight and token. A backward pass takes two for the hidden states, and
    two for each weight that trains.

    Args:
        parameters: parameters of the dense model, embeddings included.
        uniform: a genome of the size that is searched for.
        length: tokens in a sequence.
    """
    blocks, pruned = (prunable_parameters(grid, genome) for genome in (grid.dense(), uniform))
    head = config.vocab_size * config.hidden_size
    # An embedding of its own multiplies nothing.
    dense = parameters - (0 if config.tie_word_embeddings else head)
    small = dense - blocks + pruned
    consumers = sum(
        (unit.structures - grid.removed[index][uniform.levels[index]]) * unit.structure_width * config.hidden_size
        for index, unit in enumerate(grid.units)
    )
    trained = consumers if search.trains == "consumers" else pruned
    teacher = dense if search.loss == "distillation" else 0
    scores, steps, before, candidates = 0.0, 0.0, 0, search.offspring
    for stage, added in zip(search.stages, search.added_tokens(length), strict=True):
        again = stage.training_tokens > 0  # a candidate that has trained is another one
        read = stage.fitness_tokens if again else added
        scores += candidates * 2.0 * small * read
        if search.metric == "kl":  # the dense model's logits, for each candidate in training or once for all
            scores += (candidates if again else 1) * 2.0 * head * read
        steps += candidates * (4.0 * small + 2.0 * trained) * (stage.training_tokens - before)
        candidates, before = stage.survivors, stage.training_tokens
    return SearchPlan(
        start=Work(_start(grid, dense, blocks, small, search) + 2.0 * teacher * before),
        generations=Work(search.generations * scores, search.generations * steps),
        refit=Work(2 * refit.tokens * 2.0 * dense, 2 * refit.tokens * (4.0 * small + 2.0 * consumers)),
    )


def _start(grid: Grid, dense: int, blocks: int, small: int, search: SearchConfig) -> float:
    """Return the operations before the first generation.

    They are those of the dense model on all tokens, of sensitivities with the dense prefix reused, and of the starts in
    the last stage.
    """
    last: SelectionStage = search.stages[-1]
    operations, starts = 2.0 * dense * last.fitness_tokens, 1
    if search.start == "sensitivity":
        count, starts = 1 + max(unit.block for unit in grid.units), 2
        for index, unit in enumerate(grid.units):
            rest = dense - blocks * unit.block / count
            operations += 2.0 * rest * len(measured_levels(grid.highest(index))) * search.stages[0].fitness_tokens
    return operations + starts * 2.0 * small * last.fitness_tokens


@dataclass(frozen=True)
class Plan:
    """The size of the dense model and of a uniform one, and what building the database takes.

    Attributes:
        grid: the model's units and their levels.
        uniform: the uniform genome at the target level.
        parameters: parameters of the dense model, embeddings included.
        target_parameters: parameters of the uniform model at the target level, as it is exported.
        calibration_seconds, elimination_seconds: the seconds that each takes for the whole model.
        memory_bytes: the most bytes that are held at a time, without the interpreter and torch.
        disk_bytes: the size of the database.
        spilled_bytes: the size of the activations that are kept in a temporary file.
    """

    grid: Grid
    uniform: Genome
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
    """Return what a run on a model of this config takes.

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
        uniform=genome,
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


def _measured(unit: Unit, config: PretrainedConfig, calibration: CalibrationConfig, rates: Rates) -> float:
    """Return the seconds that loading a unit, its forward pass and its Hessian take."""
    tokens, d, hidden = calibration.tokens, columns(unit), config.hidden_size
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
    """Return the seconds that a unit's elimination and its level solves take."""
    unit = grid.units[index]
    swept = columns(unit) ** 2 / rates.sweeps if unit.structure_width == 1 else 0.0
    solved = solve_operations(grid, index, d_out) / rates.solves
    return elimination_operations(unit, d_out) / rates.products + swept + solved


def _level_bytes(grid: Grid, index: int, d_out: int, stored: int) -> int:
    """Return the bytes that a unit's levels take in the database."""
    unit = grid.units[index]
    return sum(
        (unit.structures - removed) * unit.structure_width * d_out * stored for removed in grid.removed[index][1:-1]
    )


def _working_bytes(
    units: tuple[Unit, ...], config: PretrainedConfig, calibration: CalibrationConfig, dtype: torch.dtype
) -> int:
    """Return the most bytes that a block needs, in its forward pass or in the elimination of its larger unit."""
    first = [unit for unit in units if unit.block == 0]
    squares = [FLOAT * columns(unit) ** 2 for unit in first]
    weights = [FLOAT * columns(unit) * config.hidden_size for unit in first]
    block = dtype.itemsize * sum(unit.parameters(0) for unit in first)
    in_flight = calibration.batch_size * calibration.sequence_length * FLOAT * 4 * max(map(columns, first))
    forward = block + sum(squares) + in_flight
    # The Hessian as summed, damped and sorted, its inverse, the Gram matrix, and a Cholesky factor.
    return max(forward, 6 * max(squares) + 2 * max(weights))


@dataclass(frozen=True)
class TrainingPlan:
    """What a training takes.

    Attributes:
        work: the student's training, and the teacher's forward passes.
        memory_bytes: the size of float32 weights, gradients and both moments of AdamW, over all processes; activations
            are not counted.
        teacher_bytes: the size of the dense model in each process; 0 where its logits are read from the disk.
        disk_bytes: the size of the tokens, of the teacher's top-k logits, and of the two checkpoints that are kept.
        communication_bytes: what each process receives for every micro-batch where weights are sharded: all weights in
            bfloat16, forwards and backwards, and gradients in float32. 0 where they are not.
    """

    steps: int
    work: Work
    memory_bytes: int
    teacher_bytes: int
    disk_bytes: int
    communication_bytes: int


def plan_training(parameters: int, teacher_parameters: int, tokens: int, config: GradualConfig) -> TrainingPlan:
    """Return what a training takes.

    It is six operations for each weight and token, eight where activations are computed again, and two for each weight
    of the teacher.
    """
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
        communication_bytes=(2 * DTYPES["bfloat16"].itemsize + FLOAT) * parameters if config.training.fsdp else 0,
    )
