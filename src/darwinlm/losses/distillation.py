"""The training loss from hidden states: cross-entropy and forward KL to a teacher, a few tokens' logits at a time.

Logits over a large vocabulary are the largest tensors of training. Here those of `CHUNK` tokens exist at once: the
gradient has a closed form, so it is computed together with the value and nothing waits for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 256  # tokens whose logits exist at once


@runtime_checkable
class Target(Protocol):
    """The teacher's distribution at every token of a batch."""

    def log_probs(self, rows: slice, student: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Log-probabilities of some tokens, given the student's at the same tokens and temperature."""
        ...


@dataclass(frozen=True)
class HiddenTarget:
    """A teacher that runs beside the student: its hidden states and how they become logits.

    Attributes:
        hidden: `[tokens, teacher_hidden]`.
        head: makes logits of some of them.
    """

    hidden: Float[Tensor, "tokens teacher_hidden"]
    head: Callable[[Tensor], Tensor]
    temperature: float

    def log_probs(self, rows: slice, student: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """The teacher's log-probabilities."""
        return self._of(rows).to(student.dtype)

    def top_k(self, k: int) -> tuple[Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"]]:
        """The likeliest `k` tokens' log-probabilities, and which they are."""
        starts = range(0, len(self.hidden), CHUNK)
        values, indices = zip(*(self._of(slice(i, i + CHUNK)).topk(k) for i in starts), strict=True)
        return torch.cat(values), torch.cat(indices)

    @torch.no_grad()
    def _of(self, rows: slice) -> Float[Tensor, "rows vocab"]:
        logits = self.head(self.hidden[rows])
        exact = torch.promote_types(torch.float32, logits.dtype)
        return (logits.to(exact) / self.temperature).log_softmax(-1)


@dataclass(frozen=True)
class TopKTarget:
    """A teacher of which only the K likeliest tokens are known; the rest of its mass is spread as the student's is.

    So the divergence is that of distributions over K tokens and "any other", a lower bound of the whole one.

    Attributes:
        indices, values: the tokens and their log-probabilities at the temperature of the loss.
    """

    indices: Int[Tensor, "tokens top_k"]
    values: Float[Tensor, "tokens top_k"]

    def log_probs(self, rows: slice, student: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """The teacher's log-probabilities, its unknown ones in the student's proportions."""
        indices, known = self.indices[rows].long(), self.values[rows].to(student.dtype)
        # Rounding may leave the known mass above 1: then nothing is left for the others.
        rest = torch.log1p(-known.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(student.dtype).eps))
        others = student.scatter(-1, indices, -torch.inf)
        mass = others.logsumexp(-1, keepdim=True)
        spread = torch.where(mass.isfinite(), others - mass + rest, -torch.inf)  # K may be the whole vocabulary
        return spread.scatter(-1, indices, known)


class Losses(NamedTuple):
    """Means over tokens: what is minimised, and its parts in nats a token. `kl` is 0 without a target."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor


def chunked_loss(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    target: Target | None = None,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Losses:
    """`(1 - kl_weight) CE(labels) + kl_weight T^2 KL(teacher_T || student_T)`, the mean over tokens.

    The logits are `hidden @ weight.T`; `p_T = softmax(logits / T)`. No `[tokens, vocab]` tensor is ever made. The
    gradient reaches `hidden` and `weight`, through the first of the three results; under autocast products are in its
    precision, sums in float32 or better.
    """
    if target is None:
        kl_weight = 0.0
    return Losses(*_ChunkedLoss.apply(hidden, weight, labels, target, kl_weight, temperature, chunk))


class _ChunkedLoss(torch.autograd.Function):
    """With `q` the student's distribution, `dCE/dz = q - onehot` and `d(T^2 KL)/dz = T (q_T - p_T)`.

    Where the unknown part of `p` follows `q`, as in `TopKTarget`, both still hold.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        target: Target | None,
        kl_weight: float,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = len(hidden)
        exact = torch.promote_types(torch.float32, hidden.dtype)
        products = _product_dtype(hidden)
        narrow = weight.to(products)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        cross_entropy = torch.zeros((), dtype=exact, device=hidden.device)
        kl = torch.zeros_like(cross_entropy)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, tokens, chunk):
                rows = slice(start, start + chunk)
                states = hidden[rows].to(products)
                logits = (states @ narrow.T).to(exact)
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
                gradient = (gradient / tokens).to(products)
                if grad_hidden is not None:
                    grad_hidden[rows] = (gradient @ narrow).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += gradient.T @ states
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        cross_entropy, kl = cross_entropy / tokens, kl / tokens
        ctx.mark_non_differentiable(cross_entropy, kl)
        return (1 - kl_weight) * cross_entropy + kl_weight * temperature**2 * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight = ctx.saved_tensors
        scale = gradients[0]
        scaled = (None if part is None else part * scale.to(part.dtype) for part in (hidden, weight))
        return (*scaled, None, None, None, None, None)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@contextmanager
def hidden_for_logits(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Let the model's forward return the hidden states that its head would read, and give that head.

    The head stays a module of the model, so hooks of DistributedDataParallel and FSDP, checkpoints and adapters see
    what they always see; families whose forward scales the logits scale the hidden states, which is the same.
    """
    head: Any = model.get_output_embeddings()
    head.forward = _unchanged
    try:
        yield head
    finally:
        del head.forward


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


@torch.no_grad()
def teacher_target(
    teacher: PreTrainedModel, token_ids: Int[Tensor, "sequences length"], temperature: float
) -> HiddenTarget:
    """The teacher's distribution after every token but the last of each sequence, in their order."""
    with hidden_for_logits(teacher):
        hidden = teacher(input_ids=token_ids, use_cache=False).logits[:, :-1]
    head: Any = teacher.get_output_embeddings()
    return HiddenTarget(hidden.flatten(0, 1), head, temperature)
