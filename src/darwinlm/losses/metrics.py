"""What candidates are compared by: the dense model's side is computed once, for all of them.

A metric belongs to one batch of token ids and sums over its tokens, a few at a time, so that `[rows, vocab]` logits
stay in cache and none are ever kept. Sums are float32 or better, whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.losses.logits import Logits
from darwinlm.types import MetricName

SCALE = 2.0**15  # float16 reaches 65,504


@runtime_checkable
class Metric(Protocol):
    """A candidate's distance from the dense model, or from the text, on one batch."""

    @property
    def tokens(self) -> int:
        """What a sum is divided by."""
        ...

    def total(self, hidden: Float[Tensor, "tokens d_out"], head: Logits) -> float:
        """The sum over tokens, in nats, for a candidate with these last hidden states: lower is better."""
        ...


def label(name: MetricName) -> str:
    """A metric's name for people."""
    return {"kl": "KL", "top-k-kl": "top-k KL", "perplexity": "log-perplexity"}[name]


def metric(name: MetricName, dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"], top_k: int) -> Metric:
    """The metric of a name on a batch."""
    if name == "perplexity":
        return CrossEntropy(token_ids)
    if name == "top-k-kl":
        return TopKDivergence.of(dense, token_ids, top_k)
    return Divergence.of(dense, token_ids)


@dataclass(frozen=True)
class Divergence:
    """KL(dense || candidate) = negentropy - sum p (z - logsumexp z) for logits `z`.

    Probabilities are float16, half of float32's memory, times `SCALE`, or the many small ones of a large vocabulary
    would be zero; negentropy and mass are of the rounded ones, so the divergence of a model to itself is still zero to
    float32's precision.
    """

    probabilities: Float[Tensor, "tokens vocab"]
    negentropy: Float[Tensor, " tokens"]
    mass: Float[Tensor, " tokens"]

    @classmethod
    def of(cls, dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]) -> Divergence:
        """The dense model's distributions."""
        parts = []
        for log_p in _log_probabilities(dense, token_ids):
            p = (SCALE * log_p.exp()).half()
            parts.append((p, (p.float() * log_p).sum(-1) / SCALE, p.float().sum(-1) / SCALE))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @property
    def tokens(self) -> int:
        """All tokens of the batch."""
        return len(self.mass)

    def total(self, hidden: Float[Tensor, "tokens d_out"], head: Logits) -> float:
        """The sum over tokens of KL(dense || candidate)."""
        expected = torch.zeros_like(self.mass)
        normaliser = torch.full_like(self.mass, -torch.inf)
        for rows, columns, z in head.tiles(hidden):
            expected[rows] += torch.linalg.vecdot(self.probabilities[rows, columns].float(), z)
            peak = z.amax(-1, keepdim=True)
            part = z.sub_(peak).exp_().sum(-1).log_() + peak.squeeze(-1)  # logsumexp without a copy
            normaliser[rows] = torch.logaddexp(normaliser[rows], part)
        return (self.negentropy - expected / SCALE + self.mass * normaliser).double().sum().item()


@dataclass(frozen=True)
class TopKDivergence:
    """KL(dense || candidate) of distributions over the dense model's `top_k` likeliest tokens and "any other".

    A lower bound of the whole divergence, in a hundredth of its memory.
    """

    indices: Int[Tensor, "tokens top_k"]
    log_probabilities: Float[Tensor, "tokens top_k"]

    @classmethod
    def of(cls, dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"], top_k: int) -> TopKDivergence:
        """The dense model's likeliest tokens; all of them if the vocabulary has no more than `top_k`."""
        parts = [log_p.topk(min(top_k, log_p.shape[-1])) for log_p in _log_probabilities(dense, token_ids)]
        return cls(torch.cat([part.indices.int() for part in parts]), torch.cat([part.values for part in parts]))

    @property
    def tokens(self) -> int:
        """All tokens of the batch."""
        return len(self.indices)

    def total(self, hidden: Float[Tensor, "tokens d_out"], head: Logits) -> float:
        """The sum over tokens."""
        totals = []
        for rows, z in head.chunks(hidden):
            log_q = (z.gather(-1, self.indices[rows].long()) - z.logsumexp(-1, keepdim=True)).double()
            log_p = self.log_probabilities[rows].double()
            # A sum of float32 probabilities may pass 1 by its rounding.
            other_p, other_q = (_TINY + (1 - known.exp().sum(-1)).clamp(min=0) for known in (log_p, log_q))
            known = (log_p.exp() * (log_p - log_q)).sum(-1)
            totals.append((known + other_p * (other_p / other_q).log()).sum())
        return torch.stack(totals).sum().item()


_TINY = 1e-9


@dataclass(frozen=True)
class CrossEntropy:
    """The logarithm of perplexity: the text's own next tokens, whatever the dense model says of them."""

    token_ids: Int[Tensor, "sequences length"]

    @property
    def tokens(self) -> int:
        """Every token but the first of each sequence."""
        sequences, length = self.token_ids.shape
        return sequences * (length - 1)

    def total(self, hidden: Float[Tensor, "tokens d_out"], head: Logits) -> float:
        """The sum over tokens of -log q(next token)."""
        sequences, length = self.token_ids.shape
        states = hidden.unflatten(0, (sequences, length))[:, :-1].flatten(0, 1)
        wanted = self.token_ids[:, 1:].flatten()
        totals = []
        for rows, z in head.chunks(states):
            surprise = z.logsumexp(-1) - z.gather(-1, wanted[rows, None]).squeeze(-1)
            totals.append(surprise.double().sum())
        return torch.stack(totals).sum().item()


@torch.inference_mode()
def _log_probabilities(
    dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]
) -> Iterator[Float[Tensor, "rows vocab"]]:
    hidden = dense.get_decoder()(token_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    for _, logits in Logits(dense).chunks(hidden):
        yield logits.log_softmax(-1)
