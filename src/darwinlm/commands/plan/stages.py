"""What every stage of a recipe takes on a machine: seconds, memory of the device and of the host, and disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from darwinlm.commands.plan.devices import Machine
from darwinlm.commands.plan.rates import FLOAT
from darwinlm.commands.plan.work import (
    Plan,
    SearchPlan,
    TrainingPlan,
    blocks_of,
    largest_level_bytes,
    plan,
    plan_search,
    plan_training,
)
from darwinlm.config.training import GradualConfig, GradualStage
from darwinlm.evaluation.memory import evaluation_bytes
from darwinlm.genome import prunable_parameters
from darwinlm.runtime.device import DTYPES
from darwinlm.search.candidate_training import KEPT_BYTES
from darwinlm.search.held_out import POINTS, TOKENS
from darwinlm.search.lockstep import WAVE_BYTES
from darwinlm.search.memory import HEADROOM, SearchMemory, count_memory
from darwinlm.search.sensitivity import TOGETHER, measured_levels
from darwinlm.training.low_rank import low_rank_weights
from darwinlm.training.memory import TrainedModel, count_training
from darwinlm.types import SelectionStage

START_SECONDS = 5e-4  # in which the host starts the kernels of a decoder block for one token. Assumed


@dataclass(frozen=True)
class Stage:
    """What one stage takes, by counting.

    Attributes:
        kind: by which the settings are found that make it smaller.
        device: the most bytes on each GPU; 0 on processors.
        host: the most bytes in the host's memory, over all processes.
        disk: bytes that it writes.
        note: what else there is to know.
    """

    name: str
    kind: str
    seconds: float
    device: int
    host: int
    disk: int
    note: str = ""


@dataclass(frozen=True)
class Pruning:
    """One stage of a recipe, and everything that its parts read."""

    model: PretrainedConfig
    config: GradualConfig
    stage: GradualStage
    machine: Machine
    at: Plan
    memory: SearchMemory

    @classmethod
    def of(cls, model: PretrainedConfig, config: GradualConfig, stage: GradualStage, machine: Machine) -> Pruning:
        """Count a stage. Raises as `plan`."""
        settings = config.calibration, config.database, stage.target_level, machine.rates
        at = plan(model, *settings, machine.count, machine.gpu)
        sizes, length = (at.parameters, model, at.grid, at.uniform), config.calibration.sequence_length
        memory = count_memory(*sizes, config.search, config.refit, length, machine.dtype)
        return cls(model, config, stage, machine, at, memory)

    @property
    def work(self) -> SearchPlan:
        """The work of the search and of the refits."""
        config = self.config
        sizes = self.at.parameters, self.model, self.at.grid, self.at.uniform
        settings = config.search, config.refit, config.calibration.sequence_length
        return plan_search(*sizes, *settings, self.machine.count, self._keeps_survivors)

    @property
    def _keeps_survivors(self) -> bool:
        """Whether there is room for what survivors have learned, half of what else is left."""
        memory = self.memory
        left = self.machine.usable - (memory.resident if self.resident else memory.visiting)
        return memory.survivors <= (left // 2 if self.machine.gpu else KEPT_BYTES)

    @property
    def training(self) -> TrainingPlan:
        """The work and the memory of the training after the pruning."""
        return plan_training(self.at.target_parameters, self.at.parameters, self.stage.tokens, self.config)

    @property
    def trains_candidates(self) -> bool:
        """Whether candidates are trained before they are selected."""
        return self.memory.training > 0

    @property
    def resident(self) -> bool:
        """Whether the search keeps the dense model's blocks on the device."""
        return not self.machine.gpu or self.memory.resident <= self.machine.usable

    @property
    def judged(self) -> int:
        """Bytes of the dense, the uniform and the searched model side by side, and of a pass of one of them."""
        uniform = prunable_parameters(self.at.grid, self.at.uniform)  # which shares the dense model's embeddings
        own = (self.at.parameters, uniform, self.at.target_parameters)
        return evaluation_bytes(own, self.model, self.config.calibration.sequence_length, self.stored)

    @property
    def judged_there(self) -> bool:
        """Whether models are exported and judged on the device, as `Work.after_search` decides."""
        return self.resident and self.judged <= self.machine.usable

    @property
    def stored(self) -> int:
        """Bytes of a weight in the checkpoint."""
        return (self.model.dtype or torch.float32).itemsize

    def placed(self, name: str, kind: str, seconds: float, tensors: int, host: int, disk: int, note: str = "") -> Stage:
        """A stage with its tensors on the device, beside what an allocator wastes; without a GPU, on the host."""
        if self.machine.gpu:
            return Stage(name, kind, seconds, int(tensors / HEADROOM), host, disk, note)
        return Stage(name, kind, seconds, 0, tensors, disk, note)


