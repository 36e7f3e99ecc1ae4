"""Costs equal what models really have, and targets are reached or refused."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import flops
import runs
from darwinlm.commands import compress
from darwinlm.config.run import DatabaseConfig, RunConfig, SearchConfig
from darwinlm.database.stitch import repeat_shared
from darwinlm.genome import Grid, level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count
from darwinlm.runtime.progress import console
from darwinlm.search.budget import Bound, Budget, Target
from darwinlm.search.costs import Costs, amount_of, cache_costs, flop_costs, level_costs, parameter_costs
from darwinlm.search.mutation import priced, restore, spread
from darwinlm.search.uniform import ceilings, fullest, uniform, uniform_genome
from darwinlm.types import Genome, Structure, Unit, UsageError
from pruned import Pruned, prune, token_ids
from test_genome import units

STRUCTURES = get_args(Structure)
LENGTH = 32


@pytest.fixture(scope="module", params=STRUCTURES)
def pruned(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    return prune(checkpoints["mistral"], tmp_path_factory.mktemp("database"), request.param)  # which has no biases


def test_parameters_are_those_of_the_exported_model(pruned: Pruned) -> None:
    costs = parameter_costs(pruned.database.grid, parameter_count(pruned.dense))
    for genome in pruned.genomes():
        assert costs.of(genome) == parameter_count(repeat_shared(pruned.stitcher.stitch(genome)))


def test_cache_is_what_generation_keeps(pruned: Pruned) -> None:
    costs = cache_costs(pruned.database.grid, pruned.dense.config, 4)
    for genome in pruned.genomes():
        model: Any = repeat_shared(pruned.stitcher.stitch(genome))
        cache = DynamicCache()
        with torch.no_grad():
            model(token_ids()[:1], past_key_values=cache, use_cache=True)
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        # A block without attention before others leaves the cache an empty layer.
        assert costs.of(genome) * LENGTH == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_flops_are_those_that_torch_counts(pruned: Pruned) -> None:
    """PyTorch counts attention over all tokens, so the context of causal attention is twice as long."""
    costs = flop_costs(pruned.database.grid, pruned.dense.config, 2 * LENGTH)
    for genome in pruned.genomes():
        model = repeat_shared(pruned.stitcher.stitch(genome))
        model.set_attn_implementation("eager")  # which it knows
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(token_ids()[:1], use_cache=False)
        assert (counter.get_total_flops() - flops.rotary(model, LENGTH)) / LENGTH == costs.of(genome)


def test_a_group_that_keeps_a_head_keeps_its_cache() -> None:
    """With single heads of grouped queries, an export repeats K and V, so that losing one head costs cache."""
    unit = Unit("a", 0, "attention", "", (), 2, 6, 10, 1, readers=3, shared_parameters=8)
    costs = Costs("parameters", ((6 * 10 + 2 * 8 + 1, *((6 - i) * 18 + 1 for i in range(1, 6)), 0),), 0)
    grid = level_grid((unit,), 6, 32)
    assert parameter_costs(grid, 77).units == costs.units
    budget = Budget(grid, (Bound(costs, 80.0),), (6,))
    assert budget.steps == ((0, 2, 3, 4, 5, 6),)  # level 1 costs more than the dense unit
    assert budget.worth(Genome((1,))) == Genome((0,))
    assert budget.dearer(Genome((2,)), 0) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params=0.6", Target("params", 0.6, True)),
        ("params=4.7B", Target("params", 4.7e9, False)),
        ("params=.5", Target("params", 0.5, True)),
        ("flops=1.2G", Target("flops", 1.2e9, False)),
        ("kv-cache=12K", Target("kv-cache", 12e3, False)),
        ("params=100000", Target("params", 1e5, False)),
        ("latency=0.7", Target("latency", 0.7, True)),
        ("latency=20ms", Target("latency", 0.02, False)),
    ],
)
def test_a_target_is_a_share_or_an_amount(text: str, expected: Target) -> None:
    target = Target.parse(text)
    assert (target.measure, target.share) == (expected.measure, expected.share)
    assert target.amount == pytest.approx(expected.amount)


@pytest.mark.parametrize(
    "text", ["", "0.6", "params", "params=", "params=-1", "params=0", "size=0.6", "flops=2ms", "params=1x"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--target: expected params, flops, .* found .*; give another value"):
        Target.parse(text)


shapes = st.tuples(st.integers(4, 12), st.integers(4, 12), st.integers(8, 40).map(lambda steps: 32 * steps))
MODEL = 400_000  # parameters, including input and output embeddings


def at(grid: Grid, target: str, **changes: Any) -> tuple[Genome, Budget]:
    config = RunConfig("M", "D", "O", target=target, database=DatabaseConfig(levels=10), **changes)
    return uniform(grid, parameter_costs(grid, MODEL), config, MODEL)


@settings(max_examples=15, deadline=None)
@given(shapes, st.floats(0.8, 0.99), st.integers(0, 100), st.booleans())
def test_a_reachable_target_is_met_from_below(
    shape: tuple[int, int, int], share: float, seed: int, keep_attention: bool
) -> None:
    grid = level_grid(units(*shape), 10, 32)
    try:
        genome, budget = at(grid, f"params={share}", seed=seed, keep_attention=keep_attention)
    except UsageError:
        return  # a small model has less than a fifth to lose
    grid.check(genome)
    assert budget.main.limit == pytest.approx(share * MODEL)
    assert 0.99 * budget.main.limit <= budget.cost(genome) <= budget.main.limit
    mutant, rng = genome, Random(seed)
    for _ in range(5):
        mutant = priced(mutant, budget, rng, 3) or mutant
        assert 0.99 * budget.main.limit <= budget.cost(mutant) <= budget.main.limit
        assert mutant.levels[0] < grid.highest(0)
        assert not keep_attention or all(mutant.levels[i] < grid.highest(i) for i in range(0, len(mutant.levels), 2))


def test_a_grid_too_coarse_says_so_and_takes_what_is_below() -> None:
    grid = level_grid(units(2, heads=2, channels=64), 2, 32)
    costs = parameter_costs(grid, 5000)
    everything = sorted({costs.of(Genome(levels)) for levels in itertools.product(range(2), *[range(3)] * 3)})
    below, limit = next((a, b - 1) for a, b in itertools.pairwise(everything) if b - 1 > 1.02 * a)
    config = RunConfig("M", "D", "O", target=f"params={limit}", database=DatabaseConfig(levels=2))
    with console.capture() as said:
        genome, budget = uniform(grid, costs, config, 5000)
    assert said.get().count("\n") == 1
    assert f"within 1% of {amount_of(limit)} parameters: {amount_of(below)} is the closest found below" in said.get()
    assert budget.admits(genome)
    assert budget.cost(genome) == below


@pytest.mark.parametrize("target", ["params=0.1", "params=1K", "params=2M"])
def test_a_target_out_of_reach_says_what_is_within(target: str) -> None:
    grid = level_grid(units(4, heads=4, channels=320), 10, 32)
    with pytest.raises(UsageError, match=r"expected parameters from (\S+) \(\d+\.\d% of the dense model") as refusal:
        at(grid, target)
    least = re.search(r"from (\S+)K \(", str(refusal.value))
    assert least is not None
    genome, budget = at(grid, f"params={float(least[1]) * 1.001:.3f}K")
    assert budget.fits(genome)
    with pytest.raises(UsageError):
        at(grid, f"params={float(least[1]) * 0.999:.3f}K")


def test_units_that_cost_nothing_stay_whole() -> None:
    """A smaller cache does not need a smaller MLP."""
    grid = level_grid(units(6, heads=8, channels=320), 8, 32)
    levels = {"attention": tuple(range(800, -1, -100)), "mlp": (0,) * 9}
    costs = Costs("bytes", tuple(levels[unit.kind] for unit in grid.units), 0)
    config = RunConfig("M", "D", "O", target="kv-cache=0.5", database=DatabaseConfig(levels=8))
    mutant, budget = uniform(grid, costs, config, 10**5)
    for seed in range(30):
        assert set(mutant.levels[1::2]) == {0}
        assert 0.99 * budget.main.limit <= budget.cost(mutant) <= budget.main.limit
        mutant = priced(mutant, budget, Random(seed), 3) or mutant


@pytest.mark.parametrize("measure", ["params", "flops", "kv-cache"])
def test_a_run_ends_within_a_per_cent_below_its_target(
    measure: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """No block has lost all of its attention after a whole search."""
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", target=f"{measure}=0.7", keep_attention=True)
    run = compress.run(replace(config, database=DatabaseConfig(levels=32, granularity=2)), until="search")
    checkpoint = Checkpoint(checkpoints["llama-gqa"])
    grid = level_grid(checkpoint.units, 32, 2)
    costs = {
        "params": parameter_costs(grid, parameter_count(checkpoint.skeleton())),
        "flops": flop_costs(grid, checkpoint.config, 32),
        "kv-cache": cache_costs(grid, checkpoint.config, 4),
    }[measure]
    limit = 0.7 * costs.of(grid.dense())
    assert costs.of(run.genome) <= limit
    assert all(level < grid.highest(i) for i, level in enumerate(run.genome.levels) if i % 2 == 0)
    if measure != "kv-cache":  # twelve heads in all
        assert costs.of(run.genome) >= 0.99 * limit


def test_a_search_starts_from_an_earlier_genome(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Gradual pruning: the first parent has lost what the earlier genome had, and at random units as much as is due."""
    earlier = Genome((1, 0, 0, 3, 0, 0))  # more of one MLP than the uniform genome of level 2 loses
    (tmp_path / "earlier.json").write_text(json.dumps(earlier.levels))
    search = replace(runs.SHORT.search, start=str(tmp_path / "earlier.json"), generations=0)
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", search=search)
    compress.run(config, until="search")
    (line,) = runs.history(tmp_path / "run")
    assert line["origin"] == "earlier"
    assert sum(line["genome"]) > sum(earlier.levels)
    assert all(a >= b for a, b in zip(line["genome"], earlier.levels, strict=True))


