"""The quality of models, measured side by side: perplexity, and KL divergence from the dense model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.model.blocks import Blocks
from darwinlm.model.family import Family
from darwinlm.model.states import last_states
from darwinlm.runtime.progress import track
from darwinlm.types import UsageError

CHUNK = 256  # tokens whose logits over the whole vocabulary exist at once


@dataclass(frozen=True)
class Quality:
    """Perplexity, and the KL divergence from the dense model in nats a token."""

    perplexity: float
    kl: float


class ByBlock(NamedTuple):
    """A model's family and its blocks, with which the block runner takes the place of its own forward pass."""

    family: Family
    blocks: Blocks


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text. Predictions of the tokens from `first` on count; those before are only context.

    Attributes:
        counts: for each token, whether the prediction after it counts at all; if None, all do.
    """

    token_ids: Int[Tensor, " length"]
    first: int = 1
    counts: Bool[Tensor, " length"] | None = None

    @property
    def rows(self) -> Int[Tensor, " predicted"]:
        """The places of the tokens after which the prediction counts."""
        places = torch.arange(self.first - 1, len(self.token_ids) - 1)
        return places if self.counts is None else places[self.counts[places]]


def windows_over(
    stream: Int[Tensor, " tokens"],
    length: int,
    stride: int,
    bos: int | None = None,
    counts: Bool[Tensor, " tokens"] | None = None,
) -> list[Window]:
    """Return windows of at most `length` tokens, each `stride` tokens after the one before; no token counts twice.

    With `stride == length` the windows are disjoint, and the first token of each does not count, because nothing
    precedes it. With a smaller stride, every token but the first of the text counts; after the first window, each has
    at least `length - stride` tokens before it. With a BOS, each window begins with it, has one token less of the text,
    and every token of the text counts.

    Args:
        counts: whether the prediction of each token of the text counts at all; if None, all do.
    """
    windows, end = [], 0
    before = stream[:0] if bos is None else torch.tensor([bos])
    text = length - len(before)
    for start in range(0, len(stream), min(stride, text)):
        ids = torch.cat([before, stream[start : start + text]])
        own = None if counts is None else _shifted(counts[start : start + text], len(before))
        window = Window(ids, max(1, end - start + len(before)), own)
        if len(window.token_ids) > window.first:
            windows.append(window)
        end = start + text
        if end >= len(stream):
            break
    return windows


def _shifted(counts: Bool[Tensor, " tokens"], before: int) -> Bool[Tensor, " window"]:
    """For each token of a window with some tokens before the text's, whether the prediction after it counts."""
    return torch.cat([counts[1 - before :], torch.zeros(1, dtype=torch.bool)])


def perplexity_and_kl(
    models: Mapping[str, PreTrainedModel],
    token_ids: Int[Tensor, "sequences length"],
    kept: list[Tensor] | None = None,
    blocks: Mapping[str, ByBlock] | None = None,
    counts: Bool[Tensor, "sequences length"] | None = None,
) -> dict[str, Quality]:
    """Return every model's perplexity and KL divergence from the first model, over the same tokens in one pass.

    Every token but the first of a sequence is predicted from those before it.

    Args:
        kept: saves time in repeated calls with the same first model and tokens: the first call appends that model's
            last hidden states to it, and later calls read them.
        blocks: of models that are to be run block by block, by name.
        counts: for each token, whether the prediction after it counts; if None, all do.

    Raises:
        UsageError: if there are no sequences, a sequence has fewer than two tokens, or no prediction counts.
    """
    sequences, length = token_ids.shape
    if sequences < 1 or length < 2:
        raise UsageError(
            f"too little held-out text: expected a sequence of at least 2 tokens, found {sequences} sequences of "
            f"{length} tokens; raise evaluation.tokens or give more text"
        )
    marks = [None] * sequences if counts is None else list(counts)
    windows = [Window(ids, counts=own) for ids, own in zip(token_ids, marks, strict=True)]
    return quality_over(models, windows, kept, blocks)


