"""A teacher that is not learned from: what it says of the held-out sequences is computed once, before the training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from darwinlm.data.stream import Sequences
from darwinlm.losses.distillation import HiddenTarget, Target
from darwinlm.losses.logits import Logits
from darwinlm.model.blocks import Blocks, InShards, Resident
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.states import States, last_states
from darwinlm.runtime import parallel

STATES = "teacher_states"  # in a batch


@dataclass(frozen=True)
class Judge:
    """A teacher whose last hidden states come with each batch; its output embedding waits in the host's memory."""

    logits: Logits
    device: torch.device
    vocabulary: int

    def target(self, batch: dict[str, Tensor], temperature: float) -> Target:
        """Return the distribution after every token but the last of each sequence, in their order."""
        linear = nn.Linear(1, 1, device="meta")
        linear.weight, bias = _on(self.logits.linear.weight, self.device), self.logits.linear.bias
        linear.bias = None if bias is None else _on(bias, self.device)
        logits = replace(self.logits, project=linear)
        return HiddenTarget(batch[STATES][:, :-1].flatten(0, 1), logits, temperature, self.vocabulary)


def _on(weight: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(device), requires_grad=False)


class JudgedSequences(Dataset):
    """Held-out sequences, those that this process evaluates with the teacher's last hidden states."""

    def __init__(self, sequences: Sequences, states: States, indices: list[int]):
        self.sequences, self.states = sequences, states
        self.places = {index: place for place, index in enumerate(indices)}

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.sequences[index], STATES: self.states.read(self.places[index])[0]}


def judging(
    checkpoint: Checkpoint, held_out: Sequences, dtype: torch.dtype, device: torch.device, vocabulary: int
) -> tuple[Judge, JudgedSequences]:
    """Run a teacher over the held-out sequences of this process; an accelerator has one of its blocks at a time.

    Args:
        vocabulary: the number of tokens among which it chooses.

    Raises:
        UsageError: if it is of a family that cannot be pruned, or its logits are no product with its output embedding.
        DarwinError: if its weights cannot be read.
    """
    world, rank, count = parallel.processes(), parallel.rank(), len(held_out)
    indices = sorted({min(index, count - 1) for index in range(rank, -(-count // world) * world, world)})
    blocks: Blocks = InShards.of(checkpoint, dtype, device)
    teacher: Any = blocks.skeleton
    if device.type == "cpu":
        teacher = checkpoint.load(dtype, device)
        blocks = Resident(teacher, checkpoint.family)
    batches = [held_out[index]["input_ids"][None] for index in indices]
    states = last_states(teacher, checkpoint.family, blocks, batches)
    states.device = torch.device("cpu")
    embedding = Logits.of(teacher)
    host = nn.Linear(1, 1, device="meta")
    host.weight, bias = _on(embedding.linear.weight, torch.device("cpu")), embedding.linear.bias
    host.bias = None if bias is None else _on(bias, torch.device("cpu"))
    return Judge(replace(embedding, project=host), device, vocabulary), JudgedSequences(held_out, states, indices)