def stages_of(model: PretrainedConfig, config: GradualConfig, machine: Machine) -> list[Stage]:
    """Return the stages of a recipe in their order. The database of a later pruning takes less, and is left out."""
    prunings = [Pruning.of(model, config, stage, machine) for stage in config.stages]
    return [*_database(prunings[0]), *(stage for pruning in prunings for stage in _after_database(pruning))]


def _after_database(this: Pruning) -> Iterator[Stage]:
    yield from (_start(this), _search(this))
    if this.config.refit.tokens:
        yield _refit(this)
    yield from (_export(this), _evaluation(this))
    if this.stage.tokens:
        yield _training(this)


def _database(this: Pruning) -> list[Stage]:
    at, tokens = this.at, f"{this.config.calibration.tokens:,} tokens"
    block = max(
        this.stored * sum(unit.parameters(0) for unit in at.grid.units if unit.block == block)
        for block in range(blocks_of(at.grid))
    )
    levels = this.machine.count * largest_level_bytes(at.grid, this.model.hidden_size, this.stored)
    host = this.machine.count * (block + at.lookup_bytes)
    return [
        this.placed(
            "calibration", "calibration", at.calibration_seconds, at.calibration_bytes, host, at.spilled_bytes, tokens
        ),
        this.placed("elimination", "elimination", at.elimination_seconds, at.elimination_bytes, levels, at.disk_bytes),
    ]


def _start(this: Pruning) -> Stage:
    """Loading the model, sensitivities where they are measured, and scoring the starts."""
    seconds = max(this.work.start.seconds(this.machine.blocks), _walked(this, _start_walks(this)))
    loading = this.stored * this.at.parameters / this.machine.rates.loads
    note = "sensitivities" if this.config.search.start == "sensitivity" else this.config.search.start
    return this.placed("start of the search", "search", loading + seconds, *_searched(this), 0, note)


def _search(this: Pruning) -> Stage:
    walks = float(this.config.search.generations * _generation_walks(this))
    seconds = max(this.work.generations.seconds(this.machine.blocks), _walked(this, walks))
    note = f"{this.config.search.generations} generations"
    if this.trains_candidates:
        note += f", training {this.config.search.trains}"
    if not this.resident:
        note += ", blocks in host memory"
    return this.placed("search", "search", seconds, *_searched(this), 0, note)


def _searched(this: Pruning) -> tuple[int, int]:
    """Bytes of a search on the device, without what only saves time, and on the host."""
    memory, count = this.memory, this.machine.count
    if not this.machine.gpu:
        return memory.search + memory.caches, 0
    # Weights pass through the host's memory, or stay there.
    return memory.resident if this.resident else memory.visiting, count * memory.dense + memory.states


def _walked(this: Pruning, walks: float) -> float:
    """Seconds in which the host sends its blocks so many times, while the device computes."""
    if this.resident:
        return 0.0
    blocks = this.machine.dtype.itemsize * prunable_parameters(this.at.grid, this.at.grid.dense())
    return walks * blocks / this.machine.host_link


def _generation_walks(this: Pruning) -> int:
    """How often a generation goes through the blocks: at every stage of selection once for each wave."""
    search, length = this.config.search, this.config.calibration.sequence_length
    candidates = [search.offspring, *(stage.survivors for stage in search.stages)]
    added = search.added_tokens(length)
    return sum(_waves(this, count * tokens) for count, tokens in zip(candidates, added, strict=False))