def quality_over(
    models: Mapping[str, PreTrainedModel],
    windows: Sequence[Window],
    kept: list[Tensor] | None = None,
    blocks: Mapping[str, ByBlock] | None = None,
) -> dict[str, Quality]:
    """Return every model's perplexity and KL divergence from the first model, over the tokens that count.

    Sums are float64. `kept` and `blocks` are as for `perplexity_and_kl`.

    Raises:
        UsageError: if no prediction counts.
    """
    predicted = sum(len(window.rows) for window in windows)
    if not predicted:
        raise UsageError(
            "nothing in the held-out text counts: expected answers of an assistant, found none; give more text, raise "
            "--evaluation.tokens, or take --loss-tokens all"
        )
    loss, divergence = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for chunk in predictions(models, windows, kept, blocks):
        for name in models:
            loss[name] += chunk.losses[name].double().sum().item()
            divergence[name] += chunk.divergences[name].sum().item()
    return {name: Quality(perplexity_of(loss[name] / predicted), divergence[name] / predicted) for name in models}


class Predictions(NamedTuple):
    """What models make of some tokens of a window, in order.

    Attributes:
        positions: of these tokens in the window, `[tokens]`.
        losses: by model, the negative log-likelihood of each token, in nats, `[tokens]`.
        divergences: by model, the KL divergence from the first model at each token, in nats, `[tokens]`.
    """

    positions: Tensor
    losses: dict[str, Tensor]
    divergences: dict[str, Tensor]


@torch.inference_mode()
def predictions(
    models: Mapping[str, PreTrainedModel],
    windows: Sequence[Window],
    kept: list[Tensor] | None = None,
    blocks: Mapping[str, ByBlock] | None = None,
    description: str = "perplexity and KL",
) -> Iterator[Predictions]:
    """Yield what models make of the tokens that count, a few at a time.

    Logits exist for `CHUNK` tokens of two models at a time. Probabilities are float32, whatever the models' precision.
    `kept` and `blocks` are as for `perplexity_and_kl`.
    """
    first, *others = models
    logits = {name: Logits.of(model) for name, model in models.items()}
    with evaluation_mode(models.values()):
        states = {name: _states(name, model, windows, (blocks or {}).get(name)) for name, model in models.items()}
        for number, window in enumerate(track(windows, description, len(windows))):
            targets = window.token_ids[1:, None]
            hidden = {name: states[name](number) for name in others}
            if kept is None:
                hidden[first] = states[first](number)
            else:
                if number == len(kept):
                    kept.append(states[first](number).cpu())  # all of them are too many for a GPU
                hidden[first] = kept[number].to(models[first].device)
            for chunk in window.rows.split(CHUNK):
                losses, divergences, dense = {}, {}, None
                for name in models:
                    log_probs = logits[name](hidden[name][chunk]).log_softmax(-1)
                    losses[name] = -log_probs.gather(1, targets[chunk].to(log_probs.device)).squeeze(1)
                    dense = log_probs if dense is None else dense
                    divergences[name] = (
                        _kl(dense.to(log_probs.device), log_probs) if name != first else torch.zeros_like(losses[name])
                    )
                yield Predictions(chunk + 1, losses, divergences)


def _states(
    name: str, model: PreTrainedModel, windows: Sequence[Window], by_block: ByBlock | None
) -> Callable[[int], Float[Tensor, "length d_out"]]:
    """What gives a model's last hidden states on a window, by its number: its own forward pass, or the block runner."""
    inputs = [window.token_ids[:-1] for window in windows]
    if by_block is None:
        return lambda number: hidden_states(model, inputs[number][None])[0]
    of_length: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(inputs):
        of_length[len(ids)].append(number)
    states = {
        length: last_states(model, *by_block, [inputs[number][None] for number in numbers], f"{name}, by block")
        for length, numbers in of_length.items()
    }
    places = {number: place for numbers in of_length.values() for place, number in enumerate(numbers)}
    return lambda number: states[len(inputs[number])].read(places[number])[0]


def _kl(dense: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Return the divergence of each token, in nats, from log-probabilities."""
    return F.kl_div(other, dense, reduction="none", log_target=True).sum(-1, dtype=torch.float64)


def perplexity_of(loss: float) -> float:
    """Return the perplexity for a mean loss in nats a token; it is infinite where it exceeds float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@contextmanager
def evaluation_mode(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Put models into evaluation mode, and restore every module's mode afterwards.

    In training mode, dropout would add noise, and gradient checkpointing would switch off the cache.
    """
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
