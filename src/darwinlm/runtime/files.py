"""Files that are written whole or not at all, and the record of format, checksum and provenance in those of a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from darwinlm.runtime.locking import check_held, is_mine
from darwinlm.types import DarwinError, UsageError


class DamagedError(DarwinError):
    """A file was cut off or altered after it was written."""


def check_new(out: Path, directory: bool = True) -> None:
    """Raise `UsageError` unless `out` is free: it does not exist or, for a directory, is empty."""
    if out.exists() and not (directory and out.is_dir() and not any(out.iterdir())):
        expected = "new or empty" if directory else "new"
        actual = "a file" if out.is_file() else "a directory with files in it" if any(out.iterdir()) else "a directory"
        raise UsageError(f"expected {out} to be {expected}, found {actual}; choose another name or remove it")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` to write in, which is renamed to `out` in the end and removed on any failure.

    Raises:
        UsageError: if `out` exists and is not an empty directory, if its parent cannot be written to, or if another
            process is writing `out`.
    """
    check_new(out)
    with _partial(out, directory=True) as partial:
        yield partial
        os.replace(partial, out)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A temporary file beside `out` to write to, which is renamed to `out` in the end and removed on any failure.

    Raises:
        UsageError: if `out` exists, if its parent cannot be written to, or if another process is writing `out`.
    """
    check_new(out, directory=False)
    with _partial(out, directory=False) as partial:
        yield partial
        os.replace(partial, out)


@contextmanager
def _partial(out: Path, directory: bool) -> Iterator[Path]:
    """A hidden name beside `out`, locked by this process. What a killed process left under it is removed."""
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            partial.mkdir(exist_ok=True)
        kind = os.O_RDONLY | os.O_DIRECTORY if directory else os.O_RDWR | os.O_CREAT
        descriptor = os.open(partial, kind | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}; choose another place") from None
    try:
        if not is_mine(descriptor, partial):
            raise UsageError(f"another process is writing {out}; wait for it, or choose another name")
        try:
            for leftover in partial.iterdir() if directory else ():
                _remove(leftover)
            yield partial
        finally:
            _remove(partial)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a directory and its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


FORMAT_VERSION = 2  # of the files of a run; those that version 0.1.0 wrote do not name theirs, which counts as 1
RECORD = "darwinlm"  # the key of a safetensors file's metadata that holds its record
REFUSED = "start a new run in another --out, or use the version that wrote it"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, which then takes its place: a reader sees the old file or the new.

    The temporary file is removed on any failure; what a killed process leaves is removed by `sweep`.

    Raises:
        DarwinError: if the directory that this process has locked was removed since.
    """
    check_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.unlink(missing_ok=True)  # of a killed process, or a link to elsewhere
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, without a record: for tables that users read."""
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
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or JSON that is nested too deeply
        raise _damaged(path, error) from None
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
        raise _damaged(path, error) from None
    for value in values:
        _expect_keys(path, value, keys)
    return values


def _expect_keys(path: Path, value: Any, keys: Sequence[str]) -> None:
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise _damaged(path, f"it lacks {missing[0]}")


def _damaged(path: Path, reason: object, delete: Path | None = None) -> DamagedError:
    return DamagedError(f"{path} is damaged ({reason}); delete {delete or 'it'} and run the command again")


def as_json(value: Any) -> Any:
    """The value as it comes back from a JSON file: lists for tuples, strings for all keys."""
    return json.loads(json.dumps(value))


def write_record(path: Path, content: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Write an artifact as JSON, atomically: `content` beside the format version, a checksum and the provenance.

    Args:
        provenance: what the content was made from.
    """
    value = as_json({"provenance": provenance, **content})
    write_json(path, {"format": FORMAT_VERSION, "sha256": _checksum(value), **value})


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """What `write_record` wrote: the content, and the provenance under `provenance`.

    Raises:
        DarwinError: if the file is missing, damaged, lacks one of `keys`, or is of another format version.
    """
    return check_record(path, read_json(path), *keys)


def check_record(path: Path, value: Any, *keys: str, cure: str = REFUSED) -> dict[str, Any]:
    """The content and provenance in `value`, a record that was read from `path`.

    Args:
        cure: what to do where the record is of another format version.

    Raises:
        DarwinError: as `read_record`.
    """
    version = value.get("format") if isinstance(value, dict) else None
    if version is None:  # by 0.1.0, or no record at all
        _expect_keys(path, value, keys)
    _check_version(path, version or 1, cure)
    _expect_keys(path, value, ("sha256", "provenance", *keys))
    content = {key: item for key, item in value.items() if key not in ("format", "sha256")}
    if _checksum(content) != value["sha256"]:
        raise _damaged(path, "its checksum does not match")
    return content


