"""The digests of the files in a directory, by which a later process finds out whether one of them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from darwinlm.runtime.files import read_record, write_record

THREADS = 8
CARD = ("README.md",)  # of an export: a report rewrites it, and users may


def digests(directory: Path, but: Container[str] = ()) -> dict[str, str]:
    """The SHA-256 of every file in a directory and below it, by its path within.

    Args:
        but: names of files to leave out.
    """
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in but)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_digest, files)
        return {file.relative_to(directory).as_posix(): digest for file, digest in zip(files, found, strict=True)}


def first_change(directory: Path, sealed: Mapping[str, str], but: Container[str] = ()) -> str | None:
    """The first file that is missing or is not what it was when `digests` returned `sealed`; None if there is none.

    Files that have come since do not count.
    """
    found = digests(directory, but)
    return next((name for name, digest in sealed.items() if found.get(name) != digest), None)


def seal_export(export: Path, file: Path, provenance: Mapping[str, Any]) -> None:
    """Note in a file what the files of an export hold, other than its card, so that damage to them is found."""
    write_record(file, {"files": digests(export, CARD)}, provenance)


def export_damage(export: Path, file: Path) -> str | None:
    """The first file of an export, other than its card, that is not what was sealed, or None if all are.

    Raises:
        DarwinError: if the record of what was written is missing or damaged.
    """
    return first_change(export, read_record(file, "files")["files"], CARD)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
