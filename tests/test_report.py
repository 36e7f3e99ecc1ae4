"""The report of a run: the content of its files, and what its pictures show."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.patches import Rectangle, StepPatch

from darwinlm.evaluation.rows import Row
from darwinlm.genome import Grid, level_grid
from darwinlm.report.figures import levels_figure, search_figure
from darwinlm.report.run_report import print_table, write_report
from darwinlm.runtime.stages import StageUse
from darwinlm.runtime.timing import Ratio
from darwinlm.types import Generation, Genome, Unit

SAME = Ratio(1.0, 1.0, 1.0)
ROWS = (
    Row("dense", 200_000_000, 10.0, 0.0, 1000.0, 40.0, SAME, SAME, 400_000_000,
        ("Water boils at 100 C", "Rome was\n\nbig")),
    Row("uniform", 150_000_000, 31.5, 1.25, 1500.0, 50.0, Ratio(1.5, 1.5, 1.5), Ratio(1.25, 1.25, 1.25), 300_000_000,
        ("Water boils at at", "Rome was ```[b]was")),
    Row("searched", 150_000_000, 14.25, 0.375, 1120.0, 44.0, Ratio(1.12, 1.05, 1.2), Ratio(1.1, 0.8, 1.3), 300_000_000,
        ("Water boils at 90 C", "Rome was | old")),
)  # fmt: skip

STAGES = {"database": StageUse(120.25, 3 * 10**9, 0), "search": StageUse(1800.0, 2 * 10**9, 5 * 10**9)}


@pytest.fixture
def grid() -> Grid:
    units = tuple(
        Unit(f"block-{block:02d}-{kind}", block, kind, "consumer", (), 1, 4, 10, 0)
        for block in range(3)
        for kind in ("attention", "mlp")
    )
    return level_grid(units, levels=4, granularity=1)


@pytest.fixture
def genomes() -> dict[str, Genome]:
    return {"uniform": Genome((2, 2, 2, 2, 2, 2)), "searched": Genome((1, 3, 4, 2, 0, 1))}


@pytest.fixture
def history(genomes: dict[str, Genome]) -> list[Generation]:
    return [
        Generation(0, 1.5, genomes["uniform"], 1, 0.0),
        Generation(1, 1.5, genomes["uniform"], 16, 60.0),
        Generation(2, 0.75, genomes["searched"], 16, 90.0),
    ]


def write(out: Path, grid: Grid, genomes: dict[str, Genome], history: list[Generation]) -> list[Path]:
    settings = {"data": "vital-wiki|c4", "seed": "0"}
    return write_report(out, "A tiny model", ROWS, grid, genomes, history, settings, "KL", {}, {}, STAGES)


def test_files_are_written_whole(tmp_path: Path, grid: Grid, genomes: dict[str, Genome], history: list[Generation]):
    out = tmp_path / "run"
    written = write(out, grid, genomes, history)
    assert {path.name for path in written} == {"report.md", "table.json", "levels.png", "search.png"}
    assert set(out.iterdir()) == set(written)  # nothing temporary stays behind
    for name in ("levels.png", "search.png"):
        picture = imread(out / name)
        assert picture.shape[1] == 1400
        assert picture.min() < picture.max()


def test_table_has_exactly_the_promised_keys(
    tmp_path: Path, grid: Grid, genomes: dict[str, Genome], history: list[Generation]
):
    write(tmp_path, grid, genomes, history)
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert len(table) == len(ROWS)
    speeds = ["prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio"]
    keys = ["model", "parameters", "perplexity", "kl", *speeds, "bytes", "texts"]
    for record, row in zip(table, ROWS, strict=True):
        assert list(record) == keys
        assert record == json.loads(json.dumps({key: getattr(row, key) for key in keys}))


def test_markdown_says_all(tmp_path: Path, grid: Grid, genomes: dict[str, Genome], history: list[Generation]):
    write(tmp_path, grid, genomes, history)
    text = (tmp_path / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# A tiny model"
    assert "| data | vital-wiki\\|c4 |" in lines
    assert "| dense | 200.0 M (100 %) | 10.00 | 0.0000 | 1,000 (1.00x) | 40.0 (1.00x) | 400.0 MB |" in lines
    assert "| uniform | 150.0 M (75 %) | 31.50 | 1.2500 | 1,500 (1.50x) | 50.0 (1.25x) | 300.0 MB |" in lines
    speeds = "1,120 (1.12x, 1.05-1.20) | 44.0 (1.10x?, 0.80-1.30)"
    assert f"| searched | 150.0 M (75 %) | 14.25 | 0.3750 | {speeds} | 300.0 MB |" in lines
    assert "(levels.png)" in text
    assert "(search.png)" in text
    assert "dense     Rome was big" in lines
    assert "searched  Water boils at 90 C" in lines
    assert 'AutoModelForCausalLM.from_pretrained("model"' in text
    assert text.count("```") == 2 * (2 + 1)  # two prompts and the code: no continuation opens or ends a block


def test_pictures_without_content_are_left_out(tmp_path: Path, grid: Grid, genomes: dict[str, Genome]):
    written = write(tmp_path, grid, genomes, [])
    assert "search.png" not in {path.name for path in written}
    assert "search.png" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "search.png").exists()


def test_pictures_are_deterministic_and_leave_pyplot_alone(
    tmp_path: Path, grid: Grid, genomes: dict[str, Genome], history: list[Generation], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    write(tmp_path / "a", grid, genomes, history)
    write(tmp_path / "b", grid, genomes, history)
    for name in ("levels.png", "search.png", "report.md", "table.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    write(tmp_path / "c", grid, {"searched": genomes["searched"]}, history[:1])
    for name in ("levels.png", "search.png"):
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def bars(axis: Axes) -> list[float]:
    return [patch.get_height() for patch in axis.patches if isinstance(patch, Rectangle)]


def test_levels_picture_shows_what_is_left(grid: Grid, genomes: dict[str, Genome]):
    figure = levels_figure(grid, genomes)
    attention, mlp = figure.axes
    assert bars(attention) == [75.0, 0.0, 100.0]
    assert bars(mlp) == [25.0, 50.0, 75.0]
    for axis in (attention, mlp):
        (line,) = (patch for patch in axis.patches if isinstance(patch, StepPatch))
        assert np.array_equal(line.get_data().values, [50.0, 50.0, 50.0])
        assert np.array_equal(line.get_data().edges, [-0.5, 0.5, 1.5, 2.5])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["uniform (50.0 % left overall)", "searched (54.2 % left overall)", "removed"]


def with_starts(history: list[Generation], uniform: float) -> list[Generation]:
    return [replace(history[0], starts={"uniform": uniform}), *history[1:]]


def heights(axis: Axes) -> dict[str, float]:
    """The level lines that are seen within an axis's limits, by their label."""
    low, high = axis.get_ylim()
    lines = {str(line.get_label()): float(np.asarray(line.get_ydata())[0]) for line in axis.lines}
    return {label: y for label, y in lines.items() if label.startswith("uniform") and low <= y <= high}


