"""A model directory that is written again with other weights, a few gigabytes in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from darwinlm.model.hub import CARRIED
from darwinlm.model.shards import INDEX

SHARD = 4 << 30  # bytes of a file of weights


def write_model(
    out: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], beside: Iterable[Path]
) -> None:
    """Write a model into an existing, empty directory.

    Args:
        config: what its `config.json` says.
        tensors: names and values, which are held until a file of weights is full.
        beside: directories whose tokenizer, card and licence are copied; those of a later one win.
    """
    for directory in beside:
        for file in {file for pattern in CARRIED for file in directory.glob(pattern)}:
            shutil.copyfile(file, out / file.name)
    index: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        held[name] = tensor.contiguous()
        if sum(each.nbytes for each in held.values()) >= SHARD:
            _flush(out, held, index)
    _flush(out, held, index)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    (out / "config.json").write_text(json.dumps(dict(config), indent=2))


def _flush(out: Path, held: dict[str, Tensor], index: dict[str, str]) -> None:
    if held:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(held, out / file, {"format": "pt"})
        index.update(dict.fromkeys(held, file))
        held.clear()
