"""A model with the weights that a GGUF file would hold, to judge a type of file without llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Precision
from torch import Tensor, nn

from darwinlm.export.gguf import bytes_in, encoded, precisions
from darwinlm.export.gguf_graphs import Description
from darwinlm.export.gguf_precision import EMBEDDING, OUTPUT
from darwinlm.export.gguf_tensors import Weights, Written, tensors
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.types import FileType

FLOATS = {Precision.F32: torch.float32, Precision.F16: torch.float16, Precision.BF16: torch.bfloat16}


@torch.no_grad()
def twin(directory: Path, file_type: FileType, importance: Mapping[str, Tensor] | None = None) -> tuple[Any, int]:
    """Return the model of a directory in float32 with the weights that its GGUF file has, and the bytes of those.

    Rows are quantised one by one, so their order in the file does not matter, and columns of zeros that a graph wants
    are there while they are. Where a file splits a fused projection, all of it takes the precision of its first part.
    Learned positions and what blocks are given of each token (Gemma 4) count in the bytes and keep their precision.

    Args:
        directory, importance: as for `export_gguf`.

    Raises:
        UsageError: if llama.cpp cannot run the model, or the package libgguf is missing.
    """
    checkpoint = Checkpoint(directory)
    description = Description(checkpoint.config)
    written = list(tensors(description, Weights(checkpoint)))
    chosen = precisions(written, file_type, len(description.room))
    model: Any = load(directory).float()
    ends = {EMBEDDING: model.get_input_embeddings(), OUTPUT: model.get_output_embeddings()}
    if ends[EMBEDDING].weight is ends[OUTPUT].weight and any(tensor.name == OUTPUT for tensor in written):
        ends[OUTPUT].weight = nn.Parameter(ends[OUTPUT].weight.clone())  # the file has both
    done, size = set[str](), 0
    for tensor, precision in zip(written, chosen, strict=True):
        size += bytes_in(tensor, precision)
        sources = [path for path in (tensor.source, *tensor.others) if path and len(tensor.shape) == 2]
        modules = (
            {tensor.name: ends[tensor.name]} if tensor.name in ends else {p: model.get_submodule(p) for p in sources}
        )
        for path in modules.keys() - done:
            weights = (importance or {}).get(tensor.source)
            modules[path].weight.copy_(_as_held(tensor, modules[path].weight, precision, weights))
        done |= modules.keys()
    return model.eval(), size


def _as_held(tensor: Written, weight: Tensor, precision: Precision, importance: Tensor | None) -> Tensor:
    """A weight as a precision holds it."""
    spread = weight if tensor.columns is None else tensor.columns(weight)
    held = _decoded(encoded(replace(tensor, make=lambda: spread), precision, importance), precision)
    if tensor.columns is None:
        return held
    numbers = tensor.columns(torch.arange(1.0, weight.shape[1] + 1)[None])[0]  # zero where there is none
    places = numbers.nonzero().flatten()
    return held[:, places[numbers[places].argsort()]]


def _decoded(values: np.ndarray, precision: Precision) -> Tensor:
    if precision in FLOATS:
        return torch.from_numpy(values).view(FLOATS[precision]).float()
    return torch.from_numpy(gguf.quants.dequantize(values, precision))
