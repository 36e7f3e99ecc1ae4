"""What a search holds on its device, counted from shapes before it begins, and what a limit leaves for its caches.

Caches save time and change no result: what is not kept waits in the host's memory, is trained again, or is read from
the database again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from darwinlm.config.run import GuardConfig, RefitConfig, SearchConfig
from darwinlm.evaluation.memory import FLOAT
from darwinlm.genome import Grid, prunable_parameters
from darwinlm.losses.logits import ROWS
from darwinlm.report.tables import size
from darwinlm.search.candidate_training import KEPT_BYTES
from darwinlm.search.costs import cache_costs
from darwinlm.search.fitness import BATCH_TOKENS
from darwinlm.search.guard import BATCH
from darwinlm.search.lockstep import WAVE_BYTES
from darwinlm.training.low_rank import low_rank_weights
from darwinlm.training.refit import FORWARD_TOKENS
from darwinlm.types import Genome, UsageError

LOGITS = 4  # tensors of a few tokens' logits, in float32: as they are made, and what a loss or its gradient needs
STREAMS = 4  # of hidden states that a wave has at least: in front of a block and behind it, and the parent's
PROMPT = 512  # tokens of a prompt of the guard's. Assumed
HEADROOM = 0.92  # of the limit is counted on: an allocator cannot use every gap between tensors


@dataclass(frozen=True)
class SearchMemory:
    """Bytes on the device, by what they are for. Where work takes turns, the largest counts.

    Attributes:
        dense: the dense model, in the search's precision.
        ends: what is not in its blocks, which a refit holds too.
        block: the largest block.
        narrow: the narrow modules of one candidate.
        targets: what is kept of every batch: how it enters the blocks, and the metric's part of the dense model.
        stream: the hidden states of a candidate on a batch.
        scoring: what a block's forward pass or the logits of a few tokens take.
        training: what training a candidate takes before selection, its activations included; 0 without training.
        frozen: what a candidate in training has of its own beside that, where the dense model is not on the device.
        refit: what the refit takes beside the pruned model; 0 without one.
        states: the parent's states in front of every block, where candidates are scored untrained.
        survivors: the states of survivors that will be trained further, which save training them again.
        answers: what the guard's answers take beside the model that writes them, which is whole; 0 without a guard.
    """

    dense: int
    ends: int
    block: int
    narrow: int
    targets: int
    stream: int
    scoring: int
    training: int
    frozen: int
    refit: int
    states: int
    survivors: int
    answers: int

    @property
    def resident(self) -> int:
        """What a search holds whose dense model stays on the device."""
        return self.dense + self.candidate + self._beside

    @property
    def candidate(self) -> int:
        """What a resident search holds of a candidate: all of one that trains or answers, else a block at a time."""
        return self.narrow if self.training or self.answers else self.block

    @property
    def visiting(self) -> int:
        """What a search holds whose blocks come from the host's memory: two, and a candidate's version of one.

        Candidates that are trained are whole, and are trained when no block visits. So is the dense model when the
        guard asks it.
        """
        scored = 3 * self.block + STREAMS * self.stream + self.scoring
        trained = self.block + self.frozen + self.training if self.training else 0
        return self.ends + self.targets + max(scored, trained, self.answered)

    @property
    def answered(self) -> int:
        """The dense model's blocks and its answers, if the guard asks for any, beside narrow modules of a block."""
        return self.block + self.dense - self.ends + self.answers if self.answers else 0

    @property
    def _beside(self) -> int:
        return self.targets + max(STREAMS * self.stream + self.scoring, self.training, self.answers)

    @property
    def search(self) -> int:
        """What a search cannot do without."""
        return min(self.resident, self.visiting)

    @property
    def refitting(self) -> int:
        """What the refit cannot do without: a block at a time of the dense model for its targets, then what trains."""
        return self.ends + max(self.block + self.scoring, self.narrow + self.refit) if self.refit else 0

    @property
    def least(self) -> int:
        """What a search and its refit cannot do without; they take turns."""
        return max(self.search, self.refitting)

    @property
    def caches(self) -> int:
        """What more a search uses to save time: blocks, the parent's states, survivors, and narrow modules."""
        return self.resident - self.search + self.states + self.survivors + self.narrow


@dataclass(frozen=True)
class Allowance:
    """What a search may keep on its device to save time.

    Attributes:
        resident: whether the dense model stays there; its blocks come from the host's memory otherwise.
        narrow: bytes of narrow modules, those of the candidate at work included; None if they are not limited.
        states: whether the parent's states in front of every block are kept there, and not in the host's memory.
        survivors: bytes of survivors' training states.
        wave: bytes of candidates' hidden states between two blocks.
    """

    resident: bool = True
    narrow: int | None = None
    states: bool = True
    survivors: int = KEPT_BYTES
    wave: int = WAVE_BYTES