@pytest.mark.parametrize("level", [5.0, 7.0, 7.5])
def test_attention_that_must_stay_is_paid_for_elsewhere(level: float) -> None:
    """The size is that of the level, although no attention may be removed whole."""
    grid = level_grid(units(4, heads=1, channels=640), 8, 32)
    costs = parameter_costs(grid, 10**5)
    config = RunConfig("M", "D", "O", level, database=DatabaseConfig(levels=8))
    free, budget = uniform(grid, costs, config, 10**5)
    kept, same = uniform(grid, costs, replace(config, keep_attention=True), 10**5)
    assert same.main.limit == budget.main.limit == costs.of(free)
    assert same.main.floor == budget.main.floor == pytest.approx(0.99 * budget.main.limit)
    assert same.cost(kept) >= 0.98 * same.main.limit
    assert same.fits(kept)
    assert all(level < grid.highest(i) for i, level in enumerate(kept.levels) if grid.units[i].kind == "attention")


def test_the_dearest_of_random_genomes_is_taken_and_one_that_is_too_cheap_is_said() -> None:
    """As a uniform genome and the start of a later stage are."""
    grid = level_grid(units(4, heads=8, channels=320), 8, 32)
    config = RunConfig("M", "D", "O", database=DatabaseConfig(levels=8))
    _, budget = uniform(grid, parameter_costs(grid, 10**5), config, 10**5)
    drawn = list[Genome]()

    def draw(rng: Random) -> Genome:
        drawn.append(uniform_genome(grid, rng.choice((6.0, 6.5, 7.0)), 8, rng))
        return drawn[-1]

    with console.capture() as said:
        genome, lowered = fullest(draw, budget, 0)
    assert len({budget.cost(each) for each in drawn}) >= 3
    assert budget.cost(genome) == max(map(budget.cost, drawn)) == lowered.main.floor
    assert "the level grid is too coarse to come within 1%" in said.get()
    with console.capture() as said:
        assert fullest(lambda rng: restore(draw(rng), budget, rng), budget, 0)[1].main.floor == budget.main.floor
    assert not said.get()


