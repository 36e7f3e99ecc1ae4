"""Directories that one process works in at a time, and that nobody else may remove meanwhile."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from darwinlm.types import DarwinError, UsageError

LOCK = ".lock"


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Create the directory `path` and lock it for this process.

    A refused command leaves no lock in a directory that had none, and no new directory that stays empty.

    Raises:
        UsageError: if `path` cannot be written to, if another process has locked it, or if there are symbolic links in
            it, behind which nothing may be written or removed.
    """
    new_parents = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        new_lock = not (path / LOCK).exists()
        links = [
            entry
            for root, names, files in os.walk(path)
            for entry in (*names, *files)
            if Path(root, entry).is_symlink()
        ]
        lock = os.fdopen(os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; choose another directory") from None
    with lock:
        if not is_mine(lock.fileno(), path / LOCK):
            raise UsageError(f"another process is working in {path}; wait, or choose another directory")
        try:
            if links:
                raise UsageError(
                    f"{path} has a symbolic link in it, {links[0]}: expected none, for nothing outside of it may be "
                    "written or removed; put what it leads to in its place, or choose another directory"
                )
            with holding(path):
                yield
        except UsageError:
            if new_lock:
                (path / LOCK).unlink(missing_ok=True)
            raise
        finally:
            _remove_empty(new_parents)


def is_mine(descriptor: int, path: Path) -> bool:
    """Lock an open file for this process: False if another one has it, or if `path` names another file by now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_empty(directories: Sequence[Path]) -> None:
    """Remove new directories, from the innermost, as long as they have nothing but a lock in them."""
    for directory in directories:
        if not directory.is_dir() or {entry.name for entry in directory.iterdir()} - {LOCK}:
            return
        (directory / LOCK).unlink(missing_ok=True)
        directory.rmdir()


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Let `replaced` refuse to write in a directory once it has been removed, instead of making it anew."""
    _held.append((path.absolute(), path.stat()))
    try:
        yield
    finally:
        _held.pop()


_held = list[tuple[Path, os.stat_result]]()


def check_held(path: Path) -> None:
    """Raise `DarwinError` if a held directory that `path` is in is no longer the one that it was."""
    for directory, before in _held:
        if path.absolute().is_relative_to(directory) and not _is_still(directory, before):
            raise DarwinError(
                f"{directory} was removed while this command worked in it; run the command again, which begins anew"
            )


def _is_still(directory: Path, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(directory.stat(), before)
    except OSError:
        return False
