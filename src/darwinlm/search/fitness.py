"""Fitness: how far a stitched candidate is from the dense model, after training it a little (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.config.run import SearchConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.losses.logits import Logits
from darwinlm.losses.metrics import Metric, metric
from darwinlm.runtime import parallel
from darwinlm.search.candidate_training import CandidateTrainer, rounded
from darwinlm.types import Genome, SelectionStage

BATCH_TOKENS = 2048  # in one forward pass: allocations of more cost twice the time on a CPU


@runtime_checkable
class Scorer(Protocol):
    """What an allocator needs of a fitness."""

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        """How bad genomes are after the stage's training, on its fitness tokens: lower is better, infinity is diverged.

        `parent` is a hint: a genome that all of these, and others scored next, differ little from.
        """
        ...


class Fitness:
    """Scores genomes by a metric on fixed tokens; lower is better.

    Every candidate sees the same tokens, and a stage with more of them extends those of the stage before it. So what
    was computed for a genome is not computed again: a later stage adds its own sequences, to the score where nothing is
    trained and to the training where it is, and without training a forward pass begins at the first block in which the
    candidate differs from its parent. None of this changes a score.

    Processes share the candidates. A score does not depend on who computes it.

    Args:
        stitcher: makes the candidates; its dense model is the reference.
        token_ids: on which the metric is taken; stages take prefixes of it.
        training_ids: on which candidates are trained before they are scored; stages take prefixes of it.
        config: its stages decide the batches, so that a score does not depend on what was asked before.
    """

    def __init__(
        self,
        stitcher: Stitcher,
        token_ids: Int[Tensor, "sequences length"],
        training_ids: Int[Tensor, "training_sequences length"],
        config: SearchConfig,
    ):
        self.stitcher = stitcher
        self.device = stitcher.dense.device
        self.length = token_ids.shape[1]
        self._last_training = max(stage.training_tokens for stage in config.stages)
        ends = {self._sequences(stage.fitness_tokens) for stage in config.stages}
        step = max(1, BATCH_TOKENS // self.length)
        ends = sorted(ends.union(range(step, max(ends), step)))
        self._batches = [token_ids[start:end].to(self.device) for start, end in zip([0, *ends], ends, strict=False)]
        self._config = config
        teacher = stitcher.dense if config.loss == "distillation" else None
        consumers = [unit.consumer for unit in stitcher.grid.units] if config.trains == "consumers" else None
        self._tuner = CandidateTrainer(training_ids, config.learning_rate, self.device, teacher, consumers)
        self._sums: dict[Genome, list[float]] = {}  # of untrained candidates, a batch each
        self._trained: dict[tuple[Genome, SelectionStage], float] = {}
        self._owners: dict[Genome, int] = {}  # the process that has computed something of a genome
        self._parent: Genome | None = None
        self._traces: dict[int, _Trace] = {}

    @cached_property
    def _metrics(self) -> list[Metric]:
        """Of every batch. The dense model runs once something is scored, not for a search that is finished."""
        config = self._config
        return [metric(config.metric, self.stitcher.dense, batch, config.top_k) for batch in self._batches]

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        """The metric in nats a token over the stage's fitness tokens, shared out over all processes."""
        found = [0.0] * len(genomes)
        best: list[tuple[float, int]] = []  # so far, of mine: these may go on training
        for index, owner in enumerate(self._assign(genomes)):
            if owner != parallel.rank():
                continue
            found[index] = self._score(genomes[index], stage, parent)
            best = sorted([*best, (found[index], index)])[: stage.survivors]
            self._tuner.forget_all_but([*(genomes[i] for _, i in best), *genomes[index + 1 :]])
        return parallel.sums_everywhere(found)

    def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
        """The score of one genome."""
        return self.scores([genome], stage, parent)[0]

    def _assign(self, genomes: Sequence[Genome]) -> list[int]:
        """Which process scores each genome: the one that has some of it already, unless that has its share."""
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
        if stage.training_tokens:
            key = (genome, stage)
            if key not in self._trained:
                self._trained[key] = self._score_trained(genome, stage)
            return self._trained[key]
        sums = self._sums.setdefault(genome, [])
        if len(sums) < self._count(stage):
            model = self.stitcher.stitch(genome)
            for index in range(len(sums), self._count(stage)):
                trace = None if parent is None else self._trace(parent, index)
                sums.append(self._total(model, index, trace, 0 if parent is None else self._fork(genome, parent)))
        return self._mean(sums[: self._count(stage)])

    def _score_trained(self, genome: Genome, stage: SelectionStage) -> float:
        candidate = self.stitcher.stitch(genome)
        trained = self._tuner.train(genome, candidate, self._sequences(stage.training_tokens))
        with rounded(trained.model, candidate.dtype) as model:
            score = self._mean([self._total(model, index) for index in range(self._count(stage))])
        if stage.training_tokens < self._last_training:
            self._tuner.keep(genome, trained)
        return score

    def _sequences(self, tokens: int) -> int:
        return -(-tokens // self.length)

    def _count(self, stage: SelectionStage) -> int:
        """Batches that make up a stage's fitness tokens."""
        wanted, reached = self._sequences(stage.fitness_tokens), 0
        for count, batch in enumerate(self._batches, 1):
            reached += len(batch)
            if reached >= wanted:
                return count
        raise AssertionError("a stage asks for more fitness tokens than any stage given to Fitness")

    def _mean(self, sums: list[float]) -> float:
        mean = sum(sums) / sum(metric.tokens for metric in self._metrics[: len(sums)])
        return mean if isfinite(mean) else inf

    @torch.inference_mode()
    def _total(self, model: PreTrainedModel, index: int, trace: _Trace | None = None, fork: int = 0) -> float:
        """Sum over a batch's tokens; with the parent's trace only the blocks from `fork` on are run."""
        if trace is None:
            hidden = model.get_decoder()(self._batches[index], use_cache=False).last_hidden_state
        else:
            hidden = trace.states[fork]
            blocks: Any = model.get_submodule(self.stitcher.family.blocks)
            for block, arguments in zip(blocks[fork:], trace.arguments[fork:], strict=True):
                hidden = block(hidden, **arguments)
            hidden = model.get_submodule(self.stitcher.family.final_norm)(hidden)
        return self._metrics[index].total(hidden.flatten(0, 1), Logits(model))

    def _fork(self, genome: Genome, parent: Genome) -> int:
        """The first block in which two genomes differ."""
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
    """What every block of a model was called with on a batch: the stream into it, and masks and angles."""

    states: list[Tensor]
    arguments: list[dict[str, Any]]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, blocks: str, token_ids: Int[Tensor, "sequences length"]) -> _Trace:
        trace = cls([], [])

        def note(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            trace.states.append(arguments[0])
            trace.arguments.append(keywords)

        modules: Any = model.get_submodule(blocks)
        # A stitched model's blocks are its own, so these hooks touch no other model.
        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in modules]
        model.get_decoder()(token_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return trace
