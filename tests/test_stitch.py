"""Stitched models are candidates beside each other: they share what no genome changes, and nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import PreTrainedModel

import pruned
from darwinlm.database import stitch
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database
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


def test_a_model_with_accelerates_hooks_is_stitched_as_one_without(case: Pruned) -> None:
    """They bind a block's forward pass to the block itself, which a copy would then run with the dense weights."""
    dense: Any = case.checkpoint.load(torch.float32, pruned.CPU)
    for block in dense.model.layers:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
        add_hook_to_module(block.mlp, AlignDevicesHook(execution_device="cpu"))
    hooked, ids = Stitcher(dense, case.stitcher.family, case.database), pruned.token_ids(2)
    for genome in case.genomes():
        assert torch.equal(hooked.stitch(genome)(ids).logits, case.stitcher.stitch(genome)(ids).logits)


def test_a_hook_on_a_stitched_model_is_its_own(case: Pruned) -> None:
    stitched = case.stitcher.stitch(case.genomes()[0])
    stitched.get_submodule("model.layers.0").register_forward_pre_hook(lambda *_: pytest.fail("a hook of another"))
    case.dense(pruned.token_ids(1))


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_a_stitcher_and_its_models_are_freed_at_once(case: Pruned) -> None:
    """The garbage collector, which would free a cycle, may come long after a second model was loaded."""
    dense = case.checkpoint.load(torch.float32, pruned.CPU)
    database = Database(case.database.path, case.database.grid, {})
    stitcher = Stitcher(dense, case.checkpoint.family, database)
    stitched = stitcher.stitch(case.genomes()[0])
    references = [weakref.ref(each) for each in (stitcher, database, dense, stitched)]
    del stitcher, database, dense, stitched
    assert [reference() for reference in references] == [None] * 4


def test_narrow_modules_are_shared_while_they_are_in_use(case: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stitcher keeps so many modules, those that were used last."""
    monkeypatch.setattr(stitch, "LEVELS_KEPT", 1)
    stitcher = Stitcher(case.dense, case.checkpoint.family, case.database)
    units = len(case.database.grid.units)
    uniform = [Genome((level,) * units) for level in (1, 2)]
    first = _consumers(stitcher.stitch(uniform[0]), case)
    assert _consumers(stitcher.stitch(uniform[0]), case) == first
    stitcher.stitch(uniform[0].replace({0: 2}))  # which ousts the level that was used least recently, unit 0's first
    assert [old is new for old, new in zip(first, _consumers(stitcher.stitch(uniform[0]), case), strict=True)] == [
        False,
        *[True] * (units - 1),
    ]
    stitcher.stitch(uniform[1])
    assert not set(first) & set(_consumers(stitcher.stitch(uniform[0]), case))
    assert len(stitcher._narrow) == units


def _consumers(model: PreTrainedModel, case: Pruned) -> list[torch.nn.Module]:
    return [model.get_submodule(unit.consumer) for unit in case.database.grid.units]


def test_a_genome_for_another_model_is_refused(case: Pruned) -> None:
    with pytest.raises(UsageError, match="another model"):
        case.stitcher.stitch(Genome((1, 1)))
