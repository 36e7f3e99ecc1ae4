"""Every allocator on a model that was built so that the right answer is known."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from darwinlm.config.run import SearchConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database
from darwinlm.genome import level_grid
from darwinlm.model.families import find_family, find_units
from darwinlm.model.size import parameter_count
from darwinlm.rivals.cosine import angular_distances
from darwinlm.rivals.methods import METHODS
from darwinlm.rivals.problem import Problem
from darwinlm.rivals.shortened_llama import taylor_importance
from darwinlm.rivals.shortgpt import block_influence
from darwinlm.runtime.files import read_lines
from darwinlm.search.budget import Bound, Budget
from darwinlm.search.costs import parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.uniform import ceilings, uniform_genome
from darwinlm.types import Genome, SelectionStage, UsageError
from pruned import prune, token_ids

BLOCKS = 9
SEARCH = SearchConfig(
    generations=8,
    offspring=6,
    stages=(SelectionStage(3, 64), SelectionStage(1, 128, 32)),
    start="uniform",
    learning_rate=1e-3,
)
DEPTH = ["shortgpt", "cosine", "shortened-llama", "shortened-llama-taylor"]


def model_of(idle_attention: Sequence[int], idle_mlp: Sequence[int]) -> PreTrainedModel:
    """A random Llama of which some modules add nothing to the stream."""
    config = copy.deepcopy(tiny.CONFIGS["llama-mha"])
    config.num_hidden_layers = BLOCKS
    torch.manual_seed(0)
    model: Any = tiny.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for block in idle_attention:
        model.model.layers[block].self_attn.o_proj.weight.zero_()
    for block in idle_mlp:
        model.model.layers[block].mlp.down_proj.weight.zero_()
    return model


def written_by(model: Any, sequences: int = 12) -> Tensor:
    """Return text that the model wrote itself, to which, on average, no other model gives a higher likelihood."""
    with torch.no_grad():
        start = torch.randint(1, tiny.VOCAB, (sequences, 1), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        return model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=31, max_new_tokens=31
        )


def problem_of(model: PreTrainedModel, path: Path, blocks_gone: int, **changes: Any) -> Problem:
    """Return the problem of making a model as small as it would be without some blocks."""
    grid = level_grid(find_units(model, model.config), 4, 8)
    costs = parameter_costs(grid, parameter_count(model))
    of_a_block = sum(row[0] for row in costs.units[:2])
    limit = float(costs.of(grid.dense()) - blocks_gone * of_a_block)
    budget = Budget(grid, (Bound(costs, limit, 0.99 * limit),), ceilings(grid))
    stitcher = Stitcher(model, find_family(model), Database(path / "database", grid, {}))
    text = written_by(model)
    fitness = Fitness(stitcher, text, text[:2], SEARCH)
    uniform = uniform_genome(grid, 4 * blocks_gone / BLOCKS, 4, Random(0))
    return replace(Problem(stitcher, budget, uniform, fitness, text, text, SEARCH, 0, path), **changes)


def blocks_gone(problem: Problem, genome: Genome) -> list[int]:
    """Return the blocks that have nothing left; all others must be whole."""
    levels = list(zip(genome.levels[::2], genome.levels[1::2], strict=True))
    whole = (problem.budget.grid.highest(0), problem.budget.grid.highest(1))
    assert all(pair in ((0, 0), whole) for pair in levels)
    return [block for block, pair in enumerate(levels) if pair == whole]


# Taylor+ keeps the last two blocks, so it is not tested on these.
IDLE = [*itertools.product(DEPTH, [(5, 6)]), *itertools.product(DEPTH[:-1], [(7, 8)])]


@pytest.mark.parametrize(("method", "idle"), IDLE)
def test_blocks_that_do_nothing_leave_first(method: str, idle: tuple[int, int], tmp_path: Path) -> None:
    problem = problem_of(model_of(idle, idle), tmp_path, len(idle))
    genome = METHODS[method].allocate(problem)
    assert blocks_gone(problem, genome) == list(idle)
    assert problem.budget.fits(genome)
    assert not problem.budget.fits(genome.replace({2 * idle[0]: 0, 2 * idle[0] + 1: 0}))


def test_shortened_llama_removes_the_block_without_which_the_text_is_likeliest(tmp_path: Path) -> None:
    problem = problem_of(model_of([], []), tmp_path, 1)
    losses = {}
    for block in range(1, BLOCKS):
        model: Any = model_of([block], [block])
        with torch.no_grad():
            losses[block] = model(problem.token_ids, labels=problem.token_ids).loss.item()
    (gone,) = blocks_gone(problem, METHODS["shortened-llama"].allocate(problem))
    assert losses[gone] == min(losses.values())


def test_taylor_importance_is_that_of_gradients_and_weights() -> None:
    """The gradients are those of the loss summed over sequences."""
    model: Any = model_of([], [])
    ids = written_by(model, 4)
    importances = taylor_importance(model, find_family(model), ids)
    model.requires_grad_(True)
    sum(model(row[None], labels=row[None]).loss for row in ids).backward()
    for block, importance in zip(model.model.layers, importances, strict=True):
        matrices: list[Any] = [m.weight for m in block.modules() if isinstance(m, torch.nn.Linear)]
        expected = sum((weight * weight.grad).abs().sum().item() for weight in matrices)
        assert importance == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", DEPTH)
def test_the_first_block_stays_though_it_does_nothing(method: str, tmp_path: Path) -> None:
    """Caches rely on its attention, and a method of whole blocks does not take its MLP alone."""
    problem = problem_of(model_of([0, 6], [0, 6]), tmp_path, 2)
    gone = blocks_gone(problem, METHODS[method].allocate(problem))
    assert len(gone) == 2
    assert 0 not in gone
    assert 6 in gone
    least = replace(problem.budget.main, limit=problem.budget.cost(problem.budget.least) + 1.0)
    everything = replace(problem, budget=replace(problem.budget, bounds=(least,)))
    with pytest.raises(UsageError, match="whole blocks cannot make the model this small: expected a budget"):
        METHODS[method].allocate(everything)


def test_cosine_takes_a_window_and_shortgpt_does_not(tmp_path: Path) -> None:
    """Blocks 3 and 4 undo each other: each turns the hidden state, but both together do not."""
    model: Any = model_of([3, 4], [])
    for block, sign in ((3, 1.0), (4, -1.0)):  # a constant step, and the same one back
        mlp = model.model.layers[block].mlp
        model.model.layers[block].mlp = Step(sign, mlp)
    problem = problem_of(model_of([], []), tmp_path, 2)
    problem = replace(problem, stitcher=Stitcher(model, problem.stitcher.family, problem.stitcher.database))
    assert blocks_gone(problem, METHODS["cosine"].allocate(problem)) == [3, 4]
    assert blocks_gone(problem, METHODS["shortgpt"].allocate(problem)) != [3, 4]


class Step(torch.nn.Module):
    """Adds the same vector to every token."""

    def __init__(self, sign: float, mlp: torch.nn.Module):
        super().__init__()
        self.mlp, self.sign = mlp, sign

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.full_like(hidden, 30.0 * self.sign) * (torch.arange(hidden.shape[-1]) % 2)


def test_taylor_keeps_the_first_blocks_and_the_last_while_others_are_left(tmp_path: Path) -> None:
    idle = [2, 8]  # of the first four and of the last two
    problem = problem_of(model_of(idle, idle), tmp_path, BLOCKS - 4 - 2 + 2)
    middle = set(range(4, BLOCKS - 2))
    assert set(blocks_gone(problem, METHODS["shortened-llama-taylor"].allocate(problem))) == middle | set(idle)


def test_influence_and_distance_are_those_of_hidden_states() -> None:
    """They equal those of transformers' own hidden states, without the last one, which is normed."""
    model, ids = model_of([2], [2]), token_ids().clamp(min=4)  # 3 pads: its embedding is zero
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]
    influence = block_influence(model, find_family(model), ids)
    distance = angular_distances(model, find_family(model), ids)
    assert len(influence) == BLOCKS
    for block in range(BLOCKS - 1):
        a, b = states[block].double(), states[block + 1].double()
        cos = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        assert influence[block] == pytest.approx(1 - cos.mean().item(), abs=1e-5)
        angle = torch.arccos(cos[:, -1].clamp(max=1)).mean().item() / torch.pi
        assert distance[block, block + 1].item() == pytest.approx(angle, abs=1e-5)
    assert influence[2] == pytest.approx(0, abs=1e-6)


