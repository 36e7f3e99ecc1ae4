"""Temporary directories, which are removed in the end, or by the next process if this one is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from darwinlm.runtime.locking import LOCK, is_mine
from darwinlm.types import DarwinError

PREFIX = "darwinlm-"


@contextmanager
def scratch_directory(what: str) -> Iterator[Path]:
    """A new temporary directory for the length of a `with` block.

    Args:
        what: it is for, as part of its name.

    Raises:
        DarwinError: if there is no place for temporary files, or it is full.
    """
    try:
        root = Path(tempfile.gettempdir())
        _sweep(root)
        directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{what}-"))
        lock = (directory / LOCK).open("w")
    except OSError as error:
        raise DarwinError(
            f"no temporary directory can be made ({error.strerror or error}): expected room in TMPDIR, /tmp or "
            "/var/tmp; set TMPDIR to a directory that has some"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with scratch_writing():
                yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def scratch_writing() -> Iterator[None]:
    """Name the temporary directory where a write to it fails because it is full.

    Raises:
        DarwinError: if it is.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save has only the latter
        root = tempfile.gettempdir()
        failed = isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not failed or shutil.disk_usage(root).free > 1 << 20:
            raise
        raise DarwinError(f"the temporary directory {root} is full; free some of it, or set TMPDIR") from None


def _sweep(root: Path) -> None:
    """Remove what killed processes of this user have left."""
    for directory in root.glob(f"{PREFIX}*"):
        try:
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            with (directory / LOCK).open() as lock:
                if is_mine(lock.fileno(), directory / LOCK):  # or its process lives
                    shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # it is no directory of ours
            continue
