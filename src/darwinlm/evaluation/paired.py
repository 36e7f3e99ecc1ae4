"""Differences between two models on the same questions, with intervals that say which of them are real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES, SEED = 2000, 0
LEAST = 10  # questions: below that, resamples repeat so few values that their interval is too short
DRAWN = 1_000_000  # questions drawn at once, so that resamples of many questions need little memory
NOTE = (
    "beside dense: the difference from the dense model on the same questions, with its 95 % interval (paired bootstrap "
    f"over questions, {RESAMPLES:,} resamples, seed {SEED}); * where it excludes 0, as one in twenty does by chance"
)


@dataclass(frozen=True)
class Difference:
    """How much more a model has than another, the mean over questions, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def real(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def text(self, share: bool) -> str:
        """The difference with its interval, and a star if it is real; a share is in points of per cent."""
        value, low, high = (
            f"{100 * number:+.1f}" if share else f"{number:+.3f}" for number in (self.value, self.low, self.high)
        )
        return f"{value} ({low} to {high}){' *' if self.real else ''}"


def difference(own: Sequence[float | int] | None, other: Sequence[float | int] | None) -> Difference | None:
    """Return how much more a model has than another; None unless both have the same questions, at least `LEAST`.

    Args:
        own, other: a figure of each model for every question, in the same order.
    """
    return mean_difference([(own or (), other or ())])


def mean_difference(pairs: Sequence[tuple[Sequence[float | int], Sequence[float | int]]]) -> Difference | None:
    """Return the mean over tasks of the differences, each task's questions resampled by themselves.

    Args:
        pairs: of each task, the figures of both models for every question. None comes back if there is no task, or if
            one has too few questions or not the same ones.
    """
    if not pairs or any(len(own) != len(other) or len(own) < LEAST for own, other in pairs):
        return None
    found = [_resampled(tuple(own), tuple(other)) for own, other in pairs]
    means = np.mean([resamples for _, resamples in found], axis=0)
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(np.mean([value for value, _ in found])), float(low), float(high))


@lru_cache(maxsize=1024)
def _resampled(own: tuple[float | int, ...], other: tuple[float | int, ...]) -> tuple[float, np.ndarray]:
    """The mean difference, and that of each resample of the questions."""
    differences = np.subtract(own, other)
    count, draws = len(differences), np.random.default_rng(SEED)
    at_once = max(1, DRAWN // count)
    means = [
        differences[draws.integers(count, size=(min(at_once, RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    return float(differences.mean()), np.concatenate(means)
