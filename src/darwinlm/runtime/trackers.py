"""Trackers such as TensorBoard, trackio and wandb, through accelerate: where figures of a run go as they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from transformers.integrations import get_available_reporting_integrations

from darwinlm.runtime import parallel
from darwinlm.runtime.progress import reporting_to
from darwinlm.types import UsageError


def check_trackers(names: Sequence[str], flag: str) -> None:
    """Raise `UsageError`, which names the flag, if a tracker is not installed."""
    installed = get_available_reporting_integrations()
    known = ", ".join(installed) or "nothing"
    for name in names:
        if name not in installed:
            raise UsageError(
                f"--{flag}: expected what is installed ({known}), found {name!r}; install it or leave it out"
            )


@contextmanager
def tracking(names: Sequence[str], directory: Path) -> Iterator[None]:
    """Let the first process give its figures to trackers; those that write files write them into `directory`."""
    if not names or not parallel.first():
        yield
        return
    trackers = [_start(name, directory) for name in names]
    try:
        with reporting_to(trackers):
            yield
    finally:
        for tracker in trackers:
            tracker.finish()


def _start(name: str, directory: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": directory} if kind.requires_logging_directory else {}
    tracker = kind(f"darwinlm-{directory.parent.name}", **place)
    tracker.start()
    return tracker
