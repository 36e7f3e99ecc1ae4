"""A population runs through the blocks in lockstep, so that a block's weights are read once for all candidates.

A candidate's hidden states behind a block depend on the batch and on the levels of the units so far, its prefix. They
are computed once for all candidates with that prefix, and begin at those that are kept of a parent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from darwinlm.database.stitch import Stitcher
from darwinlm.model.blocks import Blocks, Entry, Stream, enter, run_block
from darwinlm.types import Genome

WAVE_BYTES = 1 << 30  # of hidden states between two blocks, at most, where no limit is given


Pair = tuple[Genome, int]  # a candidate, and the batch that it runs on


Prefix = tuple[int, tuple[int, ...]]  # a batch, and the levels of the units so far


class Lockstep:
    """Runs candidates on batches of token ids and gives their last hidden states.

    Args:
        stitcher: makes the candidates' blocks.
        blocks: the dense model's.
        batches: token ids, on the device.
        kept_on: where the parent's hidden states in front of every block are kept, which saves computing them for its
            offspring.
        wave_bytes: the most that the hidden states of candidates take between two blocks.
    """

    def __init__(
        self,
        stitcher: Stitcher,
        blocks: Blocks,
        batches: Sequence[Int[Tensor, "sequences length"]],
        kept_on: torch.device,
        wave_bytes: int = WAVE_BYTES,
    ):
        self.stitcher = stitcher
        self.blocks = blocks
        self.batches = batches
        self.kept_on = kept_on
        self.wave_bytes = wave_bytes
        self._count = int(stitcher.dense.config.num_hidden_layers)
        self._entries: dict[int, Entry] = {}
        self._ends = [sum(unit.block < block for unit in stitcher.grid.units) for block in range(self._count + 1)]
        self._parent: Genome | None = None
        self._kept: dict[tuple[int, int], Stream] = {}  # the parent's by batch and block

    @torch.no_grad()
    def hidden(
        self, pairs: Sequence[Pair], parent: Genome | None = None
    ) -> Iterator[dict[Pair, Float[Tensor, "sequences length hidden"]]]:
        """Yield the last hidden states of candidates, wave by wave.

        Args:
            pairs: distinct ones.
            parent: a genome from which these, and those asked for next, differ little.
        """
        self._keep_of(parent)
        for wave in self._waves(pairs):
            yield self._run(wave)

    def _keep_of(self, parent: Genome | None) -> None:
        """Keep the states of another parent from now on; what both have in common stays."""
        if parent is None or parent == self._parent:
            return
        shared = 0 if self._parent is None else self._fork(parent)
        self._kept = {key: states for key, states in self._kept.items() if key[1] <= shared}
        self._parent = parent

    def _fork(self, genome: Genome) -> int:
        """The first block in which a genome differs from the parent."""
        assert self._parent is not None
        differences = (a != b for a, b in zip(genome.levels, self._parent.levels, strict=True))
        unit = next((index for index, differs in enumerate(differences) if differs), None)
        return self._count if unit is None else self.stitcher.grid.units[unit].block

    def _begins(self, pair: Pair) -> int:
        """The first block that must run for a pair."""
        genome, batch = pair
        if self._parent is None:
            return 0
        return next((block for block in range(self._fork(genome), 0, -1) if (batch, block) in self._kept), 0)

    def _waves(self, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
        """Pairs that begin at neighbouring blocks together, as many as there is room for."""
        wave, held = list[Pair](), 0
        width = self.stitcher.dense.config.hidden_size * self.stitcher.dense.dtype.itemsize
        for pair in sorted(pairs, key=self._begins):
            size = self.batches[pair[1]].numel() * width
            if wave and held + size > self.wave_bytes:
                yield wave
                wave, held = [], 0
            wave.append(pair)
            held += size
        if wave:
            yield wave

    def _run(self, wave: list[Pair]) -> dict[Pair, Tensor]:
        runs = [*wave]
        if self._parent is not None:  # whose states are completed where they are not kept yet
            missing = {batch for _, batch in wave if (batch, self._count) not in self._kept}
            runs += [(self._parent, batch) for batch in sorted(missing) if (self._parent, batch) not in wave]
        states: dict[Prefix, Stream] = {}
        first = min(map(self._begins, runs))
        for number, dense in self.blocks.walk(first, self._count):
            self._step(number, dense, runs, states)
        norm = self.stitcher.dense.get_submodule(self.stitcher.family.final_norm)
        last = {}
        for genome, batch in wave:
            prefix = self._prefix(self._count, genome, batch)
            last[genome, batch] = norm(self._state(self._count, prefix, states).states)
            states.pop(prefix, None)
        return last

    def _step(self, number: int, dense: nn.Module, runs: list[Pair], states: dict[Prefix, Stream]) -> None:
        """Replace the streams in front of a block by those behind it."""
        steps: dict[tuple[int, ...], dict[Prefix, tuple[Prefix, Genome]]] = defaultdict(dict)  # by the block's levels
        uses: Counter[Prefix] = Counter()
        for genome, batch in runs:
            before, after = self._prefix(number, genome, batch), self._prefix(number + 1, genome, batch)
            levels = self.stitcher.levels_of(number, genome)
            if not self._is_kept(number + 1, after) and after not in steps[levels]:
                steps[levels][after] = before, genome
                uses[before] += 1
        for wanted in steps.values():
            block = None
            for after, (before, genome) in wanted.items():
                block = self.stitcher.block(number, genome, dense) if block is None else block
                arguments = self._entry(after[0]).arguments[number]
                behind = run_block(block, self._state(number, before, states), arguments)
                uses[before] -= 1
                if not uses[before]:
                    states.pop(before, None)
                states[after] = behind
                if self._is_parents(after):
                    self._kept[after[0], number + 1] = behind.to(self.kept_on)

    def _prefix(self, number: int, genome: Genome, batch: int) -> Prefix:
        """What the states in front of a block depend on."""
        return batch, genome.levels[: self._ends[number]]

    def _is_kept(self, number: int, prefix: Prefix) -> bool:
        return (prefix[0], number) in self._kept and self._is_parents(prefix)

    def _is_parents(self, prefix: Prefix) -> bool:
        return self._parent is not None and prefix[1] == self._parent.levels[: len(prefix[1])]

    def _state(self, number: int, prefix: Prefix, states: dict[Prefix, Stream]) -> Stream:
        """The stream in front of a block."""
        if prefix in states:
            return states[prefix]
        if self._is_kept(number, prefix):
            return self._kept[prefix[0], number].to(self.batches[prefix[0]].device)
        assert not number
        return Stream(self._entry(prefix[0]).states)

    def _entry(self, batch: int) -> Entry:
        if batch not in self._entries:
            self._entries[batch] = enter(self.stitcher.dense, self.stitcher.family, self.batches[batch])
        return self._entries[batch]
