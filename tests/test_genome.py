"""The level grid and the uniform genome."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwinlm.genome import level_grid, prunable_parameters
from darwinlm.search.uniform import uniform_genome
from darwinlm.types import Genome, Kind, Unit, UsageError


def unit(block: int, kind: Kind, structures: int, parameters: int = 10) -> Unit:
    return Unit(f"block-{block:02d}-{kind}", block, kind, "", (), 1, structures, parameters, 7)


def units(blocks: int, heads: int, channels: int) -> tuple[Unit, ...]:
    return tuple(u for b in range(blocks) for u in (unit(b, "attention", heads, 400), unit(b, "mlp", channels)))


shapes = st.tuples(st.integers(2, 12), st.integers(1, 12), st.integers(1, 40).map(lambda steps: 32 * steps))


def test_levels_are_those_of_the_published_implementation() -> None:
    grid = level_grid(units(1, heads=9, channels=1536), levels=9, granularity=32)
    assert grid.removed[0] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert grid.removed[1] == (0, 160, 352, 512, 672, 864, 1024, 1184, 1376, 1536)


@given(shapes, st.integers(1, 16))
def test_levels_lead_in_rising_steps_from_dense_to_nothing(shape: tuple[int, int, int], levels: int) -> None:
    grid = level_grid(units(*shape), levels, granularity=32)
    for u, removed in zip(grid.units, grid.removed, strict=True):
        assert removed[0] == 0
        assert removed[-1] == u.structures
        assert all(a < b for a, b in itertools.pairwise(removed))
        assert len(removed) <= levels + 1
        assert all(count % 32 == 0 for count in removed) or u.kind == "attention"


def test_granularity_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(UsageError, match=r"granularity must divide the 100 channels of block-00-mlp, found 32"):
        level_grid(units(1, 4, 100), 10, 32)


@given(shapes, st.sampled_from([2, 4, 8]), st.integers(1, 16))
def test_every_level_is_divisible(shape: tuple[int, int, int], divisor: int, levels: int) -> None:
    blocks, heads, channels = shape
    grid = level_grid(units(blocks, divisor * heads, channels), levels, 16, divisor)
    for u, removed in zip(grid.units, grid.removed, strict=True):
        assert all((u.structures - count) % divisor == 0 for count in removed)
        assert len(removed) >= 2
        assert removed[-1] == u.structures


def test_what_the_dense_model_is_not_divisible_by_is_refused() -> None:
    told = r"--database.divisible-by: expected a divisor of the 9 KV heads of block-00-attention, found 8"
    with pytest.raises(UsageError, match=told):
        level_grid(units(1, 9, 1536), 10, 32, 8)


@given(shapes, st.floats(0.05, 0.95), st.integers(0, 1000))
def test_uniform_keeps_every_unit_next_to_the_target(shape: tuple[int, int, int], share: float, seed: int) -> None:
    grid = level_grid(units(*shape), 10, 32)
    genome = uniform_genome(grid, share * 10, 10, Random(seed))
    other = uniform_genome(grid, share * 10, 10, Random(seed + 1))
    grid.check(genome)
    for kind in ("attention", "mlp"):
        members = [i for i, u in enumerate(grid.units) if u.kind == kind]
        assert all(abs(genome.levels[i] - share * grid.highest(i)) < 1 for i in members)
        assert sum(genome.levels[i] for i in members) == sum(other.levels[i] for i in members)


@pytest.mark.parametrize("target", [-1.0, 0.0, 10.0, 11.5])
def test_target_level_out_of_range_is_refused(target: float) -> None:
    with pytest.raises(UsageError, match="more than 0 and less than 10"):
        uniform_genome(level_grid(units(2, 4, 64), 10, 32), target, 10, Random(0))


def test_a_target_between_two_levels_mixes_both_at_random() -> None:
    grid = level_grid(units(8, heads=4, channels=320), 10, 32)
    genomes = {uniform_genome(grid, 2.5, 10, Random(seed)) for seed in range(20)}
    assert len(genomes) > 1
    for genome in genomes:
        assert sorted(genome.levels[1::2]) == [2] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("levels", "message"), [((0, 0), "another model: it has 2 levels"), ((0, 0, 0, 11), "levels 0 to 10 .* for 11")]
)
def test_a_genome_for_another_model_is_refused(levels: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        level_grid(units(2, 10, 320), 10, 32).check(Genome(levels))


def test_parameters_of_a_unit_that_is_gone_include_what_its_structures_share() -> None:
    grid = level_grid((unit(0, "attention", 4, 100),), 4, 32)
    assert [prunable_parameters(grid, Genome((level,))) for level in range(5)] == [407, 307, 207, 107, 0]