def test_evopress_finds_the_modules_that_do_nothing(tmp_path: Path) -> None:
    problem = problem_of(model_of([3], [7]), tmp_path, 1)
    genome = METHODS["evopress"].allocate(problem)
    gone = {i for i, level in enumerate(genome.levels) if level}
    assert gone == {2 * 3, 2 * 7 + 1}
    assert all(genome.levels[i] == problem.budget.grid.highest(i) for i in gone)
    assert problem.fitness.scores([genome], SEARCH.stages[0])[0] == pytest.approx(0, abs=1e-5)
    _, history = read_lines(tmp_path / "history.jsonl")
    assert len(history) == 1 + SEARCH.generations
    for kind in (0, 1):  # a step keeps what each kind has lost
        assert len({sum(line["genome"][kind::2]) for line in history}) == 1
    assert not any(line["training_tokens"] for line in history)


def test_evopress_may_score_as_much_as_our_start_and_generations_do(tmp_path: Path) -> None:
    """Our start scores the dense model and 18 units at three levels on 64 tokens, and two starts on 128 tokens."""
    search = replace(SEARCH, start="sensitivity", offspring=4, generations=2)
    problem = problem_of(model_of([], []), tmp_path, 1, config=search)
    a_generation = 4 * 64 + 3 * 64
    grid = problem.budget.grid
    levels = sum(
        len({1, round(grid.highest(i) / 3), round(grid.highest(i) * 2 / 3), grid.highest(i)}) for i in range(18)
    )
    assert problem.scored_tokens == (1 + levels) * 64 + 2 * 128 + 2 * a_generation
    METHODS["evopress"].allocate(problem)
    spent = sum(line["fitness_tokens"] for line in read_lines(tmp_path / "history.jsonl")[1])
    assert problem.scored_tokens - a_generation < spent <= problem.scored_tokens


