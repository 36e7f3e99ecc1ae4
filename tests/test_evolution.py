"""Algorithm 1 on a fitness whose optimum is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

from darwinlm.allocate.evolution import evolve
from darwinlm.allocate.uniform import uniform
from darwinlm.config import SearchConfig
from darwinlm.genome import level_grid
from darwinlm.types import Genome, SelectionStage
from test_genome import units

GRID = level_grid(units(6, heads=8, channels=320), 8, 32)
STAGES = (SelectionStage(4, 100), SelectionStage(2, 200, 50), SelectionStage(1, 400, 100))
CONFIG = SearchConfig(generations=25, offspring=8, stages=STAGES)


class KnownFitness:
    """Distance to a target genome; the first stage is blind, so that only later ones can tell candidates apart."""

    def __init__(self, target: Genome, noise: float = 0.0):
        self.target, self.noise = target, noise
        self.asked: list[tuple[Genome, SelectionStage]] = []

    def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
        self.asked.append((genome, stage))
        distance = sum((a - b) ** 2 for a, b in zip(genome.levels, self.target.levels, strict=True))
        return distance + self.noise * Random(f"{genome} {stage}").random()


def target() -> Genome:
    start, _ = uniform(GRID, 4.0, 8, 0)
    levels = list(start.levels)
    for up, down in ((0, 2), (2, 4), (1, 5), (3, 7), (1, 7), (9, 11)):
        levels[up] += 1
        levels[down] -= 1
    return Genome(tuple(levels))


def search(path: Path, config: SearchConfig = CONFIG, seed: int = 0, noise: float = 0.0):
    start, budget = uniform(GRID, 4.0, 8, 0)
    fitness = KnownFitness(target(), noise)
    return evolve([start], budget, fitness, config, seed, path / "state.json"), fitness, budget


def test_it_finds_the_optimum(tmp_path: Path) -> None:
    result, _, budget = search(tmp_path)
    assert result.best == target()
    assert result.fitness == 0
    assert budget.admits(result.best)


def test_the_best_is_never_lost(tmp_path: Path) -> None:
    result, _, _ = search(tmp_path, noise=3.0)
    scores = [generation.fitness for generation in result.history]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == CONFIG.generations + 1


def test_stages_narrow_the_field_and_the_parent_joins_the_last(tmp_path: Path) -> None:
    _, fitness, _ = search(tmp_path, replace(CONFIG, generations=1))
    start = fitness.asked[0][0]
    by_stage = [[genome for genome, stage in fitness.asked[1:] if stage == wanted] for wanted in STAGES]
    assert [len(asked) for asked in by_stage] == [8, 4, 2 + 1]
    assert start in by_stage[2]
    assert start not in by_stage[0] + by_stage[1]
    best_four = sorted(by_stage[0], key=lambda genome: fitness.score(genome, STAGES[0]))[:4]
    assert set(by_stage[1]) == set(best_four)


def test_an_interrupted_search_takes_the_same_path(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    result, _, _ = search(whole, noise=2.0)
    search(part, replace(CONFIG, generations=7), noise=2.0)
    resumed, fitness, _ = search(part, noise=2.0)
    assert [(g.fitness, g.genome) for g in resumed.history] == [(g.fitness, g.genome) for g in result.history]
    assert len(fitness.asked) == (CONFIG.generations - 7) * (8 + 4 + 3)
    states = [json.loads((path / "state.json").read_text()) for path in (whole, part)]
    assert states[0]["rng_state"] == states[1]["rng_state"]


def test_a_seed_decides_the_path(tmp_path: Path) -> None:
    short = replace(CONFIG, generations=3)
    same = [search(tmp_path / str(run), short)[0].best for run in range(2)]
    assert same[0] == same[1]
    assert search(tmp_path / "other", short, seed=1)[0].best != same[0]


def test_it_starts_from_the_best_start(tmp_path: Path) -> None:
    start, budget = uniform(GRID, 4.0, 8, 0)
    fitness = KnownFitness(target())
    result = evolve([start, target()], budget, fitness, replace(CONFIG, generations=1), 0, tmp_path / "state.json")
    assert result.history[0].genome == target()
    assert result.history[0].scored == 2


def test_offspring_are_distinct_even_where_few_exist(tmp_path: Path) -> None:
    grid = level_grid(units(2, heads=2, channels=64), 2, 32)
    start, budget = uniform(grid, 1.0, 2, 0)
    fitness = KnownFitness(start)
    evolve([start], budget, fitness, replace(CONFIG, generations=1, offspring=50), 0, tmp_path / "state.json")
    first = [genome for genome, stage in fitness.asked[1:] if stage == STAGES[0]]
    assert 0 < len(first) == len(set(first)) < 50


def test_a_candidate_that_diverged_is_never_chosen(tmp_path: Path) -> None:
    start, budget = uniform(GRID, 4.0, 8, 0)

    class Diverging(KnownFitness):
        def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
            return 1.0 if genome == start else float("inf")

    result = evolve([start], budget, Diverging(start), replace(CONFIG, generations=2), 0, tmp_path / "state.json")
    assert result.best == start