def test_search_picture_shows_the_curve_of_every_text(history: list[Generation]):
    curves = {"articles, held out": ((0, 2.0), (2, 1.25)), "texts/other.txt": ((0, 3.0), (2, 3.5))}
    uniform = {"articles, held out": 2.5, "texts/other.txt": 3.25}
    figure = search_figure(with_starts(history, 1.5), "KL", curves, uniform)
    (axis,) = figure.axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axis.lines}
    assert drawn["KL, the search's tokens"] == [[0, 1.5], [1, 1.5], [2, 0.75]]
    assert drawn["KL, articles, held out"] == [[0, 2], [2, 1.25]]
    assert drawn["KL, other.txt"] == [[0, 3], [2, 3.5]]
    assert heights(axis) == {
        "uniform: KL, the search's tokens": 1.5,
        "uniform: KL, articles, held out": 2.5,
        "uniform: KL, other.txt": 3.25,
    }
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(drawn)
    low, high = axis.get_ylim()
    assert (3.5 - 0.75) / (high - low) > 0.75, "the curves fill the axis"


def test_search_picture_keeps_its_axis_where_the_uniform_genome_is_far_above(history: list[Generation]):
    upper, lower = search_figure(with_starts(history, 30.0), "KL", {}, {}).axes
    assert heights(lower) == {}
    assert heights(upper) == {"uniform: KL, the search's tokens": 30.0}
    low, high = lower.get_ylim()
    assert low < 0.75 < 1.5 < high < 2


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_search_picture_tells_figures_of_any_size_apart(history: list[Generation], scale: float):
    small = [replace(line, fitness=scale * line.fitness) for line in history]
    figure = search_figure(with_starts(small, 1.6 * scale), "KL", {}, {})
    figure.canvas.draw()
    (axis,) = figure.axes
    ticks = [label.get_text() for label in axis.get_yticklabels()]
    assert len(set(ticks)) == len(ticks) > 2
    assert [float(tick) for tick in ticks] == pytest.approx(list(axis.get_yticks()), rel=1e-3, abs=1e-9 * scale)
    assert axis.yaxis.get_offset_text().get_text() == ""
    assert {text.get_text() for text in axis.texts} == {f"{scale * 1.5:.3g}", f"{scale * 0.75:.3g}"}


