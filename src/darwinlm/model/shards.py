"""The weight files of a model directory: the index that names them, and what they say that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from darwinlm.runtime.files import read_json
from darwinlm.types import DarwinError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


# Precisions by their names in safetensors files.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Header(NamedTuple):
    """What a file of weights says of a tensor: the file's name, the precision by its name in the file, the shape.

    Attributes:
        stored: its name in the file, and whether it is transposed there, where a model has it otherwise.
    """

    file: str
    precision: str
    shape: tuple[int, ...]
    stored: str = ""
    transposed: bool = False


def read_index(directory: Path) -> dict[str, str] | None:
    """The file that holds each tensor, or None where there is no index or, as for transformers, one file is enough.

    Raises:
        DarwinError: if the index is damaged, or a file that it names may lie outside of the directory.
    """
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return None
    index = directory / INDEX
    shards = read_json(index, "weight_map")["weight_map"]
    if not isinstance(shards, dict):
        raise DarwinError(f"{index} is damaged: expected a file for each tensor, found {shards!r}; fetch it again")
    for file in shards.values():
        if not _is_bare(file):
            raise DarwinError(
                f"{index} is not to be trusted: expected names of files beside it, found {file!r}; fetch the model "
                "from where it was published"
            )
    return shards


def read_headers(directory: Path) -> dict[str, Header]:
    """What the files of a model directory say of every tensor in them, by its name; no weight is read.

    Raises:
        DarwinError: if a file cannot be read, if a tensor is in two of them, or as `read_index`.
    """
    index = read_index(directory)
    headers: dict[str, Header] = {}
    for file in [WEIGHTS] if index is None else sorted(set(index.values())):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    stored = opened.get_slice(name)
                    if name in headers:
                        raise DarwinError(
                            f"{name} is in {directory / file} and in {headers[name].file}: expected it once; fetch the "
                            "checkpoint again"
                        )
                    headers[name] = Header(file, stored.get_dtype(), tuple(stored.get_shape()))
        except (SafetensorError, OSError) as error:
            raise DarwinError(f"{directory / file} cannot be read ({error}); fetch the checkpoint again") from None
    for name, file in (index or {}).items():
        if name not in headers or headers[name].file != file:
            raise DarwinError(f"{directory / INDEX}: expected {name} in {file}, found none; fetch the checkpoint again")
    return headers


@contextmanager
def open_shard(file: Path) -> Iterator[safe_open]:
    """Open a file of weights. Raises `DarwinError` if it is missing, or cannot be read to the end of the context."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, FileNotFoundError) as error:
        raise DarwinError(f"{file} cannot be read ({error}); fetch the checkpoint again") from None


def read_tensor(directory: Path, file: str, name: str) -> torch.Tensor:
    """One tensor as stored in a file of a directory. Raises `DarwinError` as `open_shard`."""
    with open_shard(directory / file) as shard:
        return shard.get_tensor(name)


def _is_bare(file: object) -> bool:
    """Whether this is the name of a file and no path."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & {"/", "\\", "\0"}
