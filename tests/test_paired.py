"""Differences between models on the same questions: their intervals, and what the reports make of them."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean, stdev

import pytest

from darwinlm.evaluation.paired import LEAST, difference, mean_difference
from darwinlm.evaluation.tasks import LIKELIHOOD, Score
from darwinlm.report import beside_dense
from darwinlm.report.comparison import Cell, markdown, read_cells, write_cells


def figures(count: int, seed: int, shift: float = 0.0, noise: float = 1.0) -> list[float]:
    random = Random(seed)
    return [random.gauss(-3.0, 2.0) + shift + noise * Random(seed + 1 + n).gauss(0, 1) for n in range(count)]


def test_the_interval_is_that_of_the_paired_mean() -> None:
    """Against the normal approximation, which the bootstrap of many questions must come to."""
    dense, own = figures(400, 0), figures(400, 0, shift=-0.2, noise=0.0)
    found = difference(own, dense)
    assert found is not None
    gaps = [a - b for a, b in zip(own, dense, strict=True)]
    half = NormalDist().inv_cdf(0.975) * stdev(gaps) / math.sqrt(len(gaps))
    assert found.value == pytest.approx(fmean(gaps))
    assert (found.low, found.high) == (
        pytest.approx(fmean(gaps) - half, abs=0.02),
        pytest.approx(fmean(gaps) + half, abs=0.02),
    )
    assert found.real
    assert difference(own, dense) == found, "seeded"


def test_intervals_of_equal_models_exclude_zero_one_time_in_twenty() -> None:
    gaps = [figures(60, 1000 * n, noise=0.0) for n in range(200)]
    found = [difference([gap + 3 for gap in of], [0.0] * 60) for of in gaps]
    excluded = sum(each is not None and each.real for each in found)
    assert 3 <= excluded <= 22  # 10 are expected


def test_what_cannot_be_told_has_no_interval() -> None:
    few = [0.0] * (LEAST - 1)
    assert difference(few, few) is None
    assert difference([0.0] * 20, [0.0] * 21) is None
    assert difference(None, [0.0] * 20) is None
    assert mean_difference([]) is None
    same = difference([1.0] * 20, [1.0] * 20)
    assert same is not None
    assert not same.real
    assert same.text(share=True) == "+0.0 (+0.0 to +0.0)"
    all_lost = difference([0.0] * 20, [1.0] * 20)
    assert all_lost is not None
    assert all_lost.text(share=True) == "-100.0 (-100.0 to -100.0) *"


def test_the_mean_of_tasks_weighs_them_alike_however_many_questions_they_have() -> None:
    small = ([1.0] * 10, [0.0] * 10)
    large = ([0.0] * 90, [0.0] * 90)
    found = mean_difference([small, large])
    assert found is not None
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def cells() -> list[Cell]:
    """The dense model, two methods that questions cannot tell apart, and one that they can."""

    def scores(shift: float, seed: int) -> tuple[Score, ...]:
        own = tuple(value + shift + (0.3 if n >> seed & 1 else -0.3) for n, value in enumerate(figures(48, 7)))
        right = tuple(float(value > -3) for value in own)
        return (
            Score("arc_easy", "acc", 0, fmean(right), 0.07, 48, "a file", right),
            Score("arc_easy", LIKELIHOOD, 0, fmean(own), 0.3, 48, "a file", own),
        )

    shifts = {"evolution": -0.5, "ziplm": -0.501, "uniform": -1.5}
    pruned = [Cell(name, 0.8, scores=scores(shift, seed)) for seed, (name, shift) in enumerate(shifts.items(), 1)]
    return [Cell("dense", 1.0, scores=scores(0.0, 0)), *pruned, Cell("shortgpt", 0.8, refused="too small")]


def test_reports_tell_differences_and_who_leads(tmp_path: Path) -> None:
    write_cells(tmp_path, cells())
    kept = read_cells(tmp_path)
    assert repr(kept) == repr(cells()), "questions survive the file"
    titles, rows = beside_dense.cells_of(kept)
    assert titles == ["kept", "method", "arc_easy acc", f"arc_easy {LIKELIHOOD}", beside_dense.MEAN]
    assert [row[1] for row in rows] == ["dense", "evolution", "ziplm", "uniform"]
    for row, cell in zip(rows[1:], kept[1:], strict=False):
        expected = difference(cell.scores[1].by_question, kept[0].scores[1].by_question)
        assert expected is not None
        assert row[3] == row[4] == expected.text(share=False)
        assert row[3].endswith(" *")
    (led,) = beside_dense.leaders(kept)
    assert led == "params=0.8: evolution has the likeliest correct answers; not told from it: ziplm"
    told = markdown(kept, [], "p.png", beside_dense.markdown(kept))
    assert f"- {led}" in told
    assert "| 0.8" not in told.partition(beside_dense.TITLE)[0].partition("\n")[0]
    assert f"arc_easy {LIKELIHOOD}" not in told.partition(beside_dense.TITLE)[0], "it has a table of its own"
    assert beside_dense.markdown([Cell("dense", 1.0), Cell("uniform", 0.8)]) == []