def test_a_level_no_smaller_than_the_dense_model_is_refused() -> None:
    """A level is refused if it rounds to none, or if repeated K and V make the export no smaller."""
    plain = level_grid(units(2, heads=8, channels=320), 6, 32)
    grouped = Unit("a", 0, "attention", "", (), 2, 6, 10, 1, readers=3, shared_parameters=80)
    for grid, level in ((plain, 0.01), (level_grid((grouped, grouped), 6, 32), 1.0)):
        config = RunConfig("M", "D", "O", level, database=DatabaseConfig(levels=6))
        with pytest.raises(
            UsageError, match=rf"--target-level: expected parameters from .* \(dense\), found {level:g}, at"
        ):
            uniform(grid, parameter_costs(grid, 10**5), config, 10**5)


GROUPED = 70_000  # parameters of the model whose grid follows


def grouped(shared: int = 100) -> Grid:
    """The grid of a model with single heads of grouped queries, whose exports repeat K and V."""
    kinds = (
        Unit("", 0, "attention", "", (), 8, 32, 200, 10, readers=4, shared_parameters=shared),
        Unit("", 0, "mlp", "", (), 1, 320, 30, 10),
    )
    return level_grid(
        tuple(replace(unit, name=f"{b}-{unit.kind}", block=b) for b in range(4) for unit in kinds), 10, 32
    )


def within_kinds_at(grid: Grid, level: float) -> tuple[Genome, Budget]:
    search = SearchConfig(moves="within_kinds", start="uniform")
    config = RunConfig("M", "D", "O", level, database=DatabaseConfig(levels=10, structure="head"), search=search)
    return uniform(grid, parameter_costs(grid, GROUPED), config, GROUPED)


