"""What the database, a search, the refit and a training will take: operations, memory and disk, by counting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import nn
from transformers import PretrainedConfig

from darwinlm.commands.plan.rates import FLOAT, BlockRates, Rates, columns, elimination_operations, solve_operations
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, RefitConfig, SearchConfig
from darwinlm.config.training import GradualConfig, steps_of
from darwinlm.database.calibrate import PANEL, SPILL_BYTES
from darwinlm.genome import Grid, prunable_parameters
from darwinlm.model.families import find_grid
from darwinlm.model.layers import head_counts, head_dim, layer_config
from darwinlm.model.reading import skeleton
from darwinlm.runtime.device import DTYPES
from darwinlm.search.costs import parameter_costs
from darwinlm.search.fitness import BATCH_TOKENS
from darwinlm.search.sensitivity import measured_levels
from darwinlm.search.uniform import uniform_genome
from darwinlm.training.low_rank import low_rank_weights
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
    processes: int = 1,
    kept: bool = True,
) -> SearchPlan:
    """Count the work of a search and of its refits, of the process that has most of it.

    A forward pass takes two operations for each weight and token. A backward pass takes two for the hidden states, and
    two for each weight that trains. The refit's low-rank updates take all six.

    Args:
        parameters: parameters of the dense model, embeddings included.
        uniform: a genome of the size that is searched for.
        length: tokens in a sequence.
        processes: share batches and candidates where none is trained, candidates where they are, and the refit.
        kept: whether survivors' training states are, else each stage trains them from the beginning.
    """
    blocks, pruned = (prunable_parameters(grid, genome) for genome in (grid.dense(), uniform))
    head = config.vocab_size * config.hidden_size
    # An embedding of its own multiplies nothing.
    dense = parameters - (0 if config.tie_word_embeddings else head)
    small = dense - blocks + pruned
    consumers = config.hidden_size * sum(grid.inputs(uniform))
    updates = low_rank_weights(grid, uniform, config.hidden_size, refit.rank)
    trained = consumers if search.trains == "consumers" else pruned
    teacher = dense if search.loss == "distillation" else 0
    scores, steps, before, candidates = 0.0, 0.0, 0, search.offspring
    for stage, added in zip(search.stages, search.added_tokens(length), strict=True):
        again = stage.training_tokens > 0  # a candidate that has trained is another one
        read = stage.fitness_tokens if again else added
        # A process scores whole candidates that are trained, and batches of others.
        batches = 1 if again else max(1, -(-read // max(BATCH_TOKENS, length)))
        own = -(-candidates * batches // processes) / batches
        scores += own * 2.0 * small * read
        if search.metric == "kl":  # the dense model's logits, for each candidate in training or once for all
            scores += (own if again else min(1.0, own)) * 2.0 * head * read
        steps += own * (4.0 * small + 2.0 * trained) * (stage.training_tokens - (before if kept else 0))
        candidates, before = stage.survivors, stage.training_tokens
    return SearchPlan(
        start=Work(_start(grid, dense, blocks, small, search) / processes + 2.0 * teacher * before),
        generations=Work(search.generations * scores, search.generations * steps),
        refit=Work(2 * refit.tokens * 2.0 * dense, 2 * refit.tokens * (4.0 * small + 2.0 * consumers + 6.0 * updates)),
    )


def _start(grid: Grid, dense: int, blocks: int, small: int, search: SearchConfig) -> float:
    """Return the operations before the first generation.

    They are those of the dense model on all tokens, of sensitivities with the dense prefix reused, and of the starts in
    the last stage.
    """
    last: SelectionStage = search.stages[-1]
    operations, starts = 2.0 * dense * last.fitness_tokens, 1
    if search.start == "sensitivity":
        count, starts = blocks_of(grid), 2
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
        calibration_bytes, elimination_bytes: the most bytes that each holds in one process, without the interpreter and
            torch.
        disk_bytes: the size of the database.
        spilled_bytes: the size of the activations that are kept in a temporary file.
        lookup_bytes: what calibration holds in the host's memory of embeddings beside the stream's.
    """

    grid: Grid
    uniform: Genome
    parameters: int
    target_parameters: int
    calibration_seconds: float
    elimination_seconds: float
    calibration_bytes: int
    elimination_bytes: int
    disk_bytes: int
    spilled_bytes: int
    lookup_bytes: int

    @property
    def memory_bytes(self) -> int:
        """The most bytes that are held at a time in one process."""
        return max(self.calibration_bytes, self.elimination_bytes)


