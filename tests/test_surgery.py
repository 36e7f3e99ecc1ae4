"""Stitched models are candidates beside each other: they share what no genome changes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pruned
from darwinlm.types import Genome, UsageError
from pruned import Pruned


@pytest.fixture(scope="module")
def case(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return pruned.prune(checkpoints["llama-gqa"], tmp_path_factory.mktemp("database"), "head")


def test_stitching_leaves_the_dense_model_and_other_candidates_alone(case: Pruned) -> None:
    ids, (one, other, *_) = pruned.token_ids(2), case.genomes()
    dense_logits, first = case.dense(ids).logits, case.stitcher.stitch(one)
    logits = first(ids).logits
    case.stitcher.stitch(other)
    assert torch.equal(case.dense(ids).logits, dense_logits)
    assert torch.equal(first(ids).logits, logits)
    assert not torch.equal(logits, dense_logits)


def test_untouched_weights_are_shared_not_copied(case: Pruned) -> None:
    stitched = case.stitcher.stitch(Genome((1,) + (0,) * (len(case.database.grid.units) - 1)))
    shared = {parameter.data_ptr() for parameter in case.dense.parameters()}
    attention = set(stitched.get_submodule("model.layers.0.self_attn").parameters())
    assert all(p.data_ptr() in shared for p in stitched.parameters() if p not in attention)


def test_a_genome_for_another_model_is_refused(case: Pruned) -> None:
    with pytest.raises(UsageError, match="another model"):
        case.stitcher.stitch(Genome((1, 1)))
