"""The refit against a plain loop over whole logits, across an interruption, and on what it must not touch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from darwinlm.config.run import RefitConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.model.families import linear_at
from darwinlm.training import low_rank
from darwinlm.training import refit as module
from darwinlm.training.refit import refit, set_refitted
from darwinlm.types import DarwinError, Genome
from pruned import prune, token_ids

CONFIG = RefitConfig(tokens=256, learning_rate=1e-2, batch_size=3, rank=2)
TEXT = token_ids(3, 8)


@pytest.fixture(scope="module", params=["llama-gqa", "gemma2"])  # biases; and logits that are capped
def stitcher(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Stitcher:
    return prune(checkpoints[request.param], tmp_path_factory.mktemp("database")).stitcher


@pytest.fixture(scope="module")
def genome(stitcher: Stitcher) -> Genome:
    """Dense, pruned and vanished units."""
    return Genome((0, 1, 2, stitcher.grid.highest(3), 1, 0))


def divergence(stitcher: Stitcher, model: Any, ids: Tensor) -> Tensor:
    """KL(dense || model), plainly."""
    with torch.no_grad():
        log_p = stitcher.dense(ids).logits.log_softmax(-1)
    log_q = model(ids).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


class _Sum(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = linear.weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, generator=generator) / math.sqrt(rank))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def plain_refit(stitcher: Stitcher, genome: Genome) -> dict[str, Tensor]:
    """The same optimisation as a user would write it, on a copy of the model.

    Every other linear module has a weight that is a sum, in which a product of two matrices is learned. Random ones
    begin as those of the refit do; tests/test_low_rank.py says how they are drawn.
    """
    model = copy.deepcopy(stitcher.stitch(genome)).requires_grad_(False)
    alive = [u.consumer for i, u in enumerate(stitcher.grid.units) if genome.levels[i] < stitcher.grid.highest(i)]
    weights: dict[str, Any] = {path: linear_at(model, path).weight.requires_grad_() for path in alive}
    generator = torch.Generator().manual_seed(low_rank.SEED)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in path and path not in alive:
            learned = _Sum(linear, CONFIG.rank, generator)
            parametrize.register_parametrization(linear, "weight", learned)
            weights |= {f"{path}.low_rank_down": learned.down, f"{path}.low_rank_up": learned.up}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    steps = math.ceil(len(TEXT) / CONFIG.batch_size)
    for step in range(steps):
        rate = CONFIG.learning_rate * min(1, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        divergence(stitcher, model, TEXT[step * CONFIG.batch_size : (step + 1) * CONFIG.batch_size]).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {path: weight.detach() for path, weight in weights.items()}


@pytest.mark.parametrize("at_once", [1, 2])  # of three in a step
def test_it_is_the_plain_optimisation_of_the_divergence(
    at_once: int, stitcher: Stitcher, genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "sequences_at_once", lambda *_: at_once)
    weights = refit(stitcher, genome, TEXT, CONFIG, tmp_path / "refit.safetensors", {})
    expected = plain_refit(stitcher, genome)
    assert weights.keys() == expected.keys()
    for path, weight in weights.items():
        torch.testing.assert_close(weight, expected[path], rtol=1e-3, atol=1e-4)


def test_the_divergence_falls_and_nothing_shared_changes(stitcher: Stitcher, genome: Genome, tmp_path: Path) -> None:
    dense = {name: tensor.clone() for name, tensor in stitcher.dense.state_dict().items()}
    with torch.no_grad():
        before = divergence(stitcher, stitcher.stitch(genome), TEXT)
        weights = refit(stitcher, genome, TEXT, CONFIG, tmp_path / "refit.safetensors", {})
        model = stitcher.stitch(genome)
        assert divergence(stitcher, model, TEXT) == before
        set_refitted(model, weights)
        assert divergence(stitcher, model, TEXT) < 0.97 * before
        assert divergence(stitcher, stitcher.stitch(genome), TEXT) == before
    for name, tensor in stitcher.dense.state_dict().items():
        assert torch.equal(tensor, dense[name])


def test_one_that_was_interrupted_ends_with_the_same_weights(
    stitcher: Stitcher, genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = refit(stitcher, genome, TEXT, CONFIG, tmp_path / "whole.safetensors", {})
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    part, calls, accumulate = tmp_path / "part.safetensors", [], module._accumulate

    def interrupted(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 5:  # in the second step
            raise KeyboardInterrupt
        return accumulate(*arguments)

    monkeypatch.setattr(module, "_accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refit(stitcher, genome, TEXT, CONFIG, part, {})
    calls += [1] * 10
    resumed = refit(stitcher, genome, TEXT, CONFIG, part, {})
    assert len(calls) == 15 + len(TEXT) - CONFIG.batch_size  # the first step was not done again
    again = refit(stitcher, genome, TEXT, CONFIG, part, {})
    for path, weight in whole.items():
        assert torch.equal(weight, resumed[path])
        assert torch.equal(weight, again[path])


def test_the_file_of_another_refit_is_refused(stitcher: Stitcher, genome: Genome, tmp_path: Path) -> None:
    refit(stitcher, genome, TEXT, CONFIG, tmp_path / "refit.safetensors", {"seed": 0})
    with pytest.raises(DarwinError, match="is of another refit"):
        refit(stitcher, genome, TEXT, CONFIG, tmp_path / "refit.safetensors", {"seed": 1})


def test_one_that_diverges_says_what_to_do(stitcher: Stitcher, genome: Genome, tmp_path: Path) -> None:
    config = RefitConfig(tokens=256, learning_rate=1e36, batch_size=1)
    with pytest.raises(DarwinError, match=r"diverged at step \d+: lower --refit.learning-rate"):
        refit(stitcher, genome, TEXT, config, tmp_path / "refit.safetensors", {})
    assert not list(tmp_path.iterdir())
