"""Timing of several works side by side: they take turns, so that whatever slows the machine down slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from darwinlm.runtime.progress import track

WIDE = 1.25  # the most over the least of several ratios, beyond which other work must have been in the way


class Ratio(NamedTuple):
    """How many times as fast as another a work is that takes turns with it, over all turns."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, others: Sequence[float], seconds: Sequence[float]) -> Ratio:
        """Compare the seconds of a work with those of the other in the same turns."""
        ratios = [other / own for other, own in zip(others, seconds, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    @property
    def wide(self) -> bool:
        """Whether the turns differ so much that the median is no fact about the works."""
        return self.most > WIDE * self.least

    @property
    def brief(self) -> str:
        """The median, with a question mark where the range is wide."""
        return f"{self.median:.2f}x{'?' if self.wide else ''}"

    def __str__(self) -> str:
        least, most = f"{self.least:.2f}", f"{self.most:.2f}"
        return self.brief if least == most else f"{self.brief}, {least}-{most}"


Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def now(device: torch.device) -> float:
    """Return a time in seconds, after the device has finished all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def alternate(works: Mapping[Name, Callable[[], Result]], repeats: int, description: str) -> dict[Name, list[Result]]:
    """Call the works in turns (A B C A B C ...), and return the results of each, one a turn.

    A work times itself by `now`, so its own preparations need not count. A first turn warms up and is left out.

    Args:
        repeats: the number of turns that count.
        description: what the progress display calls the work.
    """
    results: dict[Name, list[Result]] = {name: [] for name in works}
    order = [(turn, name) for turn in range(repeats + 1) for name in works]
    for turn, name in track(order, description, len(order)):
        result = works[name]()
        if turn > 0:
            results[name].append(result)
    return results
