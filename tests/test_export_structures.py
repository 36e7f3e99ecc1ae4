"""Models pruned by every attention structure, exported and loaded again, equal the zero-masked dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pruned
import tiny
from darwinlm.database.stitch import repeat_shared
from darwinlm.export.hf import export_hf
from darwinlm.model.families import block_sizes
from darwinlm.model.pruned import block_sizes_of
from darwinlm.model.reading import load
from darwinlm.types import Structure


@pytest.mark.parametrize("structure", ["kv_group", "balanced", "head"])
def test_export_of_every_structure(structure: Structure, checkpoints: dict[str, Path], tmp_path: Path):
    case = pruned.prune(checkpoints["llama-gqa"], tmp_path / "database", structure)
    grid, config, ids = case.database.grid, case.dense.config, pruned.token_ids(1)
    different = repeated = 0
    for number, genome in enumerate(case.genomes()[3:]):
        sizes = block_sizes(grid, genome, config)
        if not sizes[0].query_heads:  # which no search gives, and no export takes
            continue
        stitched = repeat_shared(case.stitcher.stitch(genome))
        exported = load(export_hf(stitched, sizes, tiny.tokenizer(), tmp_path / str(number), "card")).eval()
        expected = pruned.zero_masked(case.dense, case.database, genome)(ids).logits
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=2e-4)
        left = [block for block in sizes if block.query_heads or block.intermediate]
        assert list(block_sizes_of(exported.config)) == left
        different += len(set(left)) > 1
        repeated += any(block.key_value_heads > config.num_key_value_heads for block in left)
    assert different > 1
    assert (repeated > 0) == (structure == "head")
