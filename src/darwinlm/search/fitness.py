"""The fitness of a genome: how far its candidate is from the dense model after a little training (section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.config.run import SearchConfig
from darwinlm.data.packing import cut, scramble
from darwinlm.database.stitch import Stitcher
from darwinlm.losses.logits import Logits
from darwinlm.losses.metrics import Metric, metric
from darwinlm.runtime import parallel
from darwinlm.search.candidate_training import KEPT_BYTES, CandidateTrainer, rounded
from darwinlm.types import Genome, SelectionStage

BATCH_TOKENS = 2048  # in one forward pass: with more, its allocations take twice the time on a CPU


@runtime_checkable
class Scorer(Protocol):
    """What an allocator needs to score genomes."""

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        """Score genomes after the stage's training on its fitness tokens; lower is better, infinity means divergence.

        `parent` is a hint that saves time: a genome from which these, and those scored next, differ little.
        """
        ...


class Fitness:
    """Scores genomes by a metric on fixed tokens; lower is better.

    A stage takes exactly its number of tokens from the beginning of the text: whole sequences, then the beginning of
    the next. Every candidate sees the same tokens, and nothing is computed twice for a genome. Without training, a
    later stage scores only what it adds: whole sequences that no earlier one has scored, and its own beginning of one.
    With training, it trains only on the tokens that it adds. Without training, a forward pass also begins at the first
    block in which the candidate differs from its parent. None of this changes a score.

    Candidates are split among processes. A score does not depend on which process computes it.

    Args:
        stitcher: makes the candidates; its dense model is the reference.
        token_ids: the text that the metric is computed on. A share of each sequence, once it is cut, is put in random
            order (`config.scrambled`), but not for perplexity.
        training_ids: the text that candidates are trained on before they are scored.
        config: settings whose stages determine the batches, so that a score does not depend on earlier calls.
        bos: the token that begins every sequence, if the model expects one.
        keeps_states: whether the parent's states in front of every block are kept, which saves the blocks before the
            first that differs.
        kept_bytes: the most that the states of survivors in training take on the device.
    """

    def __init__(
        self,
        stitcher: Stitcher,
        token_ids: Int[Tensor, "sequences length"],
        training_ids: Int[Tensor, "training_sequences length"],
        config: SearchConfig,
        bos: int | None = None,
        keeps_states: bool = True,
        kept_bytes: int = KEPT_BYTES,
    ):
        self.stitcher = stitcher
        self.device = stitcher.dense.device
        self.length = token_ids.shape[1]
        self._last_training = max(stage.training_tokens for stage in config.stages)
        self._batches, self._of_tokens = self._batch(token_ids, config)
        self._config = config
        teacher = stitcher.dense if config.loss == "distillation" else None
        consumers = [unit.consumer for unit in stitcher.grid.units] if config.trains == "consumers" else None
        pieces = cut(training_ids, {stage.training_tokens for stage in config.stages}, bos)
        self._trainer = CandidateTrainer(pieces, config.learning_rate, self.device, teacher, consumers, kept_bytes)
        self._keeps_states = keeps_states
        self._sums: dict[Genome, dict[int, float]] = {}  # of untrained candidates, one sum for each batch
        self._trained: dict[tuple[Genome, SelectionStage], float] = {}
        self._owners: dict[Genome, int] = {}  # the process that holds earlier results for a genome
        self._parent: Genome | None = None
        self._traces: dict[int, _Trace] = {}

    def _batch(
        self, token_ids: Int[Tensor, "sequences length"], config: SearchConfig
    ) -> tuple[list[Tensor], dict[int, list[int]]]:
        """Return the batches, and for each number of fitness tokens which of them a stage scores."""
        share = 0.0 if config.metric == "perplexity" else config.scrambled
        counts = {stage.fitness_tokens: divmod(stage.fitness_tokens, self.length) for stage in config.stages}
        most, step = max(sequences for sequences, _ in counts.values()), max(1, BATCH_TOKENS // self.length)
        ends = sorted({0, *(sequences for sequences, _ in counts.values()), *range(0, most, step)})
        whole = scramble(token_ids[:most], share)
        batches = [whole[start:end] for start, end in pairwise(ends)]
        of_tokens = {}
        for tokens, (sequences, rest) in counts.items():
            of_tokens[tokens] = list(range(ends.index(sequences)))
            if rest > (config.metric == "perplexity"):  # which no single token has
                of_tokens[tokens].append(len(batches))
                batches.append(scramble(token_ids[sequences : sequences + 1, :rest], share))
        return [batch.to(self.device) for batch in batches], of_tokens

    @cached_property
    def _metrics(self) -> list[Metric]:
        """The metric on every batch. The dense model runs only when a genome is scored first."""
        config = self._config
        return [metric(config.metric, self.stitcher.dense, batch, config.top_k) for batch in self._batches]

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        """Return the metric of each genome, in nats a token, on the stage's fitness tokens; all processes take part."""
        scores = [0.0] * len(genomes)
        best: list[tuple[float, int]] = []  # of this process so far: these may be trained further
        for index, owner in enumerate(self._assign(genomes)):
            if owner != parallel.rank():
                continue
            scores[index] = self._score(genomes[index], stage, parent)
            best = sorted([*best, (scores[index], index)])[: stage.survivors]
            self._trainer.forget_all_but([*(genomes[i] for _, i in best), *genomes[index + 1 :]])
        return parallel.sums_everywhere(scores)

    def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
        """Return the score of one genome, as `scores` does for several."""
        return self.scores([genome], stage, parent)[0]

    def _assign(self, genomes: Sequence[Genome]) -> list[int]:
        """Return which process scores each genome: the one that holds earlier results, unless it has its full share."""
        count = parallel.processes()
        share = -(-len(genomes) // count)
        loads = [0] * count
        for genome in genomes:
            owner = self._owners.get(genome, -1)
            if owner < 0 or loads[owner] == share:
                owner = loads.index(min(loads))
            loads[owner] += 1
            self._owners[genome] = owner
        return [self._owners[genome] for genome in genomes]

    def _score(self, genome: Genome, stage: SelectionStage, parent: Genome | None) -> float:
        parent = parent if self._keeps_states else None
        if stage.training_tokens:
            key = (genome, stage)
            if key not in self._trained:
                self._trained[key] = self._score_trained(genome, stage)
            return self._trained[key]
        sums = self._sums.setdefault(genome, {})
        missing = [index for index in self._of_tokens[stage.fitness_tokens] if index not in sums]
        if missing:
            model = self.stitcher.stitch(genome)
            for index in missing:
                trace = None if parent is None else self._trace(parent, index)
                sums[index] = self._total(model, index, trace, 0 if parent is None else self._fork(genome, parent))
        return self._mean(stage, sums)

    def _score_trained(self, genome: Genome, stage: SelectionStage) -> float:
        candidate = self.stitcher.stitch(genome)
        trained = self._trainer.train(genome, candidate, stage.training_tokens)
        with rounded(trained.model, candidate.dtype) as model:
            sums = {index: self._total(model, index) for index in self._of_tokens[stage.fitness_tokens]}
            score = self._mean(stage, sums)
        if stage.training_tokens < self._last_training:
            self._trainer.keep(genome, trained)
        return score

    def _mean(self, stage: SelectionStage, sums: Mapping[int, float]) -> float:
        """Return the mean over a stage's tokens, given the sum over each batch."""
        indices = self._of_tokens[stage.fitness_tokens]
        mean = sum(sums[index] for index in indices) / sum(self._metrics[index].tokens for index in indices)
        return mean if isfinite(mean) else inf

    @torch.inference_mode()
    def _total(self, model: PreTrainedModel, index: int, trace: _Trace | None = None, fork: int = 0) -> float:
        """Return the metric's sum over a batch's tokens; with the parent's trace, only blocks from `fork` on run."""
        if trace is None:
            hidden = model.get_decoder()(self._batches[index], use_cache=False).last_hidden_state
        else:
            hidden = trace.states[fork]
            blocks: Any = model.get_submodule(self.stitcher.family.blocks)
            for block, arguments in zip(blocks[fork:], trace.arguments[fork:], strict=True):
                hidden = block(hidden, **arguments)
            hidden = model.get_submodule(self.stitcher.family.final_norm)(hidden)
        return self._metrics[index].total(hidden.flatten(0, 1), Logits.of(model))

    def _fork(self, genome: Genome, parent: Genome) -> int:
        """Return the first block in which two genomes differ."""
        units = zip(self.stitcher.grid.units, genome.levels, parent.levels, strict=True)
        return next((unit.block for unit, level, other in units if level != other), 0)

    def _trace(self, parent: Genome, index: int) -> _Trace:
        if parent != self._parent:
            self._parent, self._traces = parent, {}
        if index not in self._traces:
            model = self.stitcher.stitch(parent)
            self._traces[index] = _Trace.of(model, self.stitcher.family.blocks, self._batches[index])
        return self._traces[index]


@dataclass(frozen=True)
class _Trace:
    """The inputs of every block of a model on one batch.

    Attributes:
        states: the hidden states that enter each block, `[sequences, length, d_out]`.
        arguments: the keyword arguments of each block, such as masks and rotary angles.
    """

    states: list[Tensor]
    arguments: list[dict[str, Any]]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, blocks: str, token_ids: Int[Tensor, "sequences length"]) -> _Trace:
        trace = cls([], [])

        def record(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            trace.states.append(arguments[0])
            trace.arguments.append(keywords)

        modules: Any = model.get_submodule(blocks)
        # A stitched model shares no block with another model, so these hooks affect no other.
        hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in modules]
        model.get_decoder()(token_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return trace
