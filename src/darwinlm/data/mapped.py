"""Files of tensors, mapped into memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from darwinlm.runtime.files import open_tensors, read_tensors

OPEN_FILES = 512  # that are mapped into memory at a time: Linux allows a process 65,530 maps


def mapped(file: Path, delete: Path | None = None) -> Any:
    """An open safetensors file, mapped into memory once in each process, and again if the file has been replaced.

    Its checksum is verified when the process opens it first.

    Raises:
        DarwinError: as `read_tensors`.
    """
    return _mapped(file, delete, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=OPEN_FILES)
def _mapped(file: Path, delete: Path | None, written: int) -> Any:
    if (file, written) not in _verified:
        read_tensors(file, delete)
        _verified.add((file, written))
    return open_tensors(file, delete).__enter__()


_verified = set[tuple[Path, int]]()  # files, and the times at which they were written
