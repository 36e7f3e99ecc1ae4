"""The metrics by which candidates are compared. The dense model's part of a metric is computed once for all of them.

A metric belongs to one batch of token ids and sums over its tokens, a few at a time, so that `[rows, vocab]` logits
stay in cache and none are kept. Sums are in float32 or better, whatever the model's precision.
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
        """The number of tokens that a sum is divided by for a mean."""
        ...

    def total(self, hidden: Float[Tensor, "tokens d_out"], logits: Logits) -> float:
        """Return the sum over tokens, in nats, for a candidate's last hidden states; lower is better."""
        ...


def label(name: MetricName) -> str:
    """Return the name of a metric as reports show it."""
    return {"kl": "KL", "top-k-kl": "top-k KL", "perplexity": "log-perplexity"}[name]


def metric(name: MetricName, dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"], top_k: int) -> Metric:
    """Return the named metric on a batch. `top_k` counts for the metric `top-k-kl` alone."""
    if name == "perplexity":
        return CrossEntropy(token_ids)
    if name == "top-k-kl":
        return TopKDivergence.of(dense, token_ids, top_k)
    return Divergence.of(dense, token_ids)


@dataclass(frozen=True)
class Divergence:
    """KL(dense || candidate) = negentropy - sum p (z - logsumexp z) for logits `z`.

    Probabilities are kept in float16, which takes half of float32's memory. They are multiplied by `SCALE`, because the
    many small ones of a large vocabulary would otherwise be zero. Negentropy and mass are those of the rounded
    probabilities, so the divergence of a model from itself is still zero to float32's precision.
    """

    probabilities: Float[Tensor, "tokens vocab"]
    negentropy: Float[Tensor, " tokens"]
    mass: Float[Tensor, " tokens"]

    @classmethod
    def of(cls, dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]) -> Divergence:
        """Return the metric that keeps the dense model's distributions on a batch."""
        probabilities, sums = torch.empty(0), []
        for rows, log_p in _log_probabilities(dense, token_ids):
            if not rows.start:  # the whole at once: parts and their concatenation would take twice the memory
                probabilities = log_p.new_empty(token_ids.numel(), log_p.shape[-1], dtype=torch.float16)
            p = probabilities[rows].copy_(log_p.exp().mul_(SCALE)).float()
            sums.append(torch.stack([torch.linalg.vecdot(p, log_p), p.sum(-1)]) / SCALE)
        return cls(probabilities, *torch.cat(sums, dim=1))

    @property
    def tokens(self) -> int:
        """The number of tokens in the batch."""
        return len(self.mass)

    def total(self, hidden: Float[Tensor, "tokens d_out"], logits: Logits) -> float:
        """Return the sum over tokens of KL(dense || candidate)."""
        expected = torch.zeros_like(self.mass)
        normaliser = torch.full_like(self.mass, -torch.inf)
        for rows, columns, z in logits.tiles(hidden):
            expected[rows] += torch.linalg.vecdot(self.probabilities[rows, columns].float(), z)
            peak = z.amax(-1, keepdim=True)
            part = z.sub_(peak).exp_().sum(-1).log_() + peak.squeeze(-1)  # logsumexp without a copy
            normaliser[rows] = torch.logaddexp(normaliser[rows], part)
        return (self.negentropy - expected / SCALE + self.mass * normaliser).double().sum().item()


@dataclass(frozen=True)
class TopKDivergence:
    """KL(dense || candidate) of distributions over the dense model's `top_k` likeliest tokens and "any other".

    It is a lower bound of the whole divergence, and takes a hundredth of its memory.
    """

    indices: Int[Tensor, "tokens top_k"]
    log_probabilities: Float[Tensor, "tokens top_k"]

    @classmethod
    def of(cls, dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"], top_k: int) -> TopKDivergence:
        """Return the metric of the `top_k` likeliest tokens, or of the whole vocabulary if it has fewer."""
        parts = [log_p.topk(min(top_k, log_p.shape[-1])) for _, log_p in _log_probabilities(dense, token_ids)]
        return cls(torch.cat([part.indices.int() for part in parts]), torch.cat([part.values for part in parts]))

    @property
    def tokens(self) -> int:
        """The number of tokens in the batch."""
        return len(self.indices)

    def total(self, hidden: Float[Tensor, "tokens d_out"], logits: Logits) -> float:
        """Return the sum over tokens of the divergence of the two lumped distributions."""
        totals = []
        for rows, z in logits.chunks(hidden):
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
    """The logarithm of perplexity: the loss on the text's own next tokens, without regard to the dense model."""

    token_ids: Int[Tensor, "sequences length"]

    @property
    def tokens(self) -> int:
        """The number of tokens that are predicted: all but the first of each sequence."""
        sequences, length = self.token_ids.shape
        return sequences * (length - 1)

    def total(self, hidden: Float[Tensor, "tokens d_out"], logits: Logits) -> float:
        """Return the sum over tokens of -log q(next token)."""
        sequences, length = self.token_ids.shape
        states = hidden.unflatten(0, (sequences, length))[:, :-1].flatten(0, 1)
        labels = self.token_ids[:, 1:].flatten()
        totals = []
        for rows, z in logits.chunks(states):
            losses = z.logsumexp(-1) - z.gather(-1, labels[rows, None]).squeeze(-1)
            totals.append(losses.double().sum())
        return torch.stack(totals).sum().item()


@torch.inference_mode()
def _log_probabilities(
    dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]
) -> Iterator[tuple[slice, Float[Tensor, "rows vocab"]]]:
    hidden = dense.get_decoder()(token_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    for rows, logits in Logits.of(dense).chunks(hidden):
        yield rows, logits.log_softmax(-1)
