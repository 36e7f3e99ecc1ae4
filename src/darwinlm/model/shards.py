"""The weight files of a model directory, by the index that names them."""

from __future__ import annotations

from pathlib import Path

from darwinlm.runtime.files import read_json
from darwinlm.types import DarwinError

WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"


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


def _is_bare(file: object) -> bool:
    """Whether this is the name of a file and no path."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & {"/", "\\", "\0"}
