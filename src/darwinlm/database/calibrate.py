"""Calibration: one pass of the dense model over the calibration tokens, block by block (section 3.1).

Memory holds one block's weights, its statistics and the activations between two blocks; activations that are too large
are kept in a file. Several processes share the tokens, and each gets the statistics of its own share of the blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.database.levels import UnitStatistics
from darwinlm.model.blocks import Arguments, InShards, move_buffers, run_block
from darwinlm.model.checkpoint import Checkpoint, is_finite
from darwinlm.model.families import linear_at, lookups, modules_around
from darwinlm.model.states import SPILL_BYTES, States
from darwinlm.runtime import parallel
from darwinlm.runtime.device import exact_products
from darwinlm.types import DarwinError, Unit

PANEL = 512  # rows of a Hessian that are summed in one matrix product


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    token_ids: Int[Tensor, "sequences length"],
    *,
    batch_size: int,
    device: torch.device,
    finished: Collection[str] = (),
    units: Sequence[Unit] | None = None,
    dtype: torch.dtype = torch.float32,
    spill_bytes: int = SPILL_BYTES,
    counts: Bool[Tensor, "sequences length"] | None = None,
) -> Iterator[UnitStatistics]:
    """Yield the statistics of each unit of the dense model, in order: `H = 2/tokens * sum x x^T` in float32.

    Units named in `finished` run without being measured, and blocks after the last unfinished one do not run. Of
    several processes, each runs its own sequences, and only process `b % processes` yields the units of block `b`.

    Args:
        units: the units to measure, all of `checkpoint.units` by default.
        dtype: of the forward pass; sums are float32 in any case.
        spill_bytes: activations of more bytes than this are kept in a temporary file instead of memory.
        counts: for each token, whether its activations are summed; if None, all are. At least one must be.

    Raises:
        DarwinError: if weights or activations are not finite; it names the unit.
        PeerLostError: if another process dies.
    """
    pending = [unit for unit in units or checkpoint.units if unit.name not in finished]
    if not pending:
        return
    world = parallel.processes()
    mine_of_all = slice(parallel.rank(), None, world)
    used, ids = token_ids[mine_of_all].unique(return_inverse=True)
    batches = ids.split(batch_size)
    marks = [None] * len(batches) if counts is None else counts[mine_of_all].split(batch_size)
    model = checkpoint.skeleton()
    stream, arguments = _embed(checkpoint, model, used, batches, dtype, device, spill_bytes)
    mine: list[UnitStatistics] = []
    last = pending[-1].block
    with closing(stream):
        for block, layer in InShards(checkpoint, model, dtype, device).walk(0, last + 1):
            length = token_ids.shape[1]
            grams = [_Gram(unit, linear_at(model, unit.consumer), length) for unit in pending if unit.block == block]
            with ExitStack() as hooks:
                for gram in grams:
                    hooks.callback(gram.consumer.register_forward_pre_hook(gram).remove)
                for index, batch in enumerate(batches):
                    for gram in grams:
                        gram.counts = marks[index]
                    given = arguments.of(batch.to(device), block)
                    stream.write_stream(index, run_block(layer, stream.read_stream(index), given))
            owner = parallel.owner(block)
            for gram in grams:
                gram.share(owner)
                if owner == parallel.rank():
                    mine.append(gram.statistics())
            del grams
            if owner == world - 1 or block == last:  # every process has a block of its own to eliminate
                while mine:
                    yield mine.pop(0)


class _Gram:
    """A forward pre-hook that sums `x x^T` over a consumer's inputs: its lower half, in panels of rows.

    The trace over the first token of each sequence, a BOS if the model expects one, is summed apart as well: models
    direct attention that is not needed there, and their activations at it can be larger than all others.

    Attributes:
        counts: which tokens of the batch that comes next are summed; if None, all are.
    """

    def __init__(self, unit: Unit, consumer: nn.Linear, length: int):
        self.unit = unit
        self.consumer = consumer
        self.length = length
        size = unit.structures * unit.structure_width
        self.sum = torch.zeros(size, size, device=consumer.weight.device)
        self.first = torch.zeros(1, dtype=torch.float64, device=consumer.weight.device)
        self.tokens = 0
        self.counts: Bool[Tensor, "sequences length"] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        self.first += x[self._firsts(len(x), x.device)].double().square().sum()
        if self.counts is not None:
            x = x[self.counts.flatten().to(x.device)]
        with exact_products():
            for start in range(0, x.shape[1], PANEL):
                stop = start + PANEL
                self.sum[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        self.tokens += x.shape[0]

    def _firsts(self, tokens: int, device: torch.device) -> Int[Tensor, " firsts"]:
        """The places of first tokens that are summed."""
        places = torch.arange(0, tokens, self.length)
        return (places if self.counts is None else places[self.counts[:, 0]]).to(device)

    def share(self, owner: int) -> None:
        """Add up the sums of all processes on process `owner`."""
        if parallel.processes() == 1:
            return
        count = torch.tensor([self.tokens], dtype=torch.int64, device=self.sum.device)
        parallel.sum_at(count, owner)
        parallel.sum_at(self.sum, owner)
        parallel.sum_at(self.first, owner)
        self.tokens = int(count)

    def statistics(self) -> UnitStatistics:
        if not is_finite(self.sum):
            raise DarwinError(
                f"{self.unit.name}: expected finite inputs of {self.unit.consumer} on the calibration text, found "
                "NaN or infinity; the model overflows, check its weights or calibrate in float32"
            )
        for start in range(PANEL, len(self.sum), PANEL):
            stop = start + PANEL
            self.sum[:start, start:stop] = self.sum[start:stop, :start].T
        first = self.first.item() / max(self.sum.diagonal().double().sum().item(), torch.finfo().tiny)
        hessian = self.sum.mul_(2 / self.tokens)
        return UnitStatistics(self.unit, self.consumer.weight.detach(), hessian, self.tokens, first)


def _embed(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    used: Int[Tensor, " tokens"],
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    spill_bytes: int,
) -> tuple[States, Arguments]:
    """The stream into block 0 for every batch, and the blocks' arguments.

    Args:
        used: the tokens that there are, by whose positions here `batches` name them.
    """
    arguments = Arguments(model, checkpoint.family)
    stream = States(batches, checkpoint.config.hidden_size, dtype, device, device, spill_bytes)
    try:
        ends = _fill_ends(checkpoint, model, used, dtype, device)
        for index, batch in enumerate(batches):
            stream.write(index, arguments.enter(batch.to(device)))
    except BaseException:
        stream.close()
        raise
    for path in ends if not checkpoint.family.given else ():  # else they are needed for every block
        model.get_submodule(path).to("meta")
    return stream, arguments


def _fill_ends(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    used: Int[Tensor, " tokens"],
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """Load what runs in front of the blocks, and return the paths of its modules.

    Of embeddings only the rows that are looked up are loaded: a whole one can be larger than a block. Those beside the
    stream's, which can be larger than all blocks, stay in the host's memory.
    """
    family = checkpoint.family
    for path in lookups(family):
        rows = checkpoint.tensor(f"{path}.weight")[used].to(dtype)
        embedding: Any = model.get_submodule(path)
        if path == family.embedding:
            rows = rows.to(device)
        else:
            embedding.register_forward_pre_hook(lambda _, args: args[0].cpu())
            embedding.register_forward_hook(lambda _, __, found: found.to(device))
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None  # it numbers the whole table's rows, and only gradients heed it
    around = modules_around(model, family)
    for path in around:
        checkpoint.fill(model, path, dtype, device)
    elsewhere = {*model.get_submodule(family.blocks).modules(), *map(model.get_submodule, lookups(family))}
    for module in model.modules():
        if module not in elsewhere:
            move_buffers(module, device)
    return [*lookups(family), *around]
