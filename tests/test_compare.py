"""`darwinlm compare`: what its cells hold is what the models have, and a resumed one measures only what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs
from darwinlm.allocate.methods import ALLOCATORS
from darwinlm.artifact import read_json_lines
from darwinlm.checkpoint import Checkpoint
from darwinlm.compare import CELLS, PICTURE, TABLE, compare
from darwinlm.comparison import DENSE, Cell, figure
from darwinlm.config import DatabaseConfig, SearchConfig
from darwinlm.data import read_corpus
from darwinlm.database import MANIFEST, Database
from darwinlm.evaluate import parameter_count, perplexity_and_kl
from darwinlm.evaluation_config import METHODS, CompareConfig
from darwinlm.genome import Grid, level_grid
from darwinlm.modeling import load
from darwinlm.surgery import Stitcher, repeat_shared
from darwinlm.types import Genome, SelectionStage, UsageError

TARGETS = (0.2, 0.9)


@pytest.fixture(scope="module")
def config(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    """All methods, at a size and at one that no removal of whole blocks reaches, judged on two texts."""
    other = tmp_path_factory.mktemp("other") / "code.txt"
    other.write_text(Path(__file__).read_text())
    return CompareConfig(
        str(checkpoints["mistral"]),
        str(text),
        str(tmp_path_factory.mktemp("compare") / "out"),
        METHODS,
        TARGETS,
        calibration=runs.SHORT.calibration,
        database=DatabaseConfig(levels=8, granularity=4),
        search=SearchConfig(
            generations=2, offspring=3, stages=(SelectionStage(2, 64), SelectionStage(1, 128, 64)), learning_rate=1e-3
        ),
        evaluation=replace(runs.SHORT.evaluation, texts=(str(other),)),
    )


@pytest.fixture(scope="module")
def cells(config: CompareConfig) -> dict[tuple[str, float], dict[str, Any]]:
    compare(config)
    return {(line["method"], line["target"]): line for line in read_json_lines(Path(config.out) / CELLS)}


def test_every_method_is_measured_at_every_size(config: CompareConfig, cells: dict[Any, dict[str, Any]]) -> None:
    assert set(cells) == {(DENSE, 0.0), *((method, target) for method in METHODS for target in TARGETS)}
    checkpoint = Checkpoint(Path(config.model))
    grid = level_grid(checkpoint.units, 8, 4)
    dense = load(config.model)
    database = Path(config.out) / "base" / "database"
    made_from = json.loads((database / MANIFEST).read_text())["made_from"]
    stitcher = Stitcher(dense, checkpoint.family, Database(database, grid, made_from))
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, 0)
    held_out = corpus.draw_held_out(config.evaluation.tokens)
    (other,) = config.evaluation.texts
    beside = corpus.draw_beside(other, config.evaluation.tokens)
    prunable = sum(unit.parameters(0) for unit in grid.units)
    assert cells[DENSE, 0.0]["kl"] == 0
    for (method, target), cell in cells.items():
        if "levels" not in cell or cell["refused"]:
            assert target == 0.9
            assert "give a larger one, or a method that prunes within units" in cell["refused"]
            continue
        model = repeat_shared(stitcher.stitch(Genome(tuple(cell["levels"]))))
        assert cell["parameters"] == parameter_count(model)
        assert cell["parameters"] <= parameter_count(dense) - target * prunable + 1
        found = perplexity_and_kl({"dense": dense, "model": model}, held_out)["model"]
        assert (cell["perplexity"], cell["kl"]) == (pytest.approx(found.perplexity), pytest.approx(found.kl, abs=1e-6))
        found = perplexity_and_kl({"dense": dense, "model": model}, beside)["model"]
        on_other = {"perplexity": pytest.approx(found.perplexity), "kl": pytest.approx(found.kl, abs=1e-6)}
        assert cell["texts"] == {other: on_other}
        assert is_of_blocks(grid, cell["levels"]) or method not in METHODS[1:5]
    refused = {method for (method, _), cell in cells.items() if cell["refused"]}
    assert refused == set(METHODS[1:6])  # all that is left to evopress is the first attention, 11 % of the units


def is_of_blocks(grid: Grid, levels: list[int]) -> bool:
    whole_units = all(level in (0, grid.highest(i)) for i, level in enumerate(levels))
    return whole_units and all(bool(a) == bool(m) for a, m in zip(levels[::2], levels[1::2], strict=True))


def test_table_and_picture_show_all_cells(config: CompareConfig, cells: dict[Any, dict[str, Any]]) -> None:
    table = (Path(config.out) / TABLE).read_text()
    assert table.startswith("| removed | method | parameters | perplexity | KL | perplexity code.txt | KL code.txt |")
    for method in METHODS:
        assert f"| 20% | {method} |" in table
    assert "- shortgpt at 90%: whole blocks cannot make the model this small" in table
    assert (Path(config.out) / PICTURE).read_bytes().startswith(b"\x89PNG")
    panels = figure([Cell.of(cell) for cell in cells.values()]).axes
    assert [panel.get_title() for panel in panels] == ["held-out documents", "code.txt"]
    (other,) = config.evaluation.texts
    for panel, of in ((panels[0], lambda cell: cell), (panels[1], lambda cell: cell["texts"][other])):
        assert [line.get_label() for line in panel.lines] == [*METHODS, DENSE]
        for line in panel.lines[:-1]:
            found = [
                of(c)["perplexity"]
                for (method, _), c in cells.items()
                if method == line.get_label() and not c.get("refused")
            ]
            assert list(np.asarray(line.get_ydata())) == found
        assert set(np.asarray(panel.lines[-1].get_ydata())) == {of(cells[DENSE, 0.0])["perplexity"]}


def test_a_resumed_comparison_measures_only_what_is_missing(
    config: CompareConfig, cells: dict[Any, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """And finds the same models; another database than the first's is refused."""
    path = Path(config.out) / CELLS
    lines = path.read_text().splitlines()
    lost = next(i for i, line in enumerate(lines) if '"evolution", "target": 0.2' in line)
    path.write_text("".join(f"{line}\n" for i, line in enumerate(lines) if i != lost))
    for state in (Path(config.out) / "state" / "evolution-0.2").iterdir():
        state.unlink()
    capsys.readouterr()
    compare(config)
    assert capsys.readouterr().err.count("compare: ") == 1
    again = {(line["method"], line["target"]): line for line in read_json_lines(path)}
    assert {key: line.get("levels") for key, line in again.items()} == {
        key: line.get("levels") for key, line in cells.items()
    }
    with pytest.raises(UsageError, match="holds another run"):
        compare(replace(config, database=DatabaseConfig(levels=4, granularity=4)))


def test_methods_have_names_and_targets_bounds(config: CompareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(METHODS) == set(ALLOCATORS)
    for flags, words in (
        (["--methods", "magnitude"], "magnitude"),
        (["--targets", "0.2", "1.5"], "--targets: expected shares above 0 and below 1, found 1.5"),
    ):
        assert runs.call("compare", "M", "--data", "D", "--out", f"{config.out}-none", *flags) == 2
        assert words in capsys.readouterr().err
    assert not Path(f"{config.out}-none").exists()