def count_memory(
    parameters: int,
    config: PretrainedConfig,
    grid: Grid,
    genome: Genome,
    search: SearchConfig,
    refit: RefitConfig,
    length: int,
    dtype: torch.dtype,
    guard: GuardConfig | None = None,
) -> SearchMemory:
    """Count what a search takes.

    Args:
        parameters: parameters of the dense model, embeddings included.
        genome: one of the size that is searched for.
        length: tokens in a sequence.
        dtype: precision of the search.
        guard: of the search, if it has one.
    """
    each, hidden, vocab = dtype.itemsize, config.hidden_size, config.vocab_size
    blocks = 1 + max(unit.block for unit in grid.units)
    of_block = [sum(unit.parameters(0) for unit in grid.units if unit.block == block) for block in range(blocks)]
    inputs, narrow = grid.inputs(genome), prunable_parameters(grid, genome)
    consumers = sum(inputs) * hidden
    trained = consumers if search.trains == "consumers" else narrow
    tokens = max(stage.fitness_tokens for stage in search.stages)
    batch = min(max(BATCH_TOKENS, length), tokens)
    # In the widest unit: the stream, its norm and sum, and three tensors of the unit's width.
    widest = max(unit.structures * unit.structure_width for unit in grid.units)
    in_flight = each * (4 * hidden + 3 * widest)
    together = min(refit.batch_size, max(1, FORWARD_TOKENS // length))  # sequences of a step of the refit
    of_batch, of_sequence, of_refit = (
        LOGITS * FLOAT * min(ROWS, tokens) * vocab for tokens in (batch, length, together * length)
    )
    scoring = max(batch * in_flight, of_batch)
    steps = [stage.training_tokens for stage in search.stages]
    stream = each * length * hidden * (blocks + 1)
    kept = _activations(inputs, hidden, blocks, each, length) // blocks + stream  # of a sequence
    updates = low_rank_weights(grid, genome, hidden, refit.rank)
    # Of a block, what the norms in front of its units give, and what lies between the two matrices of an update.
    of_updates = length * each * (2 * hidden + 5 * refit.rank) if refit.rank else 0
    twice = kept + 2 * of_sequence
    survivors = max((stage.survivors for stage in search.stages[:-1] if stage.training_tokens), default=0)
    return SearchMemory(
        dense=each * parameters,
        ends=each * (parameters - prunable_parameters(grid, grid.dense())),
        block=each * max(of_block),
        narrow=each * narrow,
        targets=_targets(search, tokens, hidden, each),
        stream=each * batch * hidden,
        scoring=scoring,
        training=_training(trained, each, twice, scoring) if any(steps) else 0,
        frozen=each * (narrow - trained) if any(steps) else 0,
        # Gradients have their place throughout, and the stitched model's own consumers are replaced.
        refit=(4 * FLOAT - each) * consumers + 4 * FLOAT * updates + together * (kept + of_updates) + 2 * of_refit
        if refit.tokens
        else 0,
        states=0 if all(steps) else blocks * tokens * hidden * each,
        survivors=3 * FLOAT * trained * survivors,
        answers=0
        if guard is None or guard.chat is None
        else BATCH * PROMPT * in_flight + _cached(grid, config, guard, each),
    )


def allowance(memory: SearchMemory, limit: int | None) -> Allowance:
    """Divide what a limit leaves: first to the blocks, then to the parent's states, then to survivors and streams.

    The rest goes to narrow modules.

    Args:
        limit: bytes of the device, or None if it is not known.

    Raises:
        UsageError: if the limit is below what the search cannot do without.
    """
    if limit is None:
        return Allowance()
    usable = int(HEADROOM * limit)
    if usable < memory.least:
        raise UsageError(_too_little(memory, limit))
    resident = memory.resident <= usable
    left = usable - (memory.resident if resident else memory.visiting)
    states = memory.states <= left
    left -= memory.states if states else 0
    survivors = min(memory.survivors, left // 2)
    more = min(max(WAVE_BYTES - 2 * memory.stream, 0), left // 2)
    narrow = (memory.candidate if resident else memory.block) + left - survivors - more
    return Allowance(resident, narrow, states, survivors, 2 * memory.stream + more)


def _too_little(memory: SearchMemory, limit: int) -> str:
    """What is expected of a limit that is too low, and what to take instead."""
    if memory.refitting == memory.least:
        remedy = "take --refit.tokens 0"
    elif memory.answers and memory.least == memory.ends + memory.targets + memory.answered:
        remedy = "leave --guard.chat out"
    elif memory.training > memory.dense:
        remedy = "take --search.trains consumers, or --search.stages without training_tokens"
    else:
        remedy = "take a device with more memory, or --device cpu"
    return (
        f"--memory: expected {size(memory.least / HEADROOM)} on the device for a search of this model, found "
        f"{size(limit)}; {remedy}"
    )


def _targets(search: SearchConfig, tokens: int, hidden: int, each: int) -> int:
    """Bytes of embedded tokens, and of what `losses.metrics` keeps of the dense model."""
    kept = {"perplexity": 0, "top-k-kl": 2 * FLOAT * search.top_k, "kl": FLOAT * hidden}[search.metric]
    return tokens * (each * hidden + kept)


def _cached(grid: Grid, config: PretrainedConfig, guard: GuardConfig, each: int) -> int:
    """Bytes of the dense model's keys and values for the answers that are written at a time, and of their logits."""
    tokens = BATCH * (PROMPT + guard.tokens)
    cached = cache_costs(grid, config, each).of(grid.dense())
    return tokens * cached + LOGITS * FLOAT * BATCH * config.vocab_size


def _training(weights: int, each: int, activations: int, scoring: int) -> int:
    """Bytes of weights that train in float32 with two moments of AdamW, and what a step or scoring adds.

    A step adds gradients, beside which the activations of a block are there; scoring rounds the weights.
    """
    return 3 * FLOAT * weights + max(FLOAT * weights + activations, each * weights + scoring)


def _activations(inputs: list[int], hidden: int, blocks: int, each: int, tokens: int) -> int:
    """Bytes that a backward pass through frozen projections needs of the forward pass.

    They are, for each unit, the stream in float32 in front of its norm, and five tensors as wide as what its consumer
    reads: of an attention queries, keys, values and what is attended to, of an MLP the gate, its activation, the other
    factor and the product.
    """
    return tokens * (2 * FLOAT * hidden * blocks + 5 * each * sum(inputs))