def _start_walks(this: Pruning) -> float:
    """The same before the first generation: sensitivities begin at the first block that differs, on average halfway."""
    search, units = this.config.search, this.at.grid.units
    last: SelectionStage = search.stages[-1]
    walks = 2.0 * _waves(this, 2 * last.fitness_tokens)
    if search.start == "sensitivity":
        levels = len(measured_levels(this.at.grid.highest(0)))
        groups = -(-len(units) // TOGETHER)
        walks += groups / 2 * _waves(this, TOGETHER * levels * search.stages[0].fitness_tokens)
    return walks


def _waves(this: Pruning, tokens: int) -> int:
    """Waves in which candidates go through the blocks, given the tokens of all of them."""
    held = tokens * this.model.hidden_size * this.machine.dtype.itemsize
    return -(-held // (this.machine.count * WAVE_BYTES))


def _refit(this: Pruning) -> Stage:
    """The refit of the searched and of the uniform model."""
    trained, states = _refitted(this), this.config.refit.tokens * this.model.hidden_size
    # The dense model's states, and a block of it for each process.
    host = states * this.machine.dtype.itemsize + this.machine.count * this.memory.block
    kept = states * this.machine.dtype.itemsize + this.memory.dense
    tensors = this.memory.refitting + (0 if this.machine.gpu else kept)
    sharing = min(this.machine.count, this.config.refit.batch_size)
    seconds = this.work.refit.seconds(this.machine.blocks) / sharing
    # Of one model the weights with both moments, while it is trained; of the other its weights.
    disk = (3 + 1) * FLOAT * trained
    note = f"{this.config.refit.tokens:,} tokens, of two models"
    return this.placed("refit", "refit", seconds, tensors, host, disk, note)


def _refitted(this: Pruning) -> int:
    """Weights of the uniform model's consumers, and of the updates of its other matrices."""
    grid, genome, hidden = this.at.grid, this.at.uniform, this.model.hidden_size
    updates = low_rank_weights(grid, genome, hidden, this.config.refit.rank)
    return hidden * sum(grid.inputs(genome)) + updates


def _export(this: Pruning) -> Stage:
    """Writing the model, and loading it in a fresh process where it is verified."""
    written, rates = this.stored * this.at.target_parameters, this.machine.rates
    again = written if this.config.verify else 0
    tensors = this.stored * this.at.parameters + written
    seconds = written / rates.disk + again / rates.loads
    host = written + again + (0 if this.judged_there else this.stored * this.at.parameters)
    return this.placed("export", "export", seconds, tensors if this.judged_there else 0, host, written)


def _evaluation(this: Pruning) -> Stage:
    """Quality, curves, speed and continuations of the dense, the uniform and the searched model."""
    models = (this.at.parameters, *2 * (this.at.target_parameters,))
    tensors, machine, there = this.judged, this.machine, this.judged_there
    blocks, bandwidth = (machine.blocks, machine.bandwidth) if there else (machine.aside, machine.aside_bandwidth)
    config, texts = this.config.evaluation, 1 + len(this.config.evaluation.texts)
    read = texts * (config.tokens * sum(models) + POINTS * TOKENS * models[-1])
    timed = (config.repeats + 1) * config.speed_tokens * sum(models)
    written = (config.repeats + 1) * config.decode_tokens + len(config.prompts) * config.continuation_tokens
    started = START_SECONDS * blocks_of(this.at.grid) * len(models) if there and machine.gpu else 0.0
    seconds = 2.0 * read / machine.blocks.forward + 2.0 * timed / blocks.forward
    seconds += written * max(started, this.stored * sum(models) / bandwidth)
    loading = this.stored * models[-1] / machine.rates.loads
    if machine.gpu and not there:  # the block runner measures quality with blocks that come from the host
        seen = int((this.memory.ends + 3 * this.memory.block + this.memory.scoring) / HEADROOM)
        return Stage("evaluation", "evaluation", loading + seconds, seen, tensors, 0, "speeds on the host's processors")
    return this.placed("evaluation", "evaluation", loading + seconds, tensors, this.stored * models[-1], 0)


def _training(this: Pruning) -> Stage:
    """Training after the pruning, shared by all GPUs."""
    counted, machine, config = this.training, this.machine, this.config.training
    sharded = config.fsdp and machine.count > 1
    tokens = config.micro_batch_size * this.config.stream.sequence_length
    model = TrainedModel.of(this.at.target_parameters, this.model, this.at.grid, this.at.uniform)
    settings = config, this.config.distillation, this.config.stream.sequence_length, DTYPES["bfloat16"]
    held = count_training(model, *settings, machine.count, this.at.parameters)
    tensors = held.most
    steps = this.stage.tokens // (tokens * machine.count)
    sent = steps * counted.communication_bytes / machine.peer_link if sharded else 0.0
    seconds = max(counted.work.seconds(machine.blocks) / machine.count, sent)
    # Shards are read a block at a time, a whole model by every process.
    host = machine.count * (FLOAT * (model.block if sharded else model.parameters) + held.teacher)
    note = f"{this.stage.tokens:,} tokens, {counted.steps:,} steps"
    return this.placed("training", "training", seconds, tensors, host, counted.disk_bytes, note)
