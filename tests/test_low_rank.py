"""Low-rank updates: how a step of theirs compares with one of a whole matrix, and what they are counted as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from darwinlm.config.run import RefitConfig
from darwinlm.training.low_rank import DOWN, UP, LowRank, add_updates, low_rank_weights
from darwinlm.training.refit import refit, set_refitted
from darwinlm.types import Genome
from pruned import Pruned, prune, token_ids

RANK = 3
TEXT = token_ids(3, 8)


@pytest.fixture(scope="module", params=["llama-gqa", "gemma2", "gpt_neox-mha", "bloom-mha"])
def case(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    return prune(checkpoints[request.param], tmp_path_factory.mktemp("database"))


def genome_of(case: Pruned) -> Genome:
    """Dense, pruned and vanished units."""
    highest = case.stitcher.grid.highest
    return Genome((0, 1, 2, highest(3), 1, 0)[: len(case.stitcher.grid.units)])


@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_a_step_moves_a_weight_about_as_far_as_one_of_the_whole_matrix(shape: tuple[int, int]) -> None:
    """Adam's first step moves every element of a whole matrix by the learning rate."""
    torch.manual_seed(0)
    linear = nn.Linear(*shape[::-1], bias=False)
    module = LowRank(linear, 32, torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([module.up, module.down], lr=1e-3)
    read = torch.randn(128, shape[1])
    assert torch.equal(module(read), linear(read))
    (module(read) * torch.randn(128, shape[0])).sum().backward()
    optimizer.step()
    moved = (module.up @ module.down).pow(2).mean().sqrt().item()
    assert moved == pytest.approx(1e-3, rel=0.2)


def test_a_model_with_updates_in_place_is_that_with_sums_in_its_weights(case: Pruned, tmp_path: Path) -> None:
    config = RefitConfig(tokens=256, learning_rate=1e-2, rank=RANK)
    weights = refit(case.stitcher, genome_of(case), TEXT, config, tmp_path / "refit.safetensors", {})
    merged, apart = (case.stitcher.stitch(genome_of(case)) for _ in range(2))
    set_refitted(merged, weights)
    whole = {path: weight for path, weight in weights.items() if path.rpartition(".")[2] not in (UP, DOWN)}
    set_refitted(apart, whole)
    others = [path.removesuffix(f".{UP}") for path in weights if path.endswith(UP)]
    for name, parameter in add_updates(apart, others, RANK).items():
        parameter.data = weights[name]
    with torch.no_grad():
        one, two, before = (model(TEXT).logits for model in (merged, apart, case.stitcher.stitch(genome_of(case))))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert (one - before).abs().max() > 0.01


def test_all_linear_modules_of_blocks_train_and_with_rank_0_consumers_alone(case: Pruned, tmp_path: Path) -> None:
    genome, grid = genome_of(case), case.stitcher.grid
    model: Any = case.stitcher.stitch(genome)
    linears = {name for name, each in model.named_modules() if isinstance(each, nn.Linear) and "lm_head" not in name}
    linears -= {name for name in linears if model.get_submodule(name) is model.get_output_embeddings()}
    consumers = {unit.consumer for i, unit in enumerate(grid.units) if genome.levels[i] < grid.highest(i)}
    for rank in (0, RANK):
        config = RefitConfig(tokens=256, learning_rate=1e-2, rank=rank)
        weights = refit(case.stitcher, genome, TEXT, config, tmp_path / f"{rank}.safetensors", {})
        names = {name.removesuffix(f".{UP}").removesuffix(f".{DOWN}") for name in weights}
        assert names == (linears if rank else consumers)
        updates = {name: weight for name, weight in weights.items() if name not in consumers}
        counted = low_rank_weights(grid, genome, model.config.hidden_size, rank)
        # What is counted has biases of rows in it, and K and V rows that query heads share only once.
        assert sum(weight.numel() for weight in updates.values()) == pytest.approx(counted, rel=0.05)
