"""The gradients of two losses for the logits of a few tokens, as `Logits.gradient` asks for them."""

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
    """KL(dense || model) over `tokens`: `dL/dz = (softmax(z) - p) / tokens`; it is asked for all rows, once, in order.

    Attributes:
        hidden: the dense model's last hidden states.
        total: the divergence of the rows so far, summed and in nats.
    """

    def __init__(self, head: Logits, hidden: Float[Tensor, "tokens d_out"], tokens: int):
        self.tokens = tokens
        self._dense = head.chunks(hidden)
        self._total = torch.zeros((), dtype=torch.float64, device=hidden.device)

    def __call__(self, rows: slice, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        same, dense = next(self._dense)
        assert same == rows
        log_p, log_q = dense.log_softmax(-1), logits.log_softmax(-1)
        p = log_p.exp()
        self._total += torch.linalg.vecdot(p, log_p - log_q).double().sum()
        return log_q.exp_().sub_(p).div_(self.tokens)

    @property
    def total(self) -> float:
        return self._total.item()
