"""Progress of long work: a live bar with the remaining time on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

Item = TypeVar("Item")


console = Console(stderr=True, soft_wrap=True, highlight=False)


LOG_EVERY = 10.0  # seconds between log lines where there is no terminal


def say(message: str) -> None:
    """Print one line on standard error."""
    console.print(message, markup=False)


def track(
    items: Iterable[Item], description: str, total: int, done: int = 0, status: Callable[[], str] = str
) -> Iterator[Item]:
    """Yield `items`, showing how many of `total` are done, an estimate of the remaining time, and a status.

    Args:
        done: items that an earlier run has finished; they count as progress but not towards the speed.
        status: returns the text that is shown after each item.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
        with Progress(*columns, *left, console=console) as bar:
            task = bar.add_task(description, total=total, completed=done, status=status())
            for item in items:
                yield item
                bar.update(task, advance=1, status=status())
        return
    yield from _log(items, description, total, done, status)


def _log(items: Iterable[Item], description: str, total: int, done: int, status: Callable[[], str]) -> Iterator[Item]:
    start = last = time.monotonic()
    finished = done
    for item in items:
        yield item
        finished += 1
        now = time.monotonic()
        if now - last >= LOG_EVERY or finished == total:
            left = (now - start) / (finished - done) * (total - finished)
            suffix = f", {status()}" if status() else ""
            say(f"{description}: {finished}/{total}, {now - start:.0f} s, {left:.0f} s left{suffix}")
            sys.stderr.flush()
            last = now


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading bars and warnings of transformers: this package shows its own progress."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
