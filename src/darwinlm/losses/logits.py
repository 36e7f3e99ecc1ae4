"""From a model's last hidden states to its logits, for a few tokens at a time: the only place where this is computed.

Logits over a large vocabulary are the largest tensors of a language model. On a CPU they are therefore made for so few
tokens at once that they stay in a core's cache, and nowhere for all tokens of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from darwinlm.types import UsageError

ROWS, CACHED_ROWS = 256, 16  # tokens in one product with the output embedding, and in one float32 tensor of logits


_VALUES = torch.linspace(-100, 100, 64)[None]


TILE = 512, 4096  # tokens and vocabulary on a CPU: their logits stay in cache, and few passes read the embedding


@dataclass(frozen=True)
class Logits:
    """Maps hidden states to logits, in float32 or better, exactly as the forward pass of a model's family does.

    With `x = project(hidden) / scaling`, the logits are `x`, or `cap * tanh(x / cap)` where there is a cap.

    Attributes:
        project: the output embedding, an `nn.Linear`. For a family whose forward pass does anything else than the
            formula above, that forward pass itself, with `scaling` 1 and no `cap`.
        scaling: the divisor of Granite, or the inverse of what other families multiply by.
        cap: the soft cap of Gemma.
    """

    project: Callable[[Tensor], Tensor]
    scaling: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Logits:
        """Return the map of a causal language model of any family."""
        finished, cap = _finished(model), getattr(model.config, "final_logit_softcapping", None)
        linear: Any = model.get_output_embeddings()
        if finished is not None:
            named = cls(linear, getattr(model.config, "logits_scaling", None) or 1.0, cap)
            for logits in (named, cls(linear, float(_VALUES[0, 0] / finished[0, 0]))):
                if torch.allclose(finished, logits.finish(_VALUES), rtol=1e-5):
                    return logits
        return cls(_around(model))

    @property
    def is_linear(self) -> bool:
        """Whether logits are a product with the output embedding, and no more than scaled."""
        return isinstance(self.project, nn.Linear) and self.cap is None

    @property
    def linear(self) -> nn.Linear:
        """The output embedding. Its weight must be read during the forward pass, where FSDP has gathered it.

        Raises:
            UsageError: if the family's logits are not the formula of this class.
        """
        if not isinstance(self.project, nn.Linear):
            raise UsageError(
                "expected a model whose logits are a scaled or capped product with its output embedding, found one "
                "that computes them in another way; choose a model of another family"
            )
        return self.project

    def __call__(self, hidden: Float[Tensor, "tokens d_out"]) -> Float[Tensor, "tokens vocab"]:
        return self.finish(self.project(hidden))

    def finish(self, products: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Return the logits, given the projections of some tokens to any part of the vocabulary."""
        logits = products.to(torch.promote_types(torch.float32, products.dtype))
        if self.scaling != 1:
            logits = logits / self.scaling
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def product_gradient(
        self, logits: Float[Tensor, "tokens vocab"], gradient: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, "tokens vocab"]:
        """Return a loss's gradient for the projections, given that for the logits: the chain rule through `finish`."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap).square())
        return gradient if self.scaling == 1 else gradient / self.scaling

    def chunks(self, hidden: Float[Tensor, "tokens d_out"]) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits of a few tokens at a time, `[rows, vocab]`, with the slice of tokens that they belong to."""
        for start in range(0, len(hidden), ROWS):
            products = self.project(hidden[start : start + ROWS])
            for row, part in _in_cache(products):
                yield slice(start + row, start + row + len(part)), self.finish(part)

    def tiles(
        self, hidden: Sequence[Float[Tensor, "tokens d_out"]], most: tuple[int, int] | None = None
    ) -> Iterator[tuple[slice, slice, Iterator[Tensor]]]:
        """Yield, for a few tokens and a part of the vocabulary, their slices and every model's logits.

        Args:
            hidden: the hidden states of models that share the output embedding, on the same tokens.
            most: tokens and vocabulary at a time; what suits the device by default.
        """
        tokens = len(hidden[0])
        if not isinstance(self.project, nn.Linear):
            for row in range(0, tokens, ROWS):
                rows = slice(row, min(row + ROWS, tokens))
                yield rows, slice(None), (self(states[rows]) for states in hidden)
            return
        weight, bias = self.project.weight, self.project.bias
        height, width = most or (TILE if weight.device.type == "cpu" else (ROWS, len(weight)))
        for row in range(0, tokens, height):
            rows = slice(row, min(row + height, tokens))
            for column in range(0, len(weight), width):
                part = slice(column, column + width)
                linear = partial(nn.functional.linear, weight=weight[part], bias=None if bias is None else bias[part])
                yield rows, part, (self.finish(linear(states[rows])) for states in hidden)

    def gradient(
        self, hidden: Float[Tensor, "tokens d_out"], logit_gradient: Callable[[slice, Tensor], Tensor]
    ) -> Float[Tensor, "tokens d_out"]:
        """Return a loss's gradient for the hidden states, making the logits of a few tokens at a time.

        Args:
            logit_gradient: returns the loss's gradient for the logits of some tokens, given their slice and the logits,
                `[rows, vocab]`. It is called for all tokens once, in order.
        """
        parts = []
        for start in range(0, len(hidden), ROWS):
            states = hidden[start : start + ROWS].detach().requires_grad_(True)
            products = self.project(states)
            gradient = torch.empty_like(products)
            for row, part in _in_cache(products.detach()):
                logits = self.finish(part)
                outer = logit_gradient(slice(start + row, start + row + len(part)), logits)
                gradient[row : row + len(part)] = self.product_gradient(logits, outer)
            parts.append(torch.autograd.grad(products, states, gradient)[0])
        return torch.cat(parts)


