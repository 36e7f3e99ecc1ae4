"""Hidden states of many sequences, between two blocks or behind the last one, which may be larger than memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.model.blocks import Blocks, enter, run_block
from darwinlm.model.roles import Family
from darwinlm.runtime.progress import track
from darwinlm.runtime.scratch import scratch_writing

SPILL_BYTES = 4 << 30  # states that take more bytes are kept in a file


class States:
    """The hidden states of every batch: in memory, or in a temporary file if they are too large.

    Args:
        batches: the token ids of each.
        width: of a hidden state.
        device: where they are read to.
        kept_on: the device in whose memory they are kept.
        limit: the bytes above which they are kept in a file.
    """

    def __init__(
        self,
        batches: Sequence[Int[Tensor, "_ _"]],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        kept_on: torch.device,
        limit: int = SPILL_BYTES,
    ):
        self.shapes = [(*batch.shape, width) for batch in batches]
        self.dtype, self.device, self.kept_on = dtype, device, kept_on
        sizes = [batch.numel() * width * dtype.itemsize for batch in batches]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.file = tempfile.TemporaryFile() if sum(sizes) > limit else None  # noqa: SIM115, lives as long as this
        self.held: dict[int, Tensor] = {}

    def read(self, index: int) -> Float[Tensor, "sequences length hidden"]:
        """The states of a batch, on `device`."""
        if self.file is None:
            return self.held[index].to(self.device)
        states = torch.empty(self.shapes[index], dtype=self.dtype)
        count = os.preadv(self.file.fileno(), [_bytes(states)], self.offsets[index])
        assert count == states.nbytes
        return states.to(self.device)

    def close(self) -> None:
        """Close the temporary file, if there is one."""
        if self.file is not None:
            self.file.close()

    def write(self, index: int, states: Float[Tensor, "sequences length hidden"]) -> None:
        """Keep the states of a batch. Raises `DarwinError` if the disk is full."""
        if self.file is None:
            self.held[index] = states.to(self.kept_on)
            return
        view, offset = _bytes(states.cpu().contiguous()), self.offsets[index]
        with scratch_writing():
            while view:  # a disk that is nearly full takes a part, and then nothing
                written = os.pwritev(self.file.fileno(), [view], offset)
                view, offset = view[written:], offset + written


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


@torch.no_grad()
def last_states(
    model: PreTrainedModel,
    family: Family,
    blocks: Blocks,
    batches: Sequence[Int[Tensor, "_ _"]],
    description: str = "dense model",
) -> States:
    """Return a model's last hidden states on each batch, in the host's memory or in a file.

    Each block is there once, for all batches, and the device holds the states of one of them.

    Args:
        model: what it has beside its blocks is on the device.
        blocks: its blocks, wherever they are.
        description: for the progress.
    """
    device = model.device
    states = States(batches, model.config.hidden_size, model.dtype, device, torch.device("cpu"))
    if not batches:
        return states
    try:
        arguments: dict[torch.Size, list[dict[str, Any]]] = {}  # which depend on the shape of a batch alone
        for index, batch in enumerate(batches):
            entry = enter(model, family, batch.to(device))
            states.write(index, entry.states)
            arguments[batch.shape] = entry.arguments
        count = model.config.num_hidden_layers
        for number, block in track(blocks.walk(0, count), description, count):
            for index, batch in enumerate(batches):
                states.write(index, run_block(block, states.read(index), arguments[batch.shape][number]))
        norm = model.get_submodule(family.final_norm)
        for index in range(len(batches)):
            states.write(index, norm(states.read(index)))
    except BaseException:
        states.close()
        raise
    return states
