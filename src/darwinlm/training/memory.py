"""What a training holds on the device of each process, counted from shapes before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from darwinlm.config.training import DistillationConfig, TrainingConfig
from darwinlm.genome import Grid
from darwinlm.losses.distillation import CHUNK
from darwinlm.types import Genome

FLOAT = 4  # bytes of float32
LOGITS = 4  # float32 tensors of a chunk's logits: as they are made, log-probabilities of both models, the gradient
GATHERED = 3  # a block that computes, the next one that arrives, and the buffer in which it does


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the device of a process, by what they are for. Where work takes turns, the largest counts.

    Attributes:
        weights: the process's share of what trains, in float32, and all of what is frozen.
        gradients: of its share, in float32.
        moments: both of AdamW, of its share.
        teacher: the teacher that runs beside the model; 0 where its logits are read, or it only judges.
        activations: what is kept of the forward pass for the backward pass: with checkpointing what blocks are given.
        copies: of weights in the precision of products, as long as activations are kept.
        loss: the logits of a chunk of tokens, and the output embedding's gradient.
        block: what the backward pass of a block adds: with checkpointing its activations, else its gradients, and with
            FSDP whole weights and gradients that are gathered and reduced.
    """

    weights: int
    gradients: int
    moments: int
    teacher: int
    activations: int
    copies: int
    loss: int
    block: int

    @property
    def state(self) -> int:
        """What is held between two steps."""
        return self.weights + self.moments + self.teacher

    @property
    def most(self) -> int:
        """The most that a step holds."""
        return self.state + self.gradients + self.activations + self.copies + max(self.loss, self.block)


@dataclass(frozen=True)
class TrainedModel:
    """The sizes of a model that count.

    Attributes:
        parameters: all of them, a tied embedding once.
        block: those of its largest block.
        inputs: the width that the consumer of each unit reads, 0 where the unit is gone.
    """

    parameters: int
    block: int
    inputs: Sequence[int]
    config: PretrainedConfig

    @classmethod
    def of(cls, parameters: int, config: PretrainedConfig, grid: Grid, genome: Genome) -> TrainedModel:
        """The model that a genome makes of a dense one.

        Args:
            parameters: those of the pruned model.
            config: the dense model's.
        """
        sizes = [0] * int(config.num_hidden_layers)
        for left, unit in zip(grid.left(genome), grid.units, strict=True):
            sizes[unit.block] += unit.parameters(unit.structures - left)
        return cls(parameters, max(sizes), grid.inputs(genome), config)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def embedding(self) -> int:
        """The parameters of one embedding."""
        return int(self.config.vocab_size * self.config.hidden_size)


def count_training(
    model: TrainedModel,
    training: TrainingConfig,
    distillation: DistillationConfig,
    length: int,
    dtype: torch.dtype,
    processes: int = 1,
    teacher_parameters: int = 0,
) -> TrainingMemory:
    """Count what a training holds on each of its devices.

    Args:
        length: tokens in a sequence.
        dtype: the precision of products.
        processes: that share the weights with FSDP, or each have all of them.
        teacher_parameters: 0 without a teacher.
    """
    each, sharded, lora = dtype.itemsize, training.fsdp and processes > 1, training.lora_rank > 0
    share = processes if sharded else 1
    trained = _adapters(model, training) if lora else model.parameters
    online = distillation.weight > 0 and not distillation.top_k
    tokens, again = training.micro_batch_size * length, training.gradient_checkpointing
    stream = each if sharded or lora else FLOAT
    made = tokens * (_of_units(model, each, stream) + (_of_adapters(model, each) if lora else 0))
    low = each if each < FLOAT else 0
    return TrainingMemory(
        weights=FLOAT * trained // share + (each * model.parameters if lora else 0),
        gradients=FLOAT * trained // share,
        moments=2 * FLOAT * trained // share,
        teacher=each * teacher_parameters if online else 0,
        activations=tokens * stream * model.config.hidden_size * (model.blocks + 1) if again else made,
        copies=0 if lora else each * model.embedding if sharded else low * (0 if again else model.parameters),
        loss=LOGITS * FLOAT * min(CHUNK, tokens) * model.config.vocab_size
        + (0 if lora else (FLOAT + (low if again and not sharded else 0)) * model.embedding),
        block=(made // model.blocks if again else 0)
        + (0 if lora else model.block * (FLOAT + ((GATHERED + 1) * each if sharded else low if again else 0))),
    )


def _adapters(model: TrainedModel, training: TrainingConfig) -> int:
    """The parameters of adapters, of three or four modules a unit: the rank times rows and columns of each."""
    return int(training.lora_rank * 3.5 * sum(model.config.hidden_size + width for width in model.inputs if width))


def _of_units(model: TrainedModel, each: int, stream: int) -> int:
    """Bytes a token that units keep for the backward pass.

    They are the stream and its norm, the norm's result as products take it (singly, where it is cast for each of them),
    and five tensors as wide as what the consumer reads.
    """
    norms = model.config.hidden_size * (FLOAT + stream + (each if stream == each else 3 * each))
    return len(model.inputs) * norms + 5 * each * sum(model.inputs)


def _of_adapters(model: TrainedModel, each: int) -> int:
    """Bytes a token that adapters keep beside their modules: the input of each, cast to float32 and back."""
    return each * int(2.5 * model.config.hidden_size * len(model.inputs) + sum(model.inputs))
