"""Where an export is written: a new directory or file that takes its name once whole, and never the place of any."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from darwinlm.types import UsageError


def check_new(out: Path, directory: bool = True) -> None:
    """Raise `UsageError` unless `out` is free: not there yet, or for a directory an empty one."""
    if out.exists() and not (directory and out.is_dir() and not any(out.iterdir())):
        expected = "new or empty" if directory else "new"
        found = "a file" if out.is_file() else "a directory with files in it" if any(out.iterdir()) else "a directory"
        raise UsageError(f"expected {out} to be {expected}, found {found}; choose another name or remove it")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write in, which takes its name in the end and is removed on any failure.

    Raises:
        UsageError: if `out` is there already and not an empty directory, its place cannot be written to, or another
            process writes it.
    """
    check_new(out)
    with _partial(out, directory=True) as partial:
        yield partial
        os.replace(partial, out)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A name beside `out` to write to, which becomes `out` in the end and is removed on any failure.

    Raises:
        UsageError: if `out` is there already, its place cannot be written to, or another process writes it.
    """
    check_new(out, directory=False)
    with _partial(out, directory=False) as partial:
        yield partial
        os.replace(partial, out)


@contextmanager
def _partial(out: Path, directory: bool) -> Iterator[Path]:
    """A hidden name beside `out`, held by this process. What a killed process left there is removed."""
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            partial.mkdir(exist_ok=True)
        held = os.open(partial, os.O_RDONLY if directory else os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}; choose another place") from None
    try:
        _lock(held, partial, out)
        try:
            for left in partial.iterdir() if directory else ():
                _remove(left)
            yield partial
        finally:
            _remove(partial)
    finally:
        os.close(held)


def _lock(held: int, partial: Path, out: Path) -> None:
    """Raise `UsageError` if another process writes `out`, or has just finished it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(held), partial.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise UsageError(f"another process is writing {out}; wait for it, or choose another name")


def _remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
