"""The time and the memory of every stage of a run, also of one that is killed and goes on, kept in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

import torch

from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_record, write_record
from darwinlm.runtime.peaks import Peaks, highest

BEAT = 2.0  # seconds between two writes of the file, which a kill loses at most


@dataclass(frozen=True)
class StageUse:
    """What a stage has taken so far, in all processes that went on with it one after another.

    Attributes:
        seconds: their sum.
        host: the most bytes of memory that the first process held.
        device: the most bytes of tensors on its GPU; 0 without one.
    """

    seconds: float
    host: int
    device: int


class Stages:
    """The stages of a run, in the order in which they began.

    Args:
        file: holds what they took.
        device: on which they compute.
    """

    def __init__(self, file: Path, device: torch.device):
        self.file = file
        self.device = device
        kept = read_record(file, "stages")["stages"] if file.exists() else {}
        self.used = {name: StageUse(**values) for name, values in kept.items()}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measure a stage, beside what it has taken before. Of several processes the first writes."""
        before, began, done = self.used.get(name, StageUse(0.0, 0, 0)), time.monotonic(), Event()

        def keep() -> None:
            over = False
            while not over:
                over = done.wait(BEAT)
                peaks.note()
                seconds = before.seconds + time.monotonic() - began
                self.used[name] = StageUse(seconds, max(before.host, peaks.host), max(before.device, peaks.device))
                with suppress(OSError):  # the stage itself meets a full disk, and says so
                    self._write()

        thread = Thread(target=keep, daemon=True)
        with Peaks(self.device) as peaks:
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that have passed before there was a file, with the most memory until now."""
        before = self.used.get(name, StageUse(0.0, 0, 0))
        self.used[name] = StageUse(before.seconds + seconds, max(before.host, highest()), before.device)
        self._write()

    def _write(self) -> None:
        if parallel.first():
            write_record(self.file, {"stages": {name: asdict(use) for name, use in self.used.items()}}, {})
