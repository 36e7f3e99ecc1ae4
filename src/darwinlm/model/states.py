"""Hidden states of many sequences, between two blocks or behind the last one, which may be larger than memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.model.blocks import Arguments, Blocks, Handed, Stream, run_block
from darwinlm.model.family import Family
from darwinlm.runtime.progress import track
from darwinlm.runtime.scratch import scratch_writing

SPILL_BYTES = 4 << 30  # states that take more bytes are kept in a file


class States:
    """The hidden states of every batch: in memory, or in a temporary file if they are too large.

    What blocks hand on beside them lies there too.

    Args:
        batches: the token ids of each.
        width: of a hidden state.
        device: where they are read to.
        kept_on: the device in whose memory they are kept.
        limit: the bytes of hidden states above which they are kept in a file.
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
        self.device, self.kept_on = device, kept_on
        size = sum(batch.numel() * width * dtype.itemsize for batch in batches)
        self.file = tempfile.TemporaryFile() if size > limit else None  # noqa: SIM115, lives as long as this
        self._end = 0  # of what is in it
        self._places: dict[tuple[int, str, int], tuple[int, torch.Size, torch.dtype]] = {}
        self.held: dict[tuple[int, str, int], Tensor] = {}
        self._handed: dict[int, dict[str, int]] = {}  # how many tensors each batch has of what blocks hand on
        self._latest: Handed = {}  # of what was read

    def read(self, index: int) -> Float[Tensor, "sequences length hidden"]:
        """The states of a batch, on `device`."""
        return self._get((index, "", 0))

    def write(self, index: int, states: Float[Tensor, "sequences length hidden"]) -> None:
        """Keep the states of a batch. Raises `DarwinError` if the disk is full."""
        self._put((index, "", 0), states)

    def read_stream(self, index: int) -> Stream:
        """The states of a batch with what blocks have handed on, on `device`."""
        counts = self._handed.get(index, {})
        handed = {name: tuple(self._get((index, name, i)) for i in range(count)) for name, count in counts.items()}
        self._latest = handed
        return Stream(self.read(index), handed)

    def write_stream(self, index: int, stream: Stream) -> None:
        """Keep a batch's stream, behind the block that has run on the latest that was read. Raises as `write`."""
        self.write(index, stream.states)
        for name, tensors in stream.handed.items():
            if tensors is not self._latest.get(name):  # else they are kept already
                self._handed.setdefault(index, {})[name] = len(tensors)
                for number, tensor in enumerate(tensors):
                    self._put((index, name, number), tensor)

    def close(self) -> None:
        """Close the temporary file, if there is one."""
        if self.file is not None:
            self.file.close()

    def _get(self, key: tuple[int, str, int]) -> Tensor:
        if self.file is None:
            return self.held[key].to(self.device)
        offset, shape, dtype = self._places[key]
        tensor = torch.empty(shape, dtype=dtype)
        count = os.preadv(self.file.fileno(), [_bytes(tensor)], offset)
        assert count == tensor.nbytes
        return tensor.to(self.device)

    def _put(self, key: tuple[int, str, int], tensor: Tensor) -> None:
        if self.file is None:
            self.held[key] = tensor.to(self.kept_on)
            return
        if key not in self._places:
            self._places[key] = self._end, tensor.shape, tensor.dtype
            self._end += tensor.nbytes
        view, offset = _bytes(tensor.cpu().contiguous()), self._places[key][0]
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
        arguments = Arguments(model, family)
        for index, batch in enumerate(batches):
            states.write(index, arguments.enter(batch.to(device)))
        count = model.config.num_hidden_layers
        for number, block in track(blocks.walk(0, count), description, count):
            for index, batch in enumerate(batches):
                given = arguments.of(batch.to(device), number)
                states.write_stream(index, run_block(block, states.read_stream(index), given))
        norm = model.get_submodule(family.final_norm)
        for index in range(len(batches)):
            states.write(index, norm(states.read(index)))
    except BaseException:
        states.close()
        raise
    return states
