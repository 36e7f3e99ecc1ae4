"""Progress of long work: a live bar with the time that is left on a terminal or in a notebook, timed lines elsewhere.

What is told goes to a file as well, as lines of JSON, and figures go to trackers such as TensorBoard, where a program
asks for that with `reporting`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")


@runtime_checkable
class Reporter(Protocol):
    """What takes figures: a tracker of accelerate, such as TensorBoard's."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Take some figures of a step."""
        ...


console = Console(stderr=True, soft_wrap=True, highlight=False)


LOG_EVERY = 10.0  # seconds between log lines where there is no terminal


_file: Path | None = None
_reporters: list[Reporter] = []


@contextmanager
def reporting(quiet: bool = False, log_file: Path | None = None) -> Iterator[None]:
    """Be silent but for errors, if `quiet`, and append what is told to a file as lines of JSON, if one is given."""
    global _file
    before, _file = (console.quiet, _file), log_file or _file
    console.quiet = quiet or console.quiet
    try:
        yield
    finally:
        console.quiet, _file = before


@contextmanager
def silence() -> Iterator[None]:
    """Tell nothing, not even a file: another process tells the same."""
    global _file
    before, _file, console.quiet = (console.quiet, _file), None, True
    try:
        yield
    finally:
        console.quiet, _file = before


@contextmanager
def reporting_to(reporters: Sequence[Reporter]) -> Iterator[None]:
    """Give figures to trackers, too."""
    _reporters.extend(reporters)
    try:
        yield
    finally:
        del _reporters[len(_reporters) - len(reporters) :]


def say(message: str) -> None:
    """Print one line on standard error."""
    _note({"message": message})
    stamp = "" if _is_live() else f"{datetime.now():%Y-%m-%d %H:%M:%S} "
    console.print(f"{stamp}{message}", markup=False)


def figures(what: str, step: int, values: Mapping[str, float]) -> None:
    """Take note of figures of one step of some work, for the file and the trackers; nothing is printed."""
    _note({"work": what, "step": step, **values})
    for reporter in _reporters:
        reporter.log({f"{what}/{name}": value for name, value in values.items()}, step=step)


def track(
    items: Iterable[Item], description: str, total: int, done: int = 0, status: Callable[[], str] = str
) -> Iterator[Item]:
    """Yield `items`, showing how many of `total` are done, an estimate of the remaining time, and a status.

    Args:
        done: items that an earlier run has finished; they count as progress but not towards the speed.
        status: returns the text that is shown with it; on a terminal it is asked several times a second.
    """
    tracked = _log(items, description, total, done, status)
    if not _is_live():
        yield from tracked
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), _Status(status), console=console) as bar:
        task = bar.add_task(description, total=total, completed=done)
        for item in tracked:
            yield item
            bar.update(task, advance=1)


class _Status(ProgressColumn):
    """A column that asks for its text whenever it is drawn."""

    def __init__(self, status: Callable[[], str]):
        super().__init__()
        self.status = status

    def render(self, task: Task) -> Text:
        """The text."""
        return Text(self.status())


def _is_live() -> bool:
    return console.is_terminal or console.is_jupyter


def _log(items: Iterable[Item], description: str, total: int, done: int, status: Callable[[], str]) -> Iterator[Item]:
    """Yield `items`, and tell from time to time how far they are: in a line where no bar does, and in the file."""
    start = last = time.monotonic()
    finished = done
    for item in items:
        yield item
        finished += 1
        now = time.monotonic()
        if now - last >= LOG_EVERY or finished == total:
            left = (now - start) / (finished - done) * (total - finished)
            suffix = f", {status()}" if status() else ""
            line = f"{description}: {finished}/{total}, {now - start:.0f} s, {left:.0f} s left{suffix}"
            if _is_live():
                _note({"message": line})
            else:
                say(line)
                sys.stderr.flush()
            last = now


def _note(event: Mapping[str, Any]) -> None:
    """Append an event to the file of this program, if there is one."""
    if _file is not None:
        with _file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": datetime.now().astimezone().isoformat(timespec="seconds"), **event}) + "\n")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading bars and warnings of transformers: this package shows its own progress."""
    from transformers.utils import logging as transformers_logging  # seconds, which the first message does not wait for

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
