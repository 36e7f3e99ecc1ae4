"""ShearedLLaMA's masks: they find structures that nothing reads, and follow their distribution's formulas."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from darwinlm.config.run import SearchConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database
from darwinlm.genome import level_grid
from darwinlm.model.families import find_family, find_units, linear_at
from darwinlm.model.size import parameter_count
from darwinlm.rivals import sheared_llama as sheared
from darwinlm.rivals.problem import Problem, mask_tokens
from darwinlm.rivals.sheared_llama import HardConcrete, learn_masks, nearest_genome, sheared_llama
from darwinlm.search.budget import Bound, Budget
from darwinlm.search.costs import parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.uniform import ceilings
from darwinlm.types import DarwinError
from test_rivals import written_by

THERE, IDLE = (4, 16, 4, 16), (1, 4, 2, 8)  # structures of each unit, and those of them that nothing reads
LENGTH = 32
SEARCH = SearchConfig(mask_tokens=150 * LENGTH)


@pytest.fixture(scope="module")
def idle() -> list[set[int]]:
    rng = Random(0)
    return [set(rng.sample(range(size), count)) for size, count in zip(THERE, IDLE, strict=True)]


@pytest.fixture
def problem(idle: list[set[int]], tmp_path: Path) -> Problem:
    """The problem of removing most of what nothing reads from two blocks: a closed mask still counts a twentieth."""
    config = copy.deepcopy(tiny.CONFIGS["llama-mha"])
    config.num_hidden_layers, config.intermediate_size = 2, 16
    torch.manual_seed(0)
    model: Any = tiny.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    units = find_units(model, model.config)
    for unit, gone in zip(units, idle, strict=True):
        weight = linear_at(model, unit.consumer).weight.data.mul_(2)
        weight.unflatten(1, (unit.structures, unit.structure_width))[:, sorted(gone)] = 0
    grid = level_grid(units, 4, 4)
    costs = parameter_costs(grid, parameter_count(model))
    lost = sum(unit.parameters(0) - unit.parameters(count) for unit, count in zip(units, IDLE, strict=True))
    limit = costs.of(grid.dense()) - 0.85 * lost
    budget = Budget(grid, (Bound(costs, limit),), ceilings(grid))
    stitcher = Stitcher(model, find_family(model), Database(tmp_path / "database", grid, {}))
    text = written_by(model, 200)
    fitness = Fitness(stitcher, text[:1], text[:1], SEARCH)
    return Problem(stitcher, budget, grid.dense(), fitness, text, text, SEARCH, 0, tmp_path)


@pytest.mark.slow
def test_masks_close_on_exactly_what_nothing_reads(problem: Problem, idle: list[set[int]]) -> None:
    weights = {name: parameter.clone() for name, parameter in problem.stitcher.dense.named_parameters()}
    kept = learn_masks(problem)
    assert [{i for i, p in enumerate(unit.tolist()) if p < 0.5} for unit in kept] == idle
    for name, parameter in problem.stitcher.dense.named_parameters():  # frozen while masks learn, and as before after
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None
        assert parameter.requires_grad
    genome = nearest_genome(problem.budget, kept)
    assert genome.levels == (1, 1, 2, 2)
    assert problem.budget.fits(genome)


@pytest.mark.slow
def test_masks_settle_on_the_size_by_themselves(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second half of the steps, what masks remove is within 5 % of the target, before the final shift."""
    removed: list[float] = []
    loss = sheared._Lagrangian.loss

    def noted(self: Any, *arguments: Any) -> Tensor:
        penalty = loss(self, *arguments)
        removed.append(self.removed / self.target)
        return penalty

    monkeypatch.setattr(sheared._Lagrangian, "loss", noted)
    learn_masks(problem)
    assert len(removed) == 150
    assert removed[75:] == pytest.approx([1.0] * 75, abs=0.05)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_the_genome_fits_every_budget_and_fills_it(problem: Problem, share: float) -> None:
    """The shift meets the budget even if masks had too few steps to come near it."""
    costs, grid = problem.budget.main.costs, problem.budget.grid
    limit = costs.fixed + (1 - share) * (costs.of(grid.dense()) - costs.fixed)
    budget = replace(problem.budget, bounds=(Bound(costs, limit),))
    short = replace(problem, budget=budget, config=replace(SEARCH, mask_tokens=2 * LENGTH))
    lost = (structures - kept.sum().item() for structures, kept in zip(THERE, learn_masks(short), strict=True))
    expected = sum(map(np.interp, lost, grid.removed, costs.units))
    assert costs.fixed + expected == pytest.approx(limit, rel=1e-4)
    genome = sheared_llama(short)
    assert budget.fits(genome)
    assert not any(budget.fits(genome.replace({unit: level - 1})) for unit, level in enumerate(genome.levels) if level)


