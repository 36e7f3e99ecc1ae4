"""How long work takes that may be killed and go on: a file keeps the seconds."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from darwinlm.runtime.files import read_json, write_json

BEAT = 2.0  # seconds that a kill may hide


class Stopwatch:
    """Counts the seconds of a `with` block, on top of those that earlier, killed processes spent in it.

    Args:
        file: keeps them.
        go_on: whether what those processes did is still there; else it is all to be done, and timed, anew.
    """

    def __init__(self, file: Path, go_on: bool):
        self.file = file
        self.seconds: float = read_json(file, "seconds")["seconds"] if go_on and file.exists() else 0.0
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
            write_json(self.file, {"seconds": self.seconds})
