"""The time that interrupted and resumed work takes in all, kept in a file."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from darwinlm.runtime.files import read_record, write_record

BEAT = 2.0  # seconds between two writes of the file, which a kill loses at most


class Stopwatch:
    """Counts the seconds of a `with` block, and adds those that earlier, killed processes spent in it.

    Args:
        file: holds the seconds.
        go_on: whether the results of those processes still exist. If not, counting starts from zero.
    """

    def __init__(self, file: Path, go_on: bool):
        self.file = file
        self.seconds: float = read_record(file, "seconds")["seconds"] if go_on and file.exists() else 0.0
        self._done = Event()
        self._thread = Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Stopwatch:
        self._began = time.monotonic() - self.seconds
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _keep(self) -> None:
        over = False
        while not over:
            over = self._done.wait(BEAT)
            self.seconds = time.monotonic() - self._began
            write_record(self.file, {"seconds": self.seconds}, {})
