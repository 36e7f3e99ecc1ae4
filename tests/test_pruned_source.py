"""A model that darwinlm has pruned is itself a model that can be read, and later pruned further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pruned
from darwinlm.checkpoint import Checkpoint
from darwinlm.types import Genome


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_an_export_is_read_like_a_dense_checkpoint(family: str, checkpoints: dict[str, Path], tmp_path: Path):
    case = pruned.prune(checkpoints[family], tmp_path / "database")
    grid = case.database.grid
    genome = Genome(tuple(grid.highest(i) if i in (2, 5) else 1 for i in range(len(grid.units))))
    checkpoint = Checkpoint(pruned.write_export(case, genome, tmp_path / "export"))
    assert checkpoint.family == case.checkpoint.family
    stitched: Any = case.stitcher.stitch(genome)
    read: Any = checkpoint.load(torch.float32, pruned.CPU)
    ids = pruned.token_ids()
    torch.testing.assert_close(read(ids).logits, stitched(ids).logits)
    shapes = {name: tensor.shape for name, tensor in checkpoint.skeleton().state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in read.state_dict().items()}
