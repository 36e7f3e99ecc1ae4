"""What a search will take, against the operations that torch counts while one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from darwinlm.commands.plan.work import SearchPlan, plan_search
from darwinlm.config.run import RefitConfig, SearchConfig
from darwinlm.model.size import parameter_count
from darwinlm.search.budget import Bound, Budget
from darwinlm.search.costs import parameter_costs
from darwinlm.search.evolution import evolve
from darwinlm.search.fitness import Fitness
from darwinlm.search.sensitivity import find_starts
from darwinlm.search.uniform import ceilings, uniform_genome
from darwinlm.types import Genome, SelectionStage
from pruned import CONFIG, Pruned, prune, token_ids

SEARCH = SearchConfig(
    generations=2, offspring=6, stages=(SelectionStage(3, 64), SelectionStage(2, 128), SelectionStage(1, 256))
)


RANK = 2


def counted(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=["llama-gqa", "qwen2"])
def case(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    return prune(checkpoints[request.param], tmp_path_factory.mktemp("database"))


def at(case: Pruned, config: SearchConfig = SEARCH, tokens: int = 256) -> tuple[Genome, SearchPlan]:
    uniform = uniform_genome(case.database.grid, 2.0, CONFIG.levels, Random(0))
    model = parameter_count(case.dense), case.dense.config, case.database.grid
    refit = RefitConfig(tokens=tokens, batch_size=2, rank=RANK)
    return uniform, plan_search(*model, uniform, config, refit, token_ids().shape[1])


def moving(model: Any) -> int:
    """Weights that multiply something: all but those of an embedding of its own."""
    own = not model.config.tie_word_embeddings
    return parameter_count(model) - own * model.get_input_embeddings().weight.numel()


def weights_of(model: Any, modules: set[str]) -> int:
    return sum(w.numel() for name, w in model.named_parameters() if name.rpartition(".")[0] in modules)


def test_start_and_generations_are_what_is_computed(case: Pruned, tmp_path: Path) -> None:
    uniform, planned = at(case)
    grid = case.database.grid
    costs = parameter_costs(grid, parameter_count(case.dense))
    budget = Budget(grid, (Bound(costs, float(costs.of(uniform))),), ceilings(grid))
    scorer, found = Fitness(case.stitcher, token_ids(1, 8), token_ids(2, 8), SEARCH), dict[str, Genome]()

    def start() -> None:
        found.update(find_starts(uniform, budget, scorer, SEARCH, 0, tmp_path))
        evolve(found, budget, scorer, replace(SEARCH, generations=0), 0, tmp_path / "history.jsonl")

    # Beside the products of weights there are the scores of attention.
    assert 0.9 < counted(start) / planned.start.forward < 1.2
    generations = counted(lambda: evolve(found, budget, scorer, SEARCH, 0, tmp_path / "history.jsonl"))
    # Blocks before the first that differs from the parent's are not computed.
    assert 0.6 < generations / planned.generations.forward < 1.2


@pytest.mark.parametrize("trains", ["all", "consumers"])
def test_training_is_counted_by_what_trains(case: Pruned, trains: str) -> None:
    """By hand: 6 offspring see 32 tokens, 2 of them 32 more, and are scored anew on 64 and on 128.

    Scoring makes the dense model's logits, too.
    """
    stages = (SelectionStage(2, 64, 32), SelectionStage(1, 128, 64))
    config = replace(SEARCH, stages=stages, trains=trains)
    uniform, planned = at(case, config)
    model: Any = case.stitcher.stitch(uniform)
    small = moving(model)
    blocks = {name.rpartition(".")[0] for name, _ in model.named_parameters() if ".layers." in name}
    trained = weights_of(model, blocks if trains == "all" else {unit.consumer for unit in case.database.grid.units})
    steps = 6 * 32 + 2 * 32
    logits = model.lm_head.weight.numel()
    scores, training = 2 * (small + logits) * (6 * 64 + 2 * 128), (4 * small + 2 * trained) * steps
    expected = (config.generations * scores, config.generations * training)
    assert astuple(planned.generations) == pytest.approx(expected, rel=0.02)  # norms and biases


def test_the_refit_is_counted_for_two_models(case: Pruned) -> None:
    """By hand: both models forwards, one backwards, the gradients of the consumers that are left, and the updates."""
    uniform, planned = at(case)
    dense, small = (moving(model) for model in (case.dense, case.stitcher.stitch(uniform)))
    consumers = {unit.consumer for unit in case.database.grid.units}
    model: Any = case.stitcher.stitch(uniform)
    producers = {name: each for name, each in model.model.layers.named_modules() if isinstance(each, nn.Linear)}
    updates = RANK * sum(
        sum(each.weight.shape) for name, each in producers.items() if f"model.layers.{name}" not in consumers
    )
    expected = (2 * 256 * 2 * dense, 2 * 256 * (4 * small + 2 * weights_of(model, consumers) + 6 * updates))
    assert astuple(planned.refit) == pytest.approx(expected, rel=0.02)