def plan(
    config: PretrainedConfig,
    calibration: CalibrationConfig,
    database: DatabaseConfig,
    target_level: float,
    rates: Rates,
    processes: int = 1,
    gpu: bool = False,
) -> Plan:
    """Return what a run on a model of this config takes.

    Args:
        rates: measured with the precision of `calibration`.
        processes: share the calibration tokens, and whole blocks to eliminate; each loads all blocks. What a process
            holds is counted.
        gpu: whether Hessians are factorised in float64, as on a GPU.

    Raises:
        UsageError: if the family is not supported or a setting cannot be used.
    """
    grid, size, beside = _sizes(config, database)
    units = grid.units
    genome = uniform_genome(grid, target_level, database.levels, Random(0))
    dtype = DTYPES[calibration.dtype]
    stored = (config.dtype or torch.float32).itemsize
    calibration = replace(calibration, tokens=-(-calibration.tokens // processes))
    tokens, hidden = calibration.tokens, config.hidden_size
    disk = [_level_bytes(grid, index, hidden, stored) for index in range(len(units))]
    stream = tokens * hidden * dtype.itemsize
    held = stream * (stream <= SPILL_BYTES)
    shared = -(-blocks_of(grid) // processes) / blocks_of(grid)
    return Plan(
        grid=grid,
        uniform=genome,
        parameters=size,
        target_parameters=parameter_costs(grid, size).of(genome),
        calibration_seconds=stored * config.vocab_size * hidden / rates.loads
        + sum(_measured(unit, config, calibration, rates) for unit in units),
        elimination_seconds=shared * sum(_eliminated(grid, index, hidden, rates) for index in range(len(units)))
        + sum(disk) / rates.disk,
        calibration_bytes=held + forward_bytes(units, config, calibration, dtype),
        elimination_bytes=held + elimination_bytes(units, hidden, gpu),
        disk_bytes=sum(disk),
        spilled_bytes=processes * stream * (stream > SPILL_BYTES),
        lookup_bytes=int(dtype.itemsize * beside * min(1.0, tokens / config.vocab_size)),
    )


_SIZES: dict[tuple[str, DatabaseConfig], tuple[Grid, int, int]] = {}


def _sizes(config: PretrainedConfig, database: DatabaseConfig) -> tuple[Grid, int, int]:
    """Return the grid, the parameters of a model, and those of its embeddings beside the stream's.

    Of equal configs once, for they take most of a plan's time.
    """
    key = config.to_json_string(), database
    if key not in _SIZES:
        model = skeleton(config)
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        beside = [module for module in model.modules() if isinstance(module, nn.Embedding) and module not in ends]
        parameters = sum(weight.numel() for weight in model.parameters())
        _SIZES[key] = find_grid(model, config, database), parameters, sum(each.weight.numel() for each in beside)
    return _SIZES[key]


def _measured(unit: Unit, config: PretrainedConfig, calibration: CalibrationConfig, rates: Rates) -> float:
    """Return the seconds that loading a unit, its forward pass and its Hessian take."""
    tokens, d, hidden = calibration.tokens, columns(unit), config.hidden_size
    operations = 2 * tokens * unit.parameters(0)
    # Tensors a token between two residual streams: norm, sum, output; then gate, up, activation and product, or
    # queries, keys and values, the former two turned, and what is attended to.
    entries = 5 * hidden + 4 * d
    if unit.kind == "attention":
        width = head_dim(config, unit.block)
        queries, keys = (count * width for count in head_counts(layer_config(config, unit.block)))
        operations += 4 * tokens * calibration.sequence_length * queries  # scores and values
        entries = 5 * hidden + 7 * queries + 6 * keys
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
    single, inverse = unit.structure_width == 1, columns(unit) ** 3
    swept = columns(unit) ** 2 / rates.sweeps if single else 0.0
    waited = unit.structures * (rates.channel if single else rates.block)
    solved = inverse / rates.inverses + solve_operations(grid, index, d_out) / rates.solves
    return (elimination_operations(unit, d_out) - inverse) / rates.products + swept + waited + solved


def largest_level_bytes(grid: Grid, d_out: int, stored: int) -> int:
    """Return the bytes of all levels of the unit that has most of them."""
    return max(_level_bytes(grid, index, d_out, stored) for index in range(len(grid.units)))


def _level_bytes(grid: Grid, index: int, d_out: int, stored: int) -> int:
    """Return the bytes that a unit's levels take in the database."""
    unit = grid.units[index]
    return sum(
        (unit.structures - removed) * unit.structure_width * d_out * stored for removed in grid.removed[index][1:-1]
    )


def forward_bytes(
    units: tuple[Unit, ...], config: PretrainedConfig, calibration: CalibrationConfig, dtype: torch.dtype
) -> int:
    """Return the bytes of the largest block, its Hessians and its forward pass."""
    blocks = [[unit for unit in units if unit.block == block] for block in {unit.block for unit in units}]
    batch = calibration.batch_size * calibration.sequence_length
    return max(
        sum(FLOAT * columns(unit) ** 2 + dtype.itemsize * unit.parameters(0) for unit in block)
        + batch * FLOAT * 4 * max(map(columns, block))
        for block in blocks
    )


def elimination_bytes(units: tuple[Unit, ...], hidden: int, gpu: bool) -> int:
    """Return the bytes that the elimination of a block's larger unit takes."""
    widest = max(map(columns, units))
    # The Hessian as summed, damped and sorted, its inverse, the Gram matrix, and a factor, in float64 on a GPU.
    return FLOAT * ((7 if gpu else 6) * widest**2 + 2 * widest * hidden)


def blocks_of(grid: Grid) -> int:
    """Return the number of decoder blocks."""
    return 1 + max(unit.block for unit in grid.units)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training takes.

    Attributes:
        work: the student's training, and the teacher's forward passes.
        disk_bytes: the size of the tokens, of the teacher's top-k logits, and of the two checkpoints that are kept.
        communication_bytes: what each process receives for every micro-batch where weights are sharded: all weights in
            bfloat16, forwards and backwards, and gradients in float32. 0 where they are not.
    """

    steps: int
    work: Work
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
        disk_bytes=FLOAT * tokens + logits + 2 * 3 * FLOAT * parameters,
        communication_bytes=(2 * DTYPES["bfloat16"].itemsize + FLOAT) * parameters if config.training.fsdp else 0,
    )
