"""How good and how fast models are, side by side: perplexity, KL divergence, speed, and what they write."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.runtime.progress import track
from darwinlm.types import UsageError

CHUNK = 256  # tokens whose logits over the whole vocabulary exist at once


@dataclass(frozen=True)
class Quality:
    """Perplexity, and the KL divergence from the dense model in nats a token."""

    perplexity: float
    kl: float


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text, of which those from `first` on count; what is before them is context."""

    token_ids: Int[Tensor, " length"]
    first: int = 1


def windows_over(stream: Int[Tensor, " tokens"], length: int, stride: int) -> list[Window]:
    """Windows of at most `length` tokens, each `stride` further on, in which no token counts twice.

    With `stride == length` they are disjoint, and the first token of each is predicted from nothing, so it does not
    count. With less, every token but the first of all counts, those after the first window with at least
    `length - stride` tokens before them.
    """
    windows, end = [], 0
    for start in range(0, len(stream), stride):
        window = Window(stream[start : start + length], max(1, end - start))
        if len(window.token_ids) > window.first:
            windows.append(window)
        end = start + length
        if end >= len(stream):
            break
    return windows


def perplexity_and_kl(
    models: Mapping[str, PreTrainedModel],
    token_ids: Int[Tensor, "sequences length"],
    kept: list[Tensor] | None = None,
) -> dict[str, Quality]:
    """Perplexity of every model, and its KL divergence from the first, over the same tokens in one pass.

    Every token but the first of a sequence is predicted from those before it.

    Args:
        kept: for many calls with one first model and the same tokens: the first call leaves that model's last hidden
            states in it, and the others read them.

    Raises:
        UsageError: if there are no sequences, or a sequence has fewer than two tokens.
    """
    sequences, length = token_ids.shape
    if sequences < 1 or length < 2:
        raise UsageError(
            f"too little held-out text: expected a sequence of at least 2 tokens, found {sequences} sequences of "
            f"{length} tokens; raise evaluation.tokens or give more text"
        )
    return quality_over(models, [Window(sequence) for sequence in token_ids], kept)


@torch.inference_mode()
def quality_over(
    models: Mapping[str, PreTrainedModel], windows: Sequence[Window], kept: list[Tensor] | None = None
) -> dict[str, Quality]:
    """Perplexity of every model, and its KL divergence from the first, over the tokens that count.

    Logits are made for `CHUNK` tokens of two models at a time; probabilities are float32 and sums float64 whatever the
    models' precision. `kept` is as for `perplexity_and_kl`.
    """
    first, *others = models
    logits = {name: Logits.of(model) for name, model in models.items()}
    loss, divergence = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    with evaluation_mode(models.values()):
        for number, window in enumerate(track(windows, "perplexity and KL", len(windows))):
            inputs, targets = window.token_ids[:-1], window.token_ids[1:, None]
            hidden = {name: hidden_states(models[name], inputs[None])[0] for name in others}
            if kept is None:
                hidden[first] = hidden_states(models[first], inputs[None])[0]
            else:
                if number == len(kept):
                    kept.append(hidden_states(models[first], inputs[None])[0])
                hidden[first] = kept[number]
            for start in range(window.first - 1, len(inputs), CHUNK):
                chunk = slice(start, start + CHUNK)
                dense = None
                for name in models:
                    log_probs = logits[name](hidden[name][chunk]).log_softmax(-1)
                    loss[name] -= log_probs.gather(1, targets[chunk].to(log_probs.device)).double().sum().item()
                    if dense is None:
                        dense = log_probs
                    else:
                        divergence[name] += _kl(dense.to(log_probs.device), log_probs)
    predicted = sum(len(window.token_ids) - window.first for window in windows)
    return {name: Quality(perplexity_of(loss[name] / predicted), divergence[name] / predicted) for name in models}


def _kl(dense: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]) -> float:
    """Summed over tokens; both are log-probabilities."""
    return F.kl_div(other, dense, reduction="none", log_target=True).sum(dtype=torch.float64).item()


def perplexity_of(loss: float) -> float:
    """Of a mean loss in nats a token; infinite where it is beyond float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@contextmanager
def evaluation_mode(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which would switch the cache off; afterwards all is as it was."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
