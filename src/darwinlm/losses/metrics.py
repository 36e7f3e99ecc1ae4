"""The metrics by which candidates are compared, for many candidates at a time.

A metric belongs to one batch of token ids and sums over its tokens, a few at a time, so that `[rows, vocab]` logits
stay in cache and none are kept. Sums are in float32 or better, whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from darwinlm.losses.logits import TILE, Logits
from darwinlm.types import MetricName


@runtime_checkable
class Metric(Protocol):
    """The distance of candidates from the dense model, or from the text, on one batch."""

    def totals(self, hidden: Sequence[Float[Tensor, "tokens d_out"]], logits: Logits) -> list[float]:
        """Return the sum over tokens, in nats, for each candidate's last hidden states; lower is better."""
        ...


def label(name: MetricName) -> str:
    """Return the name of a metric as reports show it."""
    return {"kl": "KL", "top-k-kl": "top-k KL", "perplexity": "log-perplexity"}[name]


def predicted_tokens(
    name: MetricName,
    token_ids: Int[Tensor, "sequences length"],
    counts: Bool[Tensor, "sequences length"] | None = None,
) -> int:
    """Return how many tokens of a batch a metric sums over: without a context, perplexity predicts no first token.

    Args:
        counts: as for `metric`.
    """
    sequences, length = token_ids.shape
    predicted = length - (name == "perplexity")
    return sequences * predicted if counts is None else int(counts[:, :predicted].sum())


def metric(
    name: MetricName,
    dense: Float[Tensor, "sequences length d_out"],
    logits: Logits,
    token_ids: Int[Tensor, "sequences length"],
    top_k: int,
    counts: Bool[Tensor, "sequences length"] | None = None,
) -> Metric:
    """Return the named metric on a batch.

    Args:
        dense: the dense model's last hidden states on the batch.
        top_k: matters for the metric `top-k-kl` alone.
        counts: whether the prediction after each token counts; if None, all do.
    """
    if name == "perplexity":
        return CrossEntropy.of(token_ids, counts)
    rows = None if counts is None else counts.flatten().nonzero().flatten().to(dense.device)
    states = dense.flatten(0, 1) if rows is None else dense.flatten(0, 1)[rows]
    top = name == "top-k-kl"
    of_rows = TopKDivergence.of(states, logits, top_k) if top else divergence(states, logits)
    return of_rows if rows is None else Counted(of_rows, rows)


@dataclass(frozen=True)
class Counted:
    """A metric on the tokens that count.

    Attributes:
        metric: on these tokens alone.
        rows: their places in the batch.
    """

    metric: Metric
    rows: Int[Tensor, " counted"]

    def totals(self, hidden: Sequence[Float[Tensor, "tokens d_out"]], logits: Logits) -> list[float]:
        """Return the sum over the tokens that count, in nats, for each candidate's last hidden states."""
        if not len(self.rows):
            return [0.0] * len(hidden)
        return self.metric.totals([states[self.rows] for states in hidden], logits)


def divergence(dense: Float[Tensor, "tokens d_out"], logits: Logits) -> Divergence | LinearDivergence:
    """Return KL(dense || candidate), given the dense model's last hidden states; the cheaper one, where it holds."""
    return (LinearDivergence if logits.is_linear else Divergence).of(dense, logits)


def _normalisers(models: Sequence[Float[Tensor, "tokens d_out"]], logits: Logits) -> Float[Tensor, "models tokens"]:
    """The logarithm of each model's sum of exponentials over the vocabulary."""
    found = models[0].new_full((len(models), len(models[0])), -torch.inf, dtype=_precision(models[0]))
    for rows, _, tiles in logits.tiles(models):
        for index, z in enumerate(tiles):
            found[index, rows] = torch.logaddexp(found[index, rows], z.logsumexp(-1))
    return found


def _precision(states: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, states.dtype)


@dataclass(frozen=True)
class LinearDivergence:
    """KL(dense || candidate), of models whose logits are linear in the last hidden states.

    With the dense model's distribution `p` and logits `d`, and a candidate's logits `z`, the divergence is
    `sum p (d - z) - logsumexp d + logsumexp z`. As logits are products with the output embedding `E`, its first sum is
    the difference of the hidden states times `sum p E`, which is kept: the dense model's logits, over a large
    vocabulary the largest tensor of a search, are made once and kept nowhere.

    Attributes:
        embedding: for each token the mean row of the output embedding under `p`, divided by the logits' scaling.
        constants: for each token what of the divergence does not depend on the candidate.
    """

    embedding: Float[Tensor, "tokens d_out"]
    constants: Float[Tensor, " tokens"]

    @classmethod
    def of(cls, dense: Float[Tensor, "tokens d_out"], logits: Logits) -> LinearDivergence:
        """Return the metric on a batch, given the dense model's last hidden states."""
        (normalisers,) = _normalisers([dense], logits)
        embedding = torch.zeros_like(dense, dtype=_precision(dense))
        for rows, part, (d,) in logits.tiles([dense], TILE):
            weights = (d - normalisers[rows, None]).exp_()
            embedding[rows] += weights @ logits.linear.weight[part].to(weights.dtype)
        embedding /= logits.scaling
        return cls(embedding, torch.linalg.vecdot(dense.to(embedding.dtype), embedding) - normalisers)

    def totals(self, hidden: Sequence[Float[Tensor, "tokens d_out"]], logits: Logits) -> list[float]:
        """Return for each candidate the sum over tokens of KL(dense || candidate)."""
        means = [torch.linalg.vecdot(states.to(self.embedding.dtype), self.embedding) for states in hidden]
        return (self.constants - torch.stack(means) + _normalisers(hidden, logits)).double().sum(-1).tolist()


