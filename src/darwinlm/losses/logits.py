"""What follows the blocks: hidden states to logits, so few at a time that they stay in a core's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS, CACHED_ROWS = 256, 16  # tokens that are multiplied by a head at once, and whose float32 logits exist at once


TILE = 512, 4096  # tokens and vocabulary on a CPU: their logits stay in cache, and the head is read seldom


class Logits:
    """A model's hidden states to its logits in float32, as the forward of its family makes them."""

    def __init__(self, model: PreTrainedModel):
        self.linear: Any = model.get_output_embeddings()
        self.scaling: float = getattr(model.config, "logits_scaling", 1.0)  # Granite
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)  # Gemma

    def __call__(self, hidden: Float[Tensor, "tokens d_out"]) -> Float[Tensor, "tokens vocab"]:
        return self.finish(self.linear(hidden))

    def finish(self, products: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """What the family makes of the head's products."""
        logits = products.float()
        if self.scaling != 1:
            logits = logits / self.scaling
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def chunks(self, hidden: Float[Tensor, "tokens d_out"]) -> Iterator[tuple[slice, Tensor]]:
        """The logits of a few tokens at a time, `[rows, vocab]`, and which: they stay in a core's cache."""
        for start in range(0, len(hidden), ROWS):
            products = self.linear(hidden[start : start + ROWS])
            for row, few in _in_cache(products):
                yield slice(start + row, start + row + len(few)), self.finish(few)

    def tiles(self, hidden: Float[Tensor, "tokens d_out"]) -> Iterator[tuple[slice, slice, Tensor]]:
        """Logits of a few tokens and a part of the vocabulary at a time, and which; they may be overwritten."""
        weight, bias = self.linear.weight, self.linear.bias
        rows, columns = TILE if hidden.device.type == "cpu" else (ROWS, len(weight))
        for row in range(0, len(hidden), rows):
            states = hidden[row : row + rows]
            for column in range(0, len(weight), columns):
                part = slice(column, column + columns)
                products = nn.functional.linear(states, weight[part], None if bias is None else bias[part])
                yield slice(row, row + len(states)), part, self.finish(products)

    def gradient(
        self, hidden: Float[Tensor, "tokens d_out"], slope: Callable[[slice, Tensor], Tensor]
    ) -> Float[Tensor, "tokens d_out"]:
        """A loss's gradient for the hidden states, the logits of a few tokens at a time.

        Args:
            slope: the gradient for these tokens' logits `[rows, vocab]`.
        """
        parts = []
        for start in range(0, len(hidden), ROWS):
            states = hidden[start : start + ROWS].detach().requires_grad_(True)
            products = self.linear(states)
            gradient = torch.empty_like(products)
            for row, few in _in_cache(products.detach()):
                raw = few.requires_grad_(True)
                logits = self.finish(raw)
                wanted = slope(slice(start + row, start + row + len(few)), logits.detach())
                gradient[row : row + len(few)] = torch.autograd.grad(logits, raw, wanted)[0]
            parts.append(torch.autograd.grad(products, states, gradient)[0])
        return torch.cat(parts)


def _in_cache(products: Tensor) -> Iterator[tuple[int, Tensor]]:
    """So many rows at a time that their float32 logits stay in a core's cache, and which is their first."""
    few = CACHED_ROWS if products.device.type == "cpu" else ROWS
    for row in range(0, len(products), few):
        yield row, products[row : row + few]