def _check_version(path: Path, version: object, cure: str = REFUSED) -> None:
    if version != FORMAT_VERSION:
        raise DarwinError(
            f"{path} was written by another version of darwinlm (format {version}, expected {FORMAT_VERSION}): {cure}"
        )


def _checksum(record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of a record in canonical JSON, then of the tensors in the order of their names."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    """Write JSON objects, one a line, atomically. The first line is their record, as `write_record` writes it."""
    content = {"provenance": as_json(provenance), "lines": [as_json(line) for line in lines]}
    record = {"format": FORMAT_VERSION, "sha256": _checksum(content), "provenance": content["provenance"]}
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in (record, *content["lines"])))


def read_lines(path: Path, *keys: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `write_lines` wrote: the provenance, and the lines, each of which has `keys`.

    Raises:
        DarwinError: as `read_record`, or if a line lacks one of `keys`.
    """
    found = read_json_lines(path)
    if not found:
        raise _damaged(path, "it is empty")
    record, *lines = found
    provenance = check_record(path, record | {"lines": lines})["provenance"]
    for line in lines:
        _expect_keys(path, line, keys)
    return provenance, lines


def write_tensors(path: Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any], **notes: Any) -> None:
    """Write contiguous tensors on the CPU to a safetensors file, atomically, with its record in the metadata.

    The record names the file and its directory, so that a file is not taken for another of the same run.

    Args:
        provenance: what the tensors were made from.
        notes: more to remember, as JSON holds it.
    """
    record = as_json({"provenance": provenance, "name": _name_of(path), **notes})
    record = {"format": FORMAT_VERSION, "sha256": _checksum(record, tensors), **record}
    with replaced(path) as temporary:
        save_file(dict(tensors), temporary, {RECORD: json.dumps(record)})


def open_tensors(path: Path, delete: Path | None = None) -> Any:
    """Open a file of `write_tensors` by memory map, without reading it whole: its checksum is not verified.

    Args:
        delete: what is to be deleted where the file is damaged, for the next run to make it again; the file if None.

    Raises:
        DarwinError: if it is missing, no such file, cut off, another file of the run, or of another format version.
    """
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise _damaged(path, error, delete) from None
    record = _record_of(opened)
    _check_version(path, record.get("format", 1))
    if record.get("name") != _name_of(path):
        raise _damaged(path, f"it was written as {record.get('name')}", delete)
    return opened


def _name_of(path: Path) -> str:
    """The name of a file within its directory, which stays the same when a run is moved."""
    return f"{path.absolute().parent.name}/{path.name}"


def read_tensors(path: Path, delete: Path | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_tensors` wrote: the provenance and the notes, and the tensors.

    The tensors are mapped into memory: what is not used takes none, and what is used takes memory of its own only where
    it is changed.

    Args:
        delete: as for `open_tensors`.

    Raises:
        DarwinError: as `open_tensors`, and if the checksum does not match.
    """
    with open_tensors(path, delete) as opened:
        record = _record_of(opened)
        content = {key: item for key, item in record.items() if key not in ("format", "sha256")}
        if _checksum(content, _tensors_of(opened)) != record.get("sha256"):
            raise _damaged(path, "its checksum does not match", delete)
    with open_tensors(path, delete) as opened:  # mapped anew, for the checksum has read every page
        return content, _tensors_of(opened)


def _tensors_of(opened: Any) -> dict[str, Tensor]:
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_notes(path: Path, *keys: str) -> dict[str, Any]:
    """The provenance and the notes in a file of `write_tensors`, whose tensors are not read.

    Raises:
        DarwinError: as `open_tensors`, and if one of `keys` is missing.
    """
    with open_tensors(path) as opened:
        record = _record_of(opened)
    _expect_keys(path, record, keys)
    return record


def _record_of(opened: Any) -> dict[str, Any]:
    """The record in the metadata of a safetensors file, an empty one if it has none that can be read."""
    try:
        record = json.loads((opened.metadata() or {}).get(RECORD, "{}"))
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def sweep(path: Path) -> None:
    """Remove the temporary files that a killed process left in a directory that this process has locked."""
    for leftover in [*path.glob("*.partial"), *path.glob("*/*.partial")]:
        _remove(leftover)
