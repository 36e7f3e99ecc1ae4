"""Loss and KL by position: what short windows of text cannot say of a long context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.evaluation.quality import Window, predictions, windows_over

FIRST = 64  # where the second range begins; each after it is twice as long as the one before


@dataclass(frozen=True)
class Range:
    """The tokens of all windows at some positions.

    Attributes:
        first, last: the positions; a token at position 1 is predicted from one token before it.
        tokens: how many there were.
        loss: their negative log-likelihood, in nats a token.
        kl: the divergence from the dense model, in nats a token; None without one of the same vocabulary.
    """

    first: int
    last: int
    tokens: int
    loss: float
    kl: float | None

    @property
    def name(self) -> str:
        """The positions as text."""
        return f"{self.first}-{self.last}"


def ranges(length: int) -> list[tuple[int, int]]:
    """Return the first and last positions of the ranges of a window of `length` tokens; the first token is in none."""
    firsts = [1]
    while max(FIRST, 2 * firsts[-1]) < length:
        firsts.append(max(FIRST, 2 * firsts[-1]))
    return list(zip(firsts, [*(first - 1 for first in firsts[1:]), length - 1], strict=True))


def long_windows(
    stream: Int[Tensor, " tokens"], length: int, bos: int | None, counts: Bool[Tensor, " tokens"] | None = None
) -> list[Window]:
    """Return the disjoint windows of `length` tokens of a text, or the text itself if it is shorter than one."""
    windows = windows_over(stream, length, length, bos, counts)
    return [window for window in windows if len(window.token_ids) == length] or windows


def by_position(
    model: PreTrainedModel,
    windows: Sequence[Window],
    reference: PreTrainedModel | None = None,
    kept: list[Tensor] | None = None,
) -> list[Range]:
    """Return a model's loss and, beside a reference, its KL divergence from it, by position in the windows.

    Logits exist for a few tokens at a time, so that memory grows with a window's length alone.

    Args:
        windows: of one length, or a single one.
        reference: the dense model, of the same vocabulary; it may be the model itself.
        kept: as for `perplexity_and_kl`, of the reference.
    """
    models: Mapping[str, PreTrainedModel] = {"model": model}
    if reference is not None and reference is not model:
        models = {"dense": reference, **models}
    spans = ranges(len(windows[0].token_ids))
    counts, losses, divergences = [0] * len(spans), [0.0] * len(spans), [0.0] * len(spans)
    for chunk in predictions(models, windows, kept if reference is not None else None, description="positions"):
        loss, divergence = chunk.losses["model"].double().cpu(), chunk.divergences["model"].cpu()
        for index, (first, last) in enumerate(spans):
            part = (first <= chunk.positions) & (chunk.positions <= last)
            counts[index] += len(loss[part])
            losses[index] += loss[part].sum().item()
            divergences[index] += divergence[part].sum().item()
    return [
        Range(*span, count, loss / count, None if reference is None else kl / count)
        for span, count, loss, kl in zip(spans, counts, losses, divergences, strict=True)
        if count
    ]