def test_search_picture_shows_the_parent_and_the_time(history: list[Generation]):
    figure = search_figure(history, "log-perplexity", {}, {})
    (axis,) = figure.axes
    assert figure.get_supylabel() == "log-perplexity (nats a token)"
    (line,) = axis.lines
    assert np.array_equal(line.get_xydata(), [[0, 1.5], [1, 1.5], [2, 0.75]])
    (dots,) = axis.collections
    assert np.asarray(dots.get_offsets()).tolist() == [[0, 1.5], [2, 0.75]]
    (top,) = axis.child_axes
    assert top.get_xlabel() == "time searched (minutes)"
    assert [top.xaxis.get_major_formatter()(number, None) for number in (0, 1, 2, 3)] == ["0", "1", "2.5", ""]


def test_levels_picture_says_why_uniform_is_not_level(grid: Grid, genomes: dict[str, Genome]):
    """Only where it is not."""
    assert "between two levels" not in levels_figure(grid, genomes).axes[-1].get_xlabel()
    uneven = {"uniform": Genome((2, 2, 3, 2, 2, 2)), "searched": genomes["searched"]}
    assert "between two levels" in levels_figure(grid, uneven).axes[-1].get_xlabel()


def test_printed_table_fits_and_keeps_its_texts(capsys: pytest.CaptureFixture[str]):
    rows = [replace(row, model=f"SmolLM2 {row.model}") for row in ROWS]
    print_table([*rows, replace(rows[0], continuations=("word " * 50, "word " * 50))])
    printed = capsys.readouterr().out
    lines = [line.rstrip() for line in printed.splitlines()]
    assert 90 < max(map(len, lines)) <= 100
    assert printed.count("word") == 100
    assert next(line for line in lines if "SmolLM2 searched" in line).split() == [
        *("SmolLM2", "searched", "150.0", "M", "(75", "%)", "14.25", "0.3750"),
        *("1,120", "(1.12x)", "44.0", "(1.10x?)", "300.0", "MB"),
    ]
    assert "? other work kept this machine busy while speeds were measured: report.md has their range" in lines
    assert "SmolLM2 uniform   Rome was ```[b]was" in lines
    assert "SmolLM2 dense     Rome was big" in lines


def test_the_report_has_time_and_memory_of_every_stage(
    tmp_path: Path, grid: Grid, genomes: dict[str, Genome], history: list[Generation]
):
    write(tmp_path, grid, genomes, history)
    text = (tmp_path / "report.md").read_text()
    assert "| database | 120.2 | 3.00 GB | 0.0 MB |" in text
    assert "| search | 1,800.0 | 2.00 GB | 5.00 GB |" in text
    assert "| all | 1,920.2 | 3.00 GB | 5.00 GB |" in text
    assert json.loads((tmp_path / "table.json").read_text())["stages"]["search"]["device"] == 5 * 10**9
