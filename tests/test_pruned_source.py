"""A model that darwinlm has pruned can be read like a dense one, and pruned further."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import pruned
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.types import Genome, Structure


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


@pytest.mark.parametrize("structure", ["kv_group", "head"])
def test_a_pruned_model_is_pruned_further_from_each_units_own_level(
    structure: Structure, checkpoints: dict[str, Path], tmp_path: Path
):
    """Level 0 is the model as it is, and every other level leaves as much as a level of the dense unit."""
    dense = pruned.prune(checkpoints["llama-gqa"], tmp_path / "first", structure)
    grid = dense.database.grid
    rng = Random(1)
    levels = [rng.randint(0, grid.highest(i) - 1) for i in range(len(grid.units))]
    levels[3] = grid.highest(3)  # a block without MLP
    export = pruned.write_export(dense, Genome(tuple(levels)), tmp_path / "export")
    again = pruned.prune(export, tmp_path / "second", structure)
    smaller = again.database.grid
    own = {unit.name: (unit, removed) for unit, removed in zip(smaller.units, smaller.removed, strict=True)}
    for unit, removed, level in zip(grid.units, grid.removed, levels, strict=True):
        if level == len(removed) - 1:
            assert unit.name not in own
            continue
        now, further = own[unit.name]
        assert now.structures * now.structure_width == (unit.structures - removed[level]) * unit.structure_width
        assert [now.structures - count for count in further] == [unit.structures - count for count in removed[level:]]


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_what_is_pruned_twice_computes_what_the_zero_masked_model_does(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
):
    """Its logits are those of the first export with removed columns set to zero, stitched or exported and read."""
    first = pruned.prune(checkpoints[family], tmp_path / "first")
    grid = first.database.grid
    once = Genome(tuple(grid.highest(i) if i in (2, 5) else 1 for i in range(len(grid.units))))
    second = pruned.prune(pruned.write_export(first, once, tmp_path / "export"), tmp_path / "second")
    ids = pruned.token_ids()
    for genome in second.genomes():
        stitched: Any = second.stitcher.stitch(genome)
        expected = pruned.zero_masked(second.dense, second.database, genome)(ids).logits
        torch.testing.assert_close(stitched(ids).logits, expected, rtol=1e-4, atol=1e-4)
    genome = Genome(tuple(min(1, second.database.grid.highest(i)) for i in range(len(second.database.grid.units))))
    read: Any = load(pruned.write_export(second, genome, tmp_path / "twice"))
    torch.testing.assert_close(read(ids).logits, second.stitcher.stitch(genome)(ids).logits)