def _in_cache(products: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield so many rows at a time that their float32 logits stay in a core's cache, with the index of the first."""
    few = CACHED_ROWS if products.device.type == "cpu" else ROWS
    for row in range(0, len(products), few):
        yield row, products[row : row + few]


def hidden_states(
    model: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]
) -> Float[Tensor, "sequences length d_out"]:
    """Return the last hidden states, which the model's `Logits` take."""
    return model.base_model(input_ids=token_ids.to(model.device), use_cache=False).last_hidden_state


def _around(model: PreTrainedModel, *replaced: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model's own forward pass from last hidden states to logits, past its backbone and `replaced` modules.

    A shallow copy of the model runs it. The model itself does not change, and its hooks are not called.
    """
    around = copy.copy(model)
    around._modules = {
        name: nn.Identity() if any(module is other for other in replaced) else module
        for name, module in model._modules.items()
    } | {model.base_model_prefix: _PassThrough(model.base_model)}

    def forward(hidden: Tensor) -> Tensor:
        return type(model).forward(around, inputs_embeds=hidden[None], use_cache=False).logits[0]

    return forward


@dataclass
class _Output(BaseModelOutputWithPastAndCrossAttentions):
    router_logits: tuple[Tensor, ...] | None = None  # which models with experts have, or could have
    shared_kv_states: Any = None  # and those whose blocks hand on keys and values


class _PassThrough(nn.Module):
    """Stands for a backbone: its input embeddings are its last hidden states, its numbers are those of the backbone."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = [backbone]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["backbone"][0], name)
            if isinstance(value, int | float):
                return value
            raise

    @property
    def decoder(self) -> _PassThrough:
        """The module that some families call instead of the backbone around it (OPT)."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> BaseModelOutputWithPastAndCrossAttentions:
        return _Output(last_hidden_state=inputs_embeds)


@torch.no_grad()
def _finished(model: PreTrainedModel) -> Tensor | None:
    """What a family's own forward pass makes of a few projections; None if it has no linear output embedding to leave.

    Names of settings do not tell: `logits_scaling` divides in Granite and multiplies in HyperCLOVA X.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        return None
    try:
        finished = _around(model, linear)(_VALUES).float()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it needs more than an identity has
        return None
    return finished if finished.shape == _VALUES.shape else None