def switches(grid: Grid, genome: Genome, tops: tuple[int, ...]) -> list[Genome]:
    """Every genome that is one level switch away."""
    pairs = itertools.permutations(range(len(grid.units)), 2)
    return [
        genome.replace({i: genome.levels[i] + 1, j: genome.levels[j] - 1})
        for i, j in pairs
        if grid.units[i].kind == grid.units[j].kind and genome.levels[i] < tops[i] and genome.levels[j] > 0
    ]


@pytest.mark.parametrize("level", [1.5, 5.0, 8.5])
def test_levels_of_each_kind_are_the_budget_within_kinds(level: float) -> None:
    """As in section 3.5 of the paper. By the parameters of exports, part of these genomes would be too large."""
    grid = grouped()
    genome, budget = within_kinds_at(grid, level)
    assert genome == uniform_genome(grid, level, 10, Random(0))
    neighbours = switches(grid, genome, budget.ceilings)
    for _ in range(3):
        neighbours += switches(grid, Random(0).choice(neighbours), budget.ceilings)
    assert all(map(budget.admits, neighbours))
    exported = parameter_costs(grid, GROUPED)
    limit = exported.of(genome)
    assert level == 5.0 or not all(0.99 * limit <= exported.of(each) <= limit for each in neighbours)
    for each in (genome.replace({0: genome.levels[0] + 1}), genome.replace({1: genome.levels[1] - 1})):
        assert not budget.admits(each), "a sum of levels has changed"


def test_no_search_leaves_an_export_larger_than_the_dense_model() -> None:
    """With 31 of 32 heads over 8 KV heads, an attention is 1.55 times as large as the dense one."""
    unit = Unit("a", 0, "attention", "", (), 128, 32, 2 * 128, 0, readers=4, shared_parameters=2 * 128)
    costs = parameter_costs(level_grid((unit,), 32, 32), 100_000).units[0]
    assert costs[1] / costs[0] == pytest.approx(1.55)
    grid = grouped(shared=400)
    with pytest.raises(UsageError, match=r"--target-level: expected parameters from .* \(dense\), found 1, at which"):
        within_kinds_at(grid, 1.0)
    genome, budget = within_kinds_at(grid, 5.0)
    exported = parameter_costs(grid, GROUPED)
    outside = [each for each in switches(grid, genome, budget.ceilings) if exported.of(each) >= GROUPED]
    assert exported.of(genome) < GROUPED
    assert not any(map(budget.fits, outside))
    by_flops = replace(level_costs(grid, "mlp"), measure="FLOPs a token")  # which attention takes no part in
    config = RunConfig("M", "D", "O", target="flops=0.9", database=DatabaseConfig(levels=10, structure="head"))
    genome, budget = uniform(grid, by_flops, config, GROUPED)
    rng = Random(0)
    for _ in range(20):
        genome = priced(genome, budget, rng, 3) or genome
        assert exported.of(genome) < GROUPED


def test_a_given_genome_whose_export_is_larger_is_refused(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "genome.json").write_text("[1, 0, 1, 0, 0, 0]")
    database = replace(runs.SHORT.database, structure="head", levels=8)
    config = runs.short(checkpoints["mistral"], text, tmp_path / "run", database=database)
    with pytest.raises(UsageError, match=r"expected an export of less than the dense model's [\d,]+ parameters, found"):
        compress.run(replace(config, genome=str(tmp_path / "genome.json")))
    assert not (tmp_path / "run").exists()
    (tmp_path / "genome.json").write_text("[2, 6, 0, 0, 0, 0]")
    run = compress.run(replace(config, genome=str(tmp_path / "genome.json")), until="export")
    card = (run.exported / "README.md").read_text()
    sizes = re.search(r"Size.*?([\d,]+) parameters; ([\d,]+) as the paper counts", card)
    assert sizes is not None
    exported, counted = (int(number.replace(",", "")) for number in sizes.groups())
    assert counted < exported == parameter_count(load(run.exported))


def test_a_budget_of_several_measures_keeps_within_all() -> None:
    grid = level_grid(units(6, heads=8, channels=320), 8, 32)
    costs = [parameter_costs(grid, 10**5), level_costs(grid, "attention")]
    bounds = tuple(Bound(each, 0.7 * each.of(grid.dense())) for each in costs)
    budget, rng = Budget(grid, bounds, ceilings(grid)), Random(0)
    genome = restore(spread(grid.dense(), budget, rng), budget, rng)
    for _ in range(20):
        assert budget.fits(genome)
        assert not any(budget.fits(genome.replace({i: level - 1})) for i, level in enumerate(genome.levels) if level), (
            "nothing more can be given back"
        )
        genome = priced(genome, budget, rng, 3) or genome
    assert budget.text == "70K parameters and 33.6 levels of attentions"
