"""The training loss from hidden states: cross-entropy and forward KL to a teacher, a few tokens' logits at a time.

Logits over a large vocabulary are the largest tensors of training. Here only those of `CHUNK` tokens exist at once: the
gradient has a closed form, so it is computed together with the value and no logits are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.losses.logits import Logits, hidden_states

CHUNK = 256  # tokens whose logits exist at once


@runtime_checkable
class Target(Protocol):
    """The teacher's distribution after every token of a batch."""

    def log_probs(self, rows: slice, student: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return log-probabilities after some tokens, given the student's after the same tokens and temperature."""
        ...

    def at(self, rows: Int[Tensor, " rows"]) -> Target:
        """Return the distribution after the tokens at these places alone."""
        ...


@dataclass(frozen=True)
class HiddenTarget:
    """The distribution of a teacher that runs beside the student, from the teacher's hidden states.

    Attributes:
        hidden: the teacher's last hidden states.
        logits: makes logits of some of them.
        temperature: divides the logits.
        vocabulary: the number of tokens among which the teacher chooses: the first ones. Embeddings may be padded
            beyond them, the teacher's in another way than the student's. None for all of the teacher's.
    """

    hidden: Float[Tensor, "tokens teacher_hidden"]
    logits: Callable[[Tensor], Tensor]
    temperature: float
    vocabulary: int | None = None

    def log_probs(self, rows: slice, student: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return the teacher's log-probabilities, in the student's precision; padding has probability 0."""
        found = self._log_probs(rows).to(student.dtype)
        return nn.functional.pad(found, (0, student.shape[-1] - found.shape[-1]), value=-torch.inf)

    def at(self, rows: Int[Tensor, " rows"]) -> HiddenTarget:
        """Return the distribution after the tokens at these places alone."""
        return replace(self, hidden=self.hidden[rows])

    def top_k(self, k: int) -> tuple[Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"]]:
        """Return the log-probabilities of the `k` likeliest tokens, and their indices."""
        starts = range(0, len(self.hidden), CHUNK)
        values, indices = zip(*(self._log_probs(slice(i, i + CHUNK)).topk(k) for i in starts), strict=True)
        return torch.cat(values), torch.cat(indices)

    @torch.no_grad()
    def _log_probs(self, rows: slice) -> Float[Tensor, "rows vocabulary"]:
        logits = self.logits(self.hidden[rows])[:, : self.vocabulary]
        return (logits / self.temperature).log_softmax(-1)


@dataclass(frozen=True)
class TopKTarget:
    """The distribution of a teacher of which only the K likeliest tokens are known.

    The rest of its probability is spread over the other tokens in the student's proportions. The divergence is
    therefore that of distributions over K tokens and "any other", a lower bound of the whole one.

    Attributes:
        indices: the K tokens.
        values: their log-probabilities at the temperature of the loss.
    """

    indices: Int[Tensor, "tokens top_k"]
    values: Float[Tensor, "tokens top_k"]

    def log_probs(self, rows: slice, student: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return the teacher's log-probabilities; those that are unknown are in the student's proportions."""
        indices, known = self.indices[rows].long(), self.values[rows].to(student.dtype)
        # Rounding may leave the known mass above 1: then nothing is left for the others.
        rest = torch.log1p(-known.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(student.dtype).eps))
        others = student.scatter(-1, indices, -torch.inf)
        mass = others.logsumexp(-1, keepdim=True)
        spread = torch.where(mass.isfinite(), others - mass + rest, -torch.inf)  # K may be the whole vocabulary
        return spread.scatter(-1, indices, known)

    def at(self, rows: Int[Tensor, " rows"]) -> TopKTarget:
        """Return the distribution after the tokens at these places alone."""
        return TopKTarget(self.indices[rows], self.values[rows])


class Losses(NamedTuple):
    """Means over tokens: the loss that is minimised, and its parts in nats a token. Without a target, `kl` is 0."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor


def chunked_loss(
    hidden: Float[Tensor, "tokens hidden"],
    logits: Logits,
    labels: Int[Tensor, " tokens"],
    target: Target | None = None,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Losses:
    """Return `(1 - kl_weight) CE(labels) + kl_weight T^2 KL(teacher_T || student_T)`, the mean over tokens.

    With `z = logits(hidden)`, the student's distribution at temperature T is `softmax(z / T)`. No `[tokens, vocab]`
    tensor is ever made. Of no tokens, it is 0. The gradient reaches `hidden`, and the weight and bias of `logits`,
    through the first of the three results. Under autocast, products are in its precision; sums are float32 or better.

    Raises:
        UsageError: if the logits are not a scaled or capped product with an output embedding.
    """
    if target is None:
        kl_weight = 0.0
    weight, bias = logits.linear.weight, logits.linear.bias
    return Losses(*_ChunkedLoss.apply(hidden, weight, bias, logits, labels, target, kl_weight, temperature, chunk))


class _ChunkedLoss(torch.autograd.Function):
    """With logits `z` and the student's distribution `q`, `dCE/dz = q - onehot` and `d(T^2 KL)/dz = T (q_T - p_T)`.

    Where the unknown part of `p` follows `q`, as in `TopKTarget`, both still hold. The chain rule leads from `z` to the
    products of hidden states and output embedding (`Logits.product_gradient`), and from them to both factors.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Logits,
        labels: Tensor,
        target: Target | None,
        kl_weight: float,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = max(1, len(hidden))
        exact = torch.promote_types(torch.float32, hidden.dtype)
        products = _product_dtype(hidden)
        narrow, narrow_bias = weight.to(products), None if bias is None else bias.to(products)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        grad_bias = torch.zeros(len(weight), dtype=exact, device=hidden.device) if needs_bias else None
        cross_entropy = torch.zeros((), dtype=exact, device=hidden.device)
        kl = torch.zeros_like(cross_entropy)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                states = hidden[rows].to(products)
                logits = output.finish(nn.functional.linear(states, narrow, narrow_bias))
                log_q = logits.log_softmax(-1)
                cross_entropy -= log_q.gather(-1, labels[rows, None]).sum()
                gradient = log_q.exp()
                gradient.scatter_add_(-1, labels[rows, None], -torch.ones_like(gradient[:, :1]))
                gradient *= 1 - kl_weight
                if target is not None:
                    log_q = log_q if temperature == 1 else (logits / temperature).log_softmax(-1)
                    log_p = target.log_probs(rows, log_q)
                    p = log_p.exp()
                    kl += torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
                    gradient += kl_weight * temperature * (log_q.exp() - p)
                gradient = (output.product_gradient(logits, gradient) / tokens).to(products)
                if grad_hidden is not None:
                    grad_hidden[rows] = (gradient @ narrow).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += gradient.T @ states
                if grad_bias is not None:
                    grad_bias += gradient.sum(0, dtype=exact)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        cross_entropy, kl = cross_entropy / tokens, kl / tokens
        ctx.mark_non_differentiable(cross_entropy, kl)
        return (1 - kl_weight) * cross_entropy + kl_weight * temperature**2 * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale = gradients[0]
        scaled = (None if part is None else part * scale.to(part.dtype) for part in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class LastHidden:
    """The last hidden states of a model's latest forward pass, and the map from them to its logits."""

    def __init__(self, logits: Logits):
        self.logits = logits
        self._hidden: Tensor | None = None

    def keep(self, hidden: Tensor) -> Tensor:
        """Keep the hidden states, and return them in place of their products with the output embedding."""
        self._hidden = hidden
        return hidden

    def take(self) -> Float[Tensor, "sequences length hidden"]:
        """Return the hidden states, once: nothing here keeps them or their graph alive after that."""
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        return hidden


@contextmanager
def hidden_for_logits(model: PreTrainedModel) -> Iterator[LastHidden]:
    """Let the model's forward pass keep its last hidden states and make no logits; its own output has no meaning then.

    The output embedding stays a module of the model and is called as always, so hooks of DistributedDataParallel and
    FSDP, checkpoints and adapters see what they always see. Whatever the family does to the result, such as a soft cap,
    has no effect: the hidden states are kept before that, and `Logits` does the same to the logits.

    Raises:
        UsageError: if the model's logits are not a scaled or capped product with its output embedding.
    """
    last = LastHidden(Logits.of(model))
    linear: Any = last.logits.linear
    linear.forward = last.keep
    try:
        yield last
    finally:
        del linear.forward


@torch.no_grad()
def teacher_target(
    teacher: PreTrainedModel,
    token_ids: Int[Tensor, "sequences length"],
    temperature: float,
    vocabulary: int | None = None,
) -> HiddenTarget:
    """Return the teacher's distribution after every token but the last of each sequence, in their order."""
    hidden = hidden_states(teacher, token_ids)[:, :-1].flatten(0, 1)
    return HiddenTarget(hidden, Logits.of(teacher), temperature, vocabulary)
