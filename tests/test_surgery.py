"""Calibration, database and surgery on every family: the stitched model against the zero-masked dense one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.calibrate import calibrate
from darwinlm.checkpoint import Checkpoint
from darwinlm.config import DatabaseConfig
from darwinlm.database import Database, add_unit
from darwinlm.genome import level_grid, prunable_parameters
from darwinlm.surgery import Stitcher
from darwinlm.types import Genome, UsageError

CPU = torch.device("cpu")
CONFIG = DatabaseConfig(levels=4, granularity=8)


def token_ids(seed: int = 0, sequences: int = 6) -> Tensor:
    return torch.randint(tiny.VOCAB, (sequences, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pruned(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Checkpoint, Database, PreTrainedModel]]:
    """A checkpoint with its database and its dense model."""
    checkpoint = Checkpoint(checkpoints[request.param])
    grid = level_grid(checkpoint.units, CONFIG.levels, CONFIG.granularity)
    database = Database(tmp_path_factory.mktemp(f"database-{request.param}"), grid, {})
    for statistics in calibrate(checkpoint, token_ids(), batch_size=4, device=CPU):
        add_unit(database, statistics, CONFIG, torch.float32)
    yield checkpoint, database, checkpoint.load(torch.float32, CPU)


def zero_masked(dense: PreTrainedModel, database: Database, genome: Genome) -> PreTrainedModel:
    """The oracle: the dense model with a removed structure's columns zero and the database's weights in the others."""
    model = type(dense)(dense.config).eval()
    model.load_state_dict(dense.state_dict())
    for index, (unit, level) in enumerate(zip(database.grid.units, genome.levels, strict=True)):
        consumer = model.get_submodule(unit.consumer)
        if level == database.grid.highest(index):
            consumer.weight.data.zero_()
            if consumer.bias is not None:
                consumer.bias.data.zero_()
        elif level:
            found = database.level(index, level)
            width = unit.structure_width
            columns = torch.cat([torch.arange(s * width, (s + 1) * width) for s in found.kept.tolist()])
            consumer.weight.data.zero_()
            consumer.weight.data[:, columns] = found.weight
    return model


def genomes(database: Database) -> list[Genome]:
    """Random genomes, and one in which units vanish."""
    rng, grid = Random(0), database.grid
    random = [Genome(tuple(rng.randint(0, grid.highest(i)) for i in range(len(grid.units)))) for _ in range(6)]
    return [*random, grid.dense(), Genome(tuple(grid.highest(i) if i in (2, 5) else 1 for i in range(len(grid.units))))]


def test_hessians_equal_those_of_the_whole_model(pruned: tuple[Checkpoint, Database, PreTrainedModel]) -> None:
    """Block by block gives what hooks on the dense model's own forward give, in float64."""
    checkpoint, _, dense = pruned
    inputs: dict[str, Tensor] = {}
    hooks = [
        dense.get_submodule(unit.consumer).register_forward_pre_hook(
            lambda _, args, name=unit.name: inputs.__setitem__(name, args[0].flatten(0, 1).double())
        )
        for unit in checkpoint.units
    ]
    dense(token_ids())
    for hook in hooks:
        hook.remove()
    statistics = list(calibrate(checkpoint, token_ids(), batch_size=4, device=CPU))  # 6 sequences: a smaller last batch
    assert [s.unit for s in statistics] == list(checkpoint.units)
    for found in statistics:
        x = inputs[found.unit.name]
        torch.testing.assert_close(found.hessian.double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)
        assert found.tokens == len(x) == 192


def test_units_already_measured_are_passed_through(pruned: tuple[Checkpoint, Database, PreTrainedModel]) -> None:
    checkpoint, _, _ = pruned
    everything = {s.unit.name: s.hessian for s in calibrate(checkpoint, token_ids(), batch_size=4, device=CPU)}
    done = [unit.name for unit in checkpoint.units[:3]]
    rest = list(calibrate(checkpoint, token_ids(), batch_size=4, device=CPU, finished=done))
    assert [s.unit.name for s in rest] == [unit.name for unit in checkpoint.units[3:]]
    assert all(torch.equal(s.hessian, everything[s.unit.name]) for s in rest)


def test_stitched_logits_equal_the_zero_masked_models(pruned: tuple[Checkpoint, Database, PreTrainedModel]) -> None:
    checkpoint, database, dense = pruned
    stitcher, ids = Stitcher(dense, checkpoint.family, database), token_ids(1)
    for genome in genomes(database):
        expected = zero_masked(dense, database, genome)(ids).logits
        torch.testing.assert_close(stitcher.stitch(genome)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_stitched_model_is_as_small_as_its_genome_says(pruned: tuple[Checkpoint, Database, PreTrainedModel]) -> None:
    checkpoint, database, dense = pruned
    stitcher, grid = Stitcher(dense, checkpoint.family, database), database.grid
    size = sum(parameter.numel() for parameter in dense.parameters())
    for genome in genomes(database):
        left = sum(parameter.numel() for parameter in stitcher.stitch(genome).parameters())
        assert size - left == prunable_parameters(grid, grid.dense()) - prunable_parameters(grid, genome)


def test_stitching_leaves_the_dense_model_and_other_candidates_alone(
    pruned: tuple[Checkpoint, Database, PreTrainedModel],
) -> None:
    checkpoint, database, dense = pruned
    stitcher, ids = Stitcher(dense, checkpoint.family, database), token_ids(2)
    dense_logits, (one, other, *_) = dense(ids).logits, genomes(database)
    first = stitcher.stitch(one)
    logits = first(ids).logits
    stitcher.stitch(other)
    assert torch.equal(dense(ids).logits, dense_logits)
    assert torch.equal(first(ids).logits, logits)
    assert not torch.equal(logits, dense_logits)


def test_untouched_weights_are_shared_not_copied(pruned: tuple[Checkpoint, Database, PreTrainedModel]) -> None:
    checkpoint, database, dense = pruned
    stitched = Stitcher(dense, checkpoint.family, database).stitch(Genome((1,) + (0,) * (len(checkpoint.units) - 1)))
    shared = {parameter.data_ptr() for parameter in dense.parameters()}
    attention = set(stitched.get_submodule("model.layers.0.self_attn").parameters())
    assert all(p.data_ptr() in shared for p in stitched.parameters() if p not in attention)


def test_a_genome_for_another_model_is_refused(pruned: tuple[Checkpoint, Database, PreTrainedModel]) -> None:
    checkpoint, database, dense = pruned
    with pytest.raises(UsageError, match="another model"):
        Stitcher(dense, checkpoint.family, database).stitch(Genome((1, 1)))
