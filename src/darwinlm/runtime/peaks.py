"""The highest memory of this process, and of what torch holds of a GPU, within some time."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import ClassVar

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


RESET = "5"  # written to CLEAR, it makes Linux forget the highest memory so far


class Peaks:
    """The highest memory while a `with` block runs. The system has one mark, and any number of blocks may share it.

    Attributes:
        host: bytes of this process. Where the system cannot forget a mark (`exact`), the highest since its start.
        device: bytes of tensors on a GPU; 0 on other devices.
        exact: whether `host` is of this time alone.
    """

    _watching: ClassVar[list[Peaks]] = []
    _lock: ClassVar[Lock] = Lock()

    def __init__(self, device: torch.device):
        self.host = self.device = 0
        self.exact = True
        self._on = device

    def __enter__(self) -> Peaks:
        with self._lock:
            for other in self._watching:
                other._take()
            self._forget()
            self._watching.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._take()
            self._watching.remove(self)

    def note(self) -> None:
        """Take the marks that there are by now into account, while the block runs."""
        with self._lock:
            self._take()

    def _take(self) -> None:
        self.host = max(self.host, highest())
        if self._on.type == "cuda":
            self.device = max(self.device, torch.cuda.max_memory_allocated(self._on))

    def _forget(self) -> None:
        try:
            CLEAR.write_text(RESET)
        except OSError:
            self.exact = False
        if self._on.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._on)


def held() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _status("VmRSS") if STATUS.exists() else 0


def highest() -> int:
    """The most bytes that this process has held since the mark was forgotten."""
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    """The value of a line of this process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
