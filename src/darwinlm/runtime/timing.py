"""Timing of several works side by side: they take turns, so that whatever slows the machine down slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

from darwinlm.runtime.progress import track

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