@dataclass(frozen=True)
class Weighted:
    """A model whose loss is a weighted sum of its units' errors, as ZipLM assumes."""

    errors: list[list[float]]
    weights: list[float]

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        rows = [zip(self.weights, self.errors, genome.levels, strict=True) for genome in genomes]
        return [sum(weight * row[level] for weight, row, level in cells) for cells in rows]


def test_ziplm_is_the_best_of_all_genomes_and_its_search_finds_weights(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    case = prune(checkpoints["mistral"], tmp_path / "database")
    grid, database = case.database.grid, case.database
    costs = parameter_costs(grid, parameter_count(case.dense))
    table = [database.errors(i) for i in range(len(grid.units))]
    relative = [[error / row[-1] for error in row] for row in table]
    assert all(row[0] == 0 and row[-1] == 1 and row == sorted(row) for row in relative)
    rest = costs.fixed + 0.6 * (costs.of(grid.dense()) - costs.fixed)
    budget = Budget(grid, (Bound(costs, rest),), ceilings(grid))
    genomes = map(Genome, itertools.product(*(range(top + 1) for top in budget.ceilings)))
    fitting = [genome for genome in genomes if budget.fits(genome)]

    def best(weights: list[float]) -> float:
        return min(Weighted(relative, weights).scores(fitting, SEARCH.stages[0]), default=inf)

    equal, unequal = [1.0] * 6, [1.0, 0.1, 1.0, 0.2, 0.15, 1.0]
    text = token_ids()
    problem = Problem(case.stitcher, budget, grid.dense(), Weighted(relative, equal), text, text, SEARCH, 0, tmp_path)
    plain = METHODS["ziplm"].allocate(replace(problem, config=replace(SEARCH, generations=0)))
    assert budget.fits(plain)
    assert Weighted(relative, equal).scores([plain], SEARCH.stages[0]) == [pytest.approx(best(equal))]
    truth = Weighted(relative, unequal)
    chosen = METHODS["ziplm"].allocate(replace(problem, fitness=truth, config=replace(SEARCH, generations=50)))
    assert budget.fits(chosen)
    found_loss, plain_loss = truth.scores([chosen, plain], SEARCH.stages[0])
    assert plain_loss > 1.05 * best(unequal)  # so that there is something to find
    assert found_loss == pytest.approx(best(unequal), rel=0.02)


def test_evolution_is_no_worse_than_its_start_with_training_and_without(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    case = prune(checkpoints["mistral"], tmp_path / "database")
    grid = case.database.grid
    uniform = uniform_genome(grid, 2.0, 4, Random(0))
    costs = parameter_costs(grid, parameter_count(case.dense))
    limit = float(costs.of(uniform))
    budget = Budget(grid, (Bound(costs, limit, 0.97 * limit),), ceilings(grid))
    for method, stage in (("evolution", SelectionStage(1, 128)), ("training-aware", SEARCH.stages[-1])):
        fitness = Fitness(case.stitcher, token_ids(), token_ids(1)[:1], SEARCH)
        state = tmp_path / method
        problem = Problem(case.stitcher, budget, uniform, fitness, token_ids(), token_ids(), SEARCH, 0, state)
        genome = METHODS[method].allocate(problem)
        assert budget.fits(genome)
        assert fitness.score(genome, stage) < fitness.score(uniform, stage)
        _, history = read_lines(state / "history.jsonl")
        assert any(line["training_tokens"] for line in history) == (method == "training-aware")


def test_uniform_is_the_given_uniform_genome(tmp_path: Path) -> None:
    problem = problem_of(model_of([], []), tmp_path, 3)
    assert METHODS["uniform"].allocate(problem) == problem.uniform
