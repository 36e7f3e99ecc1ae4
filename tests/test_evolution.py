"""Algorithm 1 on a fitness whose optimum is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

import pytest

from darwinlm.config.run import DatabaseConfig, RunConfig, SearchConfig
from darwinlm.genome import Grid, level_grid
from darwinlm.runtime.files import read_lines
from darwinlm.runtime.progress import console
from darwinlm.search.costs import parameter_costs
from darwinlm.search.evolution import evolve
from darwinlm.search.mutation import priced
from darwinlm.search.uniform import uniform
from darwinlm.types import DarwinError, Generation, Genome, SelectionStage
from test_genome import units

GRID = level_grid(units(6, heads=8, channels=320), 8, 32)
STAGES = (SelectionStage(4, 100), SelectionStage(2, 200, 50), SelectionStage(1, 400, 100))
CONFIG = SearchConfig(generations=25, offspring=8, stages=STAGES, moves="within_kinds")


def at_level(grid: Grid, level: float, levels: int = 8):
    """Return the uniform genome of a level, and the budget that it sets."""
    config = RunConfig("M", "D", "O", level, database=DatabaseConfig(levels=levels))
    return uniform(grid, parameter_costs(grid, 10**5), config, 10**5)


class KnownFitness:
    """Distance to a target genome, with noise of each stage if asked."""

    def __init__(self, target: Genome, noise: float = 0.0):
        self.target, self.noise = target, noise
        self.asked: list[tuple[Genome, SelectionStage]] = []
        self.parents: list[Genome | None] = []

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        self.parents.append(parent)
        return [self.score(genome, stage) for genome in genomes]

    def score(self, genome: Genome, stage: SelectionStage) -> float:
        self.asked.append((genome, stage))
        distance = sum((a - b) ** 2 for a, b in zip(genome.levels, self.target.levels, strict=True))
        return distance + self.noise * Random(f"{genome} {stage}").random()


def target() -> Genome:
    start, _ = at_level(GRID, 4.0)
    levels = list(start.levels)
    for up, down in ((0, 2), (2, 4), (1, 5), (3, 7), (1, 7), (9, 11)):
        levels[up] += 1
        levels[down] -= 1
    return Genome(tuple(levels))


def search(path: Path, config: SearchConfig = CONFIG, seed: int = 0, noise: float = 0.0):
    start, budget = at_level(GRID, 4.0)
    fitness = KnownFitness(target(), noise)
    return evolve({"uniform": start}, budget, fitness, config, seed, path / "history.jsonl"), fitness, budget


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


def test_what_may_not_win_is_passed_over_and_the_rest_is_searched_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, budget = at_level(GRID, 4.0)
    assert target().levels[0] > start.levels[0]
    asked: list[tuple[Genome, Genome | None]] = []

    def may_win(genome: Genome, parent: Genome | None) -> bool:
        asked.append((genome, parent))
        return genome.levels[0] <= start.levels[0]

    given = {"uniform": start}, budget, KnownFitness(target()), CONFIG, 0, tmp_path / "h", 1
    history = evolve(*given, may_win).history
    assert all(line.genome.levels[0] <= start.levels[0] for line in history)
    assert history[-1].fitness == 2, "the target but for that level, and one that makes up for it"
    assert "better candidates are passed over" in capsys.readouterr().err
    assert asked[0] == (start, None)
    parents = {before.genome for before in history}
    assert {parent for _, parent in asked[1:]} <= parents
    assert not any(genome == parent for genome, parent in asked), "a parent keeps its place unasked"
    never = evolve(*given[:-2], tmp_path / "never", 1, lambda *_: False)
    assert {line.genome for line in never.history} == {start}


def test_stages_narrow_the_field(tmp_path: Path) -> None:
    result, fitness, _ = search(tmp_path, replace(CONFIG, generations=1))
    start, _ = at_level(GRID, 4.0)
    assert fitness.parents == [None, start, start, start], "whose passes are reused"
    by_stage = [[genome for genome, stage in fitness.asked[1:] if stage == each] for each in STAGES]
    assert [len(asked) for asked in by_stage] == [8, 4, 2]
    for before, after, stage in zip(by_stage, by_stage[1:], STAGES, strict=False):
        best = sorted(before, key=lambda genome: fitness.score(genome, stage))[: len(after)]
        assert set(after) == set(best)
    for asked, stage, lowest in zip(by_stage, STAGES, result.history[1].stage_fitness, strict=True):
        assert lowest == min(fitness.score(genome, stage) for genome in [*asked, *[start] * (stage is STAGES[-1])])


def test_no_mutant_differs_by_more_switches_than_allowed(tmp_path: Path) -> None:
    start, _ = at_level(GRID, 4.0)
    for most, counts in ((1, {1}), (3, {1, 2, 3})):
        config = replace(CONFIG, generations=1, offspring=60, max_switches=most)
        _, fitness, _ = search(tmp_path / str(most), config)
        mutants = [genome for genome, stage in fitness.asked[1:] if stage == STAGES[0]]
        switches = {sum(max(0, a - b) for a, b in zip(m.levels, start.levels, strict=True)) for m in mutants}
        assert switches == counts


def test_the_parent_joins_the_last_stage(tmp_path: Path) -> None:
    """The parent stays if no offspring is better, with its old fitness, and is not scored again."""
    start, budget = at_level(GRID, 4.0)
    fitness = KnownFitness(start)
    history = evolve({"uniform": start}, budget, fitness, replace(CONFIG, generations=2), 0, tmp_path / "h").history
    assert [(line.genome, line.fitness, line.origin) for line in history] == [
        (start, 0.0, "uniform"), (start, 0.0, "parent"), (start, 0.0, "parent"),
    ]  # fmt: skip
    assert [genome for genome, _ in fitness.asked].count(start) == 1


def test_history_is_a_line_a_generation(tmp_path: Path) -> None:
    result, _, budget = search(tmp_path, noise=2.0)
    _, lines = read_lines(tmp_path / "history.jsonl")
    assert [line["generation"] for line in lines] == list(range(CONFIG.generations + 1))
    assert lines[-1]["genome"] == list(result.best.levels)
    assert {line["origin"] for line in lines} == {"uniform", "parent", "within_kinds mutation"}
    for line in lines[1:]:
        assert len(line["stage_fitness"]) == 3
        assert line["stage_fitness"][-1] == line["fitness"]
        # Stage 1 does not train. Those of stage 2 train 50 tokens, those of stage 3 50 more.
        assert line["training_tokens"] == 4 * 50 + 2 * 50
        assert line["fitness_tokens"] == 8 * 100 + 4 * 200 + 2 * 400
        assert line["seconds"] > 0
    assert (lines[0]["fitness_tokens"], lines[0]["training_tokens"]) == (400, 100)
    assert budget.admits(result.best)


def test_an_untrained_candidate_is_scored_only_on_what_a_stage_adds(tmp_path: Path) -> None:
    stages = tuple(replace(stage, training_tokens=0) for stage in STAGES)
    result, _, _ = search(tmp_path, replace(CONFIG, generations=1, stages=stages))
    assert [line.fitness_tokens for line in result.history] == [400, 8 * 100 + 4 * 100 + 2 * 200]
    assert [line.training_tokens for line in result.history] == [0, 0]


def test_an_interrupted_search_takes_the_same_path(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    result, _, _ = search(whole, noise=2.0)
    search(part, replace(CONFIG, generations=7), noise=2.0)
    resumed, fitness, _ = search(part, noise=2.0)
    assert [(g.fitness, g.genome) for g in resumed.history] == [(g.fitness, g.genome) for g in result.history]
    assert len(fitness.asked) == (CONFIG.generations - 7) * (8 + 4 + 2)


def test_a_seed_decides_the_path(tmp_path: Path) -> None:
    short = replace(CONFIG, generations=3)
    same = [search(tmp_path / str(run), short)[0].best for run in range(2)]
    assert same[0] == same[1]
    assert search(tmp_path / "other", short, seed=1)[0].best != same[0]


def test_it_starts_from_the_best_start(tmp_path: Path) -> None:
    start, budget = at_level(GRID, 4.0)
    fitness = KnownFitness(target())
    result = evolve(
        {"uniform": start, "better": target()},
        budget,
        fitness,
        replace(CONFIG, generations=1),
        0,
        tmp_path / "history.jsonl",
    )
    assert result.history[0].genome == target()
    assert result.history[0].scored == 2
    starts = {"uniform": start, "better": target()}
    assert result.history[0].starts == {name: KnownFitness(target()).score(g, STAGES[-1]) for name, g in starts.items()}
    assert fitness.asked[:2] == [(start, STAGES[-1]), (target(), STAGES[-1])], (
        "by the last stage, as its rivals will be"
    )


def test_the_parent_wins_a_tie(tmp_path: Path) -> None:
    start, budget = at_level(GRID, 4.0)

    class Level(KnownFitness):
        def score(self, genome: Genome, stage: SelectionStage) -> float:
            return 1.0

    assert evolve({"uniform": start}, budget, Level(start), CONFIG, 0, tmp_path / "h").best == start


def test_the_history_is_kept_after_every_generation(tmp_path: Path) -> None:
    start, budget = at_level(GRID, 4.0)

    class Watching(KnownFitness):
        def score(self, genome: Genome, stage: SelectionStage) -> float:
            kept.add(len(read_lines(tmp_path / "h")[1]) if (tmp_path / "h").exists() else 0)
            return super().score(genome, stage)

    kept: set[int] = set()
    evolve({"uniform": start}, budget, Watching(target()), replace(CONFIG, generations=4), 0, tmp_path / "h")
    assert kept == {0, 1, 2, 3, 4}, "lines that a kill in generations 1 to 4 leaves"


def test_a_stage_in_which_all_diverge_is_null_in_the_history(tmp_path: Path) -> None:
    start, budget = at_level(GRID, 4.0)

    class Diverging(KnownFitness):
        def score(self, genome: Genome, stage: SelectionStage) -> float:
            return 1.0 if genome == start else float("inf")

    def read() -> list[Generation]:
        result = evolve({"uniform": start}, budget, Diverging(start), replace(CONFIG, generations=2), 0, tmp_path / "h")
        return list(result.history)

    history = read()
    assert history[1].stage_fitness == (float("inf"), float("inf"), 1.0)
    lines = (tmp_path / "h").read_text()
    assert "Infinity" not in lines
    assert "[null, null, 1.0]" in lines
    assert read() == history
    (tmp_path / "h").write_text(lines.replace('"seconds"', '"time"'))
    with pytest.raises(DarwinError, match="is damaged"):
        read()


def test_offspring_are_distinct_even_where_few_exist(tmp_path: Path) -> None:
    grid = level_grid(units(2, heads=2, channels=64), 2, 32)
    start, budget = at_level(grid, 1.0, 2)
    fitness = KnownFitness(start)
    with console.capture() as said:
        config = replace(CONFIG, generations=2, offspring=50)
        evolve({"uniform": start}, budget, fitness, config, 0, tmp_path / "history.jsonl")
    assert said.get().count("distinct mutants") == 1
    asked = [genome for genome, stage in fitness.asked[1:] if stage == STAGES[0]]
    first = asked[: len(asked) // 2]  # of two generations
    assert 0 < len(first) == len(set(first)) < 50
    assert f"generation 1 has {len(first)} distinct mutants, not 50: no more were found" in said.get()


def test_a_candidate_that_diverged_is_never_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, budget = at_level(GRID, 4.0)

    class Diverging(KnownFitness):
        def score(self, genome: Genome, stage: SelectionStage) -> float:
            return 1.0 if genome == start else float("inf")

    with console.capture() as said:
        starts = {"uniform": start}
        result = evolve(starts, budget, Diverging(start), replace(CONFIG, generations=1), 0, tmp_path / "h")
    assert result.best == start
    assert "generation 1: 8 of 8 candidates diverged and are out\n" in said.get()
    assert said.get().count("diverged") == 1


def test_what_diverged_takes_no_place_of_a_survivor(tmp_path: Path) -> None:
    """In a first stage with four survivors, two of eight are finite, of which one diverges in the second stage."""
    start, budget = at_level(GRID, 4.0)

    class Diverging(KnownFitness):
        def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
            scores = super().scores(genomes, stage, parent)
            last = STAGES[-1] if parent is None else stage
            finite = {STAGES[0]: 2, STAGES[1]: 1, STAGES[2]: 9}[last]
            return [score if index < finite else float("inf") for index, score in enumerate(scores)]

    fitness = Diverging(start)
    with console.capture() as said:
        evolve({"uniform": start}, budget, fitness, replace(CONFIG, generations=1), 0, tmp_path / "h")
    assert [sum(stage == each for _, stage in fitness.asked[1:]) for each in STAGES] == [8, 2, 1]
    assert "generation 1: 7 of 8 candidates diverged and are out\n" in said.get()


def test_a_search_whose_starts_diverge_ends_with_one_sentence(tmp_path: Path) -> None:
    start, budget = at_level(GRID, 4.0)

    class Diverging(KnownFitness):
        def score(self, genome: Genome, stage: SelectionStage) -> float:
            return float("inf")

    with pytest.raises(DarwinError, match="every start of the search diverges: expected a finite fitness"):
        evolve({"uniform": start}, budget, Diverging(start), CONFIG, 0, tmp_path / "h")
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("moves", ["priced", "within_kinds"])
def test_where_no_mutant_exists_the_search_ends_with_its_start(
    moves: Literal["priced", "within_kinds"], tmp_path: Path
) -> None:
    grid = level_grid(units(1, heads=1, channels=32), 1, 32)
    start, budget = at_level(grid, 0.9, 1)
    with console.capture() as said:
        config = replace(CONFIG, moves=moves)
        result = evolve({"uniform": start}, budget, KnownFitness(start), config, 0, tmp_path / "h")
    assert (result.best, len(result.history)) == (start, 1)
    assert said.get().count("\n") == 1
    assert "ends after 0 generations" in said.get()
    assert len(read_lines(tmp_path / "h")[1]) == 1


def test_priced_moves_find_what_level_switches_cannot(tmp_path: Path) -> None:
    """The optimum has levels of attention that were traded for MLP levels."""
    start, budget = at_level(GRID, 4.0)
    rng = Random(3)
    target = start
    for _ in range(40):
        target = priced(target, budget, rng, 3) or target
    assert sum(target.levels[::2]) != sum(start.levels[::2])
    reached = {}
    for moves in ("priced", "within_kinds"):
        config = replace(CONFIG, moves=moves, generations=60)
        reached[moves] = evolve({"uniform": start}, budget, KnownFitness(target), config, 0, tmp_path / moves).fitness
    assert reached["priced"] < reached["within_kinds"]
