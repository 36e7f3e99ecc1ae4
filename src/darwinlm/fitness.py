"""Fitness: the KL divergence from the dense model to a stitched candidate, after training it a little (section 3.2)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.surgery import Stitcher
from darwinlm.types import Genome, SelectionStage

ROWS = 128  # tokens whose [rows, vocab] logits are worked on at once: they stay in cache


@runtime_checkable
class Scorer(Protocol):
    """What an allocator needs of a fitness."""

    def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
        """How bad a genome is after the stage's training, on its fitness tokens: lower is better.

        `parent` is a hint: a genome that others scored next also differ little from.
        """
        ...


class Fitness:
    """Scores genomes against the dense model on fixed tokens; lower is better.

    Every candidate sees the same tokens, and a stage with more fitness tokens extends those of the stage before it. So
    what was once computed for a genome without training is never computed again: a later stage adds its own sequences,
    and a candidate's forward pass begins at the first block in which it differs from its parent.

    Args:
        stitcher: makes the candidates; its dense model is the reference.
        token_ids: on which KL is measured; stages take prefixes of it.
        training_ids: on which candidates are trained before they are scored; stages take prefixes of it.
        stages: their fitness tokens decide the batches, so that a score does not depend on what was asked before.
        learning_rate: of AdamW in that training.
    """

    def __init__(
        self,
        stitcher: Stitcher,
        token_ids: Int[Tensor, "sequences length"],
        training_ids: Int[Tensor, "training_sequences length"],
        stages: tuple[SelectionStage, ...],
        learning_rate: float,
    ):
        self.stitcher = stitcher
        self.device = stitcher.dense.device
        self.training_ids = training_ids
        self.learning_rate = learning_rate
        self.length = token_ids.shape[1]
        ends = sorted({self._sequences(stage.fitness_tokens) for stage in stages})
        self._batches = [token_ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        self._references = [_Reference.of(stitcher.dense, batch.to(self.device)) for batch in self._batches]
        self._sums: dict[Genome, list[float]] = {}
        self._trained: dict[tuple[Genome, SelectionStage], float] = {}
        self._parent: Genome | None = None
        self._traces: dict[int, _Trace] = {}

    def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
        """KL(dense || candidate) in nats a token over the stage's fitness tokens; infinity if it diverged.

        What the blocks before the first difference from `parent` compute is taken from the parent's own pass. It makes
        the score no other, only sooner; pass the same parent for many genomes, because one parent is remembered.
        """
        if stage.training_tokens:
            key = (genome, stage)
            if key not in self._trained:
                model = self._train(self.stitcher.stitch(genome), stage.training_tokens)
                self._trained[key] = self._mean([self._batch_kl(model, i) for i in range(self._count(stage))])
            return self._trained[key]
        sums = self._sums.setdefault(genome, [])
        if len(sums) < self._count(stage):
            model = self.stitcher.stitch(genome)
            for index in range(len(sums), self._count(stage)):
                trace = None if parent is None else self._trace(parent, index)
                sums.append(self._batch_kl(model, index, trace, 0 if parent is None else self._fork(genome, parent)))
        return self._mean(sums[: self._count(stage)])

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
        mean = sum(sums) / sum(batch.numel() for batch in self._batches[: len(sums)])
        return mean if mean == mean else float("inf")

    @torch.inference_mode()
    def _batch_kl(self, model: PreTrainedModel, index: int, trace: _Trace | None = None, fork: int = 0) -> float:
        """Sum over a batch's tokens; with the parent's trace only the blocks from `fork` on are run."""
        if trace is None:
            hidden = model.get_decoder()(self._batches[index].to(self.device), use_cache=False).last_hidden_state
        else:
            hidden = trace.states[fork]
            blocks: Any = model.get_submodule(self.stitcher.family.blocks)
            for block, arguments in zip(blocks[fork:], trace.arguments[fork:], strict=True):
                hidden = block(hidden, **arguments)
            hidden = model.get_submodule(self.stitcher.family.final_norm)(hidden)
        return self._references[index].kl(hidden.flatten(0, 1), _head(model))

    def _fork(self, genome: Genome, parent: Genome) -> int:
        """The first block in which two genomes differ."""
        units = zip(self.stitcher.grid.units, genome.levels, parent.levels, strict=True)
        return next((unit.block for unit, level, other in units if level != other), 0)

    def _trace(self, parent: Genome, index: int) -> _Trace:
        if parent != self._parent:
            self._parent, self._traces = parent, {}
        if index not in self._traces:
            model = self.stitcher.stitch(parent)
            ids = self._batches[index].to(self.device)
            self._traces[index] = _Trace.of(model, self.stitcher.family.blocks, ids)
        return self._traces[index]

    def _train(self, candidate: PreTrainedModel, tokens: int) -> PreTrainedModel:
        """A copy of the candidate after AdamW steps with the language-model loss, one step a sequence.

        Weights are float32 while they train: at 1e-5 a bfloat16 step rounds away.
        """
        dtype = candidate.dtype
        model: Any = copy.deepcopy(candidate).float().train()
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.0)
        for batch in self.training_ids[: self._sequences(tokens)].split(1):
            ids = batch.to(self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return model.requires_grad_(False).to(dtype).eval()


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


@dataclass(frozen=True)
class _Reference:
    """The dense model's distribution at every token of a batch, kept once: KL = negentropy - sum p (z - logsumexp z).

    Probabilities are float16, half of float32's memory; negentropy and mass are of the rounded ones, so the divergence
    of a model to itself is still zero to float32's precision.
    """

    probabilities: Float[Tensor, "tokens vocab"]
    negentropy: Float[Tensor, " tokens"]
    mass: Float[Tensor, " tokens"]

    @classmethod
    @torch.inference_mode()
    def of(cls, dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]) -> _Reference:
        hidden = dense.get_decoder()(token_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        parts = []
        for rows in hidden.split(ROWS):
            log_p = _logits(_head(dense), rows).log_softmax(-1)
            p = log_p.exp().half()
            parts.append((p, (p.float() * log_p).sum(-1), p.float().sum(-1)))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def kl(self, hidden: Float[Tensor, "tokens d_out"], head: nn.Module) -> float:
        """Sum over tokens of KL(dense || candidate), accumulated in float32 or better."""
        total = 0.0
        rows = zip(hidden.split(ROWS), self.probabilities.split(ROWS), strict=True)
        consts = zip(self.negentropy.split(ROWS), self.mass.split(ROWS), strict=True)
        for (states, p), (negentropy, mass) in zip(rows, consts, strict=True):
            z = _logits(head, states)
            divergence = negentropy - torch.linalg.vecdot(p.float(), z) + mass * z.logsumexp(-1)
            total += divergence.double().sum().item()
        return total


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert head is not None
    return head


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    return head(hidden).float()
