"""How artifacts reach the disk: whole or not at all, and with what made them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from darwinlm.types import DarwinError, UsageError


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


LOCK = ".lock"


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader sees the old one or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, *keys: str) -> Any:
    """Read JSON, which must be an object with `keys` if any are given.

    Raises:
        DarwinError: if the file is missing, no JSON, or lacks a key.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DarwinError(f"{path} is missing; run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DarwinError(f"{path} is damaged ({error}); delete it and run the command again") from None
    _expect_keys(path, value, keys)
    return value


def read_json_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line, each with `keys`.

    Raises:
        DarwinError: if a line is no JSON, or lacks a key.
    """
    try:
        values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DarwinError(f"{path} is damaged ({error}); delete it and run the command again") from None
    for value in values:
        _expect_keys(path, value, keys)
    return values


def _expect_keys(path: Path, value: Any, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise DarwinError(f"{path} is damaged (it lacks {missing[0]}); delete it and run the command again")


def open_tensors(path: Path, delete: Path | None = None) -> Any:
    """Open a safetensors file by memory map.

    Args:
        delete: what is to be deleted where the file is damaged, for the next run to make it again; the file if None.

    Raises:
        DarwinError: if it is missing, no such file, or cut off.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise DarwinError(f"{path} is damaged ({error}); delete {delete or 'it'} and run the command again") from None


def sweep(path: Path) -> None:
    """Remove what a killed process left under temporary names in a directory that this process holds."""
    for left in [*path.glob("*.partial"), *path.glob("*/*.partial")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Create `path` and hold it for this process. If it was not there and stays empty, it is removed in the end.

    Raises:
        UsageError: if it cannot be written to, or another process holds it.
    """
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("w")
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; choose another directory") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is working in {path}; wait, or choose another directory") from None
        try:
            yield
        finally:
            if created and [entry.name for entry in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()
                path.rmdir()