def test_the_same_seed_learns_the_same(problem: Problem) -> None:
    short = replace(problem, config=replace(SEARCH, mask_tokens=10 * LENGTH))
    first, same, other = (torch.cat(learn_masks(replace(short, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_masks_are_hard_concrete() -> None:
    """Masks are 0 as often as `kept` says, and 1 as often as the distribution says."""
    masks = HardConcrete([20_000, 20_000], 0, torch.device("cpu"))
    masks.log_alpha.data[:20_000] = -1.0
    masks.log_alpha.data[20_000:] = 0.7
    for log_alpha, sample, kept in zip((-1.0, 0.7), masks.sample(), masks.kept(), strict=True):
        assert sample.min() == 0
        assert sample.max() == 1
        assert (sample > 0).float().mean().item() == pytest.approx(kept[0].item(), abs=0.01)
        # A mask is 1 where the concrete variable is above (1 - gamma) / (zeta - gamma).
        chance = torch.sigmoid(log_alpha - torch.tensor(1.1 / 1.2).logit() * 2 / 3)
        assert (sample == 1).float().mean().item() == pytest.approx(chance.item(), abs=0.01)


def test_steps_without_a_finite_gradient_are_left_out(problem: Problem, capsys: pytest.CaptureFixture[str]) -> None:
    dense: Any = problem.stitcher.dense
    text = problem.calibration[:4].clone()
    unused = next(token for token in range(1, tiny.VOCAB) if not (text == token).any())
    dense.get_input_embeddings().weight.data[unused] = float("nan")
    text[0, 3] = unused
    short = replace(problem, calibration=text, config=replace(SEARCH, mask_tokens=8 * LENGTH))
    assert all(unit.isfinite().all() for unit in learn_masks(short))
    assert "2 of 8 steps had no finite gradient" in capsys.readouterr().err
    with pytest.raises(DarwinError, match="expected a finite loss on the calibration text, found NaN or infinity"):
        learn_masks(replace(short, calibration=text[:1]))


def test_by_default_it_takes_as_long_as_the_search(problem: Problem) -> None:
    """Masks learn on a third of the tokens that the search scores on.

    The search scores the dense model and each of four units at three levels on 1,024 tokens, two starts on 8,192, and
    in 40 generations 16 mutants on 1,024 tokens each, and the survivors on those that their stages add.
    """
    assert [problem.budget.grid.highest(index) for index in range(4)] == [4, 4, 4, 4]
    scored = (1 + 4 * 3) * 1024 + 2 * 8192 + 40 * (16 * 1024 + 8 * 1024 + 4 * 2048 + 2 * 4096)
    plain = replace(problem, config=SearchConfig())
    assert plain.scored_tokens == scored
    grid = plain.budget.grid
    assert mask_tokens(grid, plain.config, LENGTH) == scored // 3
    assert mask_tokens(grid, SearchConfig(mask_tokens=2000), LENGTH) == 2000
    assert replace(plain, config=SearchConfig(start="uniform", generations=0)).scored_tokens == 8192