@dataclass(frozen=True)
class Divergence:
    """KL(dense || candidate), whatever the map from hidden states to logits.

    The dense model's logits are made again for a few tokens at a time, and for all candidates at once.
    """

    dense: Float[Tensor, "tokens d_out"]
    normalisers: Float[Tensor, " tokens"]

    @classmethod
    def of(cls, dense: Float[Tensor, "tokens d_out"], logits: Logits) -> Divergence:
        """Return the metric on a batch, given the dense model's last hidden states."""
        return cls(dense, _normalisers([dense], logits)[0])

    def totals(self, hidden: Sequence[Float[Tensor, "tokens d_out"]], logits: Logits) -> list[float]:
        """Return for each candidate the sum over tokens of KL(dense || candidate)."""
        found = self.normalisers.new_full((len(hidden), len(self.dense)), -torch.inf)
        means = torch.zeros_like(found)  # of the dense model's logits less the candidate's
        for rows, _, tiles in logits.tiles([self.dense, *hidden]):
            d = next(tiles)
            weights = (d - self.normalisers[rows, None]).exp_()
            for index, z in enumerate(tiles):
                means[index, rows] += torch.linalg.vecdot(weights, d - z)
                found[index, rows] = torch.logaddexp(found[index, rows], z.logsumexp(-1))
        return (means - self.normalisers + found).double().sum(-1).tolist()


@dataclass(frozen=True)
class TopKDivergence:
    """KL(dense || candidate) of distributions over the dense model's `top_k` likeliest tokens and "any other".

    It is a lower bound of the whole divergence, and takes a hundredth of its memory.
    """

    indices: Int[Tensor, "tokens top_k"]
    log_probabilities: Float[Tensor, "tokens top_k"]

    @classmethod
    def of(cls, dense: Float[Tensor, "tokens d_out"], logits: Logits, top_k: int) -> TopKDivergence:
        """Return the metric of the `top_k` likeliest tokens, or of the whole vocabulary if it has fewer."""
        if not len(dense):  # no prediction of the batch counts
            return cls(torch.empty(0, 0, dtype=torch.int32), torch.empty(0, 0))
        parts = [z.log_softmax(-1).topk(min(top_k, z.shape[-1])) for _, z in logits.chunks(dense)]
        return cls(torch.cat([part.indices.int() for part in parts]), torch.cat([part.values for part in parts]))

    def totals(self, hidden: Sequence[Float[Tensor, "tokens d_out"]], logits: Logits) -> list[float]:
        """Return for each candidate the sum over tokens of the divergence of the two lumped distributions."""
        return torch.stack([self._total(states, logits) for states in hidden]).tolist()

    def _total(self, hidden: Float[Tensor, "tokens d_out"], logits: Logits) -> Float[Tensor, ""]:
        totals = []
        for rows, z in logits.chunks(hidden):
            log_q = (z.gather(-1, self.indices[rows].long()) - z.logsumexp(-1, keepdim=True)).double()
            log_p = self.log_probabilities[rows].double()
            # A sum of float32 probabilities may pass 1 by its rounding.
            other_p, other_q = (_TINY + (1 - known.exp().sum(-1)).clamp(min=0) for known in (log_p, log_q))
            known = (log_p.exp() * (log_p - log_q)).sum(-1)
            totals.append((known + other_p * (other_p / other_q).log()).sum())
        return torch.stack(totals).sum()


_TINY = 1e-9


@dataclass(frozen=True)
class CrossEntropy:
    """The logarithm of perplexity: the loss on the text's own next tokens, without regard to the dense model.

    Attributes:
        rows: the places in the batch of the tokens after which the prediction counts.
        labels: the tokens that follow them.
    """

    rows: Int[Tensor, " predicted"]
    labels: Int[Tensor, " predicted"]

    @classmethod
    def of(
        cls, token_ids: Int[Tensor, "sequences length"], counts: Bool[Tensor, "sequences length"] | None
    ) -> CrossEntropy:
        """Return the metric on a batch, of the predictions that count."""
        places = torch.arange(token_ids.numel(), device=token_ids.device).view_as(token_ids)[:, :-1]
        rows = places.flatten() if counts is None else places[counts[:, :-1].to(places.device)]
        return cls(rows, token_ids.flatten()[rows + 1])

    def totals(self, hidden: Sequence[Float[Tensor, "tokens d_out"]], logits: Logits) -> list[float]:
        """Return for each candidate the sum over tokens of -log q(next token)."""
        return torch.stack([self._total(states, logits) for states in hidden]).tolist()

    def _total(self, hidden: Float[Tensor, "tokens d_out"], logits: Logits) -> Float[Tensor, ""]:
        totals = [torch.zeros((), dtype=torch.float64, device=hidden.device)]
        for rows, z in logits.chunks(hidden[self.rows]):
            losses = z.logsumexp(-1) - z.gather(-1, self.labels[rows, None]).squeeze(-1)
            totals.append(losses.double().sum())
        return torch.stack(totals).sum()
