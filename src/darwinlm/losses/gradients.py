"""The gradients of two losses for the logits of a few tokens, in the form that `Logits.gradient` takes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from darwinlm.losses.logits import Logits


class CrossEntropyGradient:
    """Mean cross-entropy with the next tokens: `dL/dz = (softmax(z) - onehot) / tokens`."""

    def __init__(self, labels: Int[Tensor, " tokens"]):
        self.labels = labels

    def __call__(self, rows: slice, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        difference = logits.softmax(-1)
        difference.scatter_add_(-1, self.labels[rows, None], -torch.ones_like(difference[:, :1]))
        return difference.div_(len(self.labels))


class KLGradient:
    """KL(dense || model), divided by `tokens`: `dL/dz = (softmax(z) - p) / tokens`. Rows must come once and in order.

    Args:
        logits: the dense model's map from hidden states to logits.
        hidden: the dense model's last hidden states.
        tokens: the divisor: the number of tokens over which the loss is a mean.
    """

    def __init__(self, logits: Logits, hidden: Float[Tensor, "tokens d_out"], tokens: int):
        self.tokens = tokens
        self._dense = logits.chunks(hidden)
        self._total = torch.zeros((), dtype=torch.float64, device=hidden.device)

    def __call__(self, rows: slice, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        dense_rows, dense = next(self._dense)
        assert dense_rows == rows
        log_p, log_q = dense.log_softmax(-1), logits.log_softmax(-1)
        p = log_p.exp()
        self._total += torch.linalg.vecdot(p, log_p - log_q).double().sum()
        return log_q.exp_().sub_(p).div_(self.tokens)

    @property
    def total(self) -> float:
        """The divergence summed over the rows so far, in nats."""
        return self._total.item()
