"""`darwinlm compare`: what its cells hold is what the models have, and a resumed one measures only what is missing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import runs
import tiny
from darwinlm.commands.compare import PICTURE, TABLE, compare
from darwinlm.config.evaluation import CompareConfig
from darwinlm.config.run import DatabaseConfig, SearchConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.database.stitch import Stitcher, repeat_shared
from darwinlm.database.store import MANIFEST, Database
from darwinlm.evaluation.local_tasks import LOCAL
from darwinlm.evaluation.paired import difference
from darwinlm.evaluation.quality import Quality, perplexity_and_kl
from darwinlm.evaluation.tasks import LIKELIHOOD, Request, run_tasks
from darwinlm.genome import Grid, level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count
from darwinlm.report import beside_dense
from darwinlm.report.comparison import CELLS, DENSE, Cell, figure, read_cells, write_cells
from darwinlm.report.html import NAME
from darwinlm.rivals import methods as registry
from darwinlm.rivals import shortgpt
from darwinlm.rivals.problem import Problem, scored_tokens
from darwinlm.runtime.files import read_lines
from darwinlm.types import DarwinError, Genome, SelectionStage, UsageError
from refusals import told

METHODS = tuple(registry.METHODS)
SHARES = (0.88, 0.48)
TARGETS = tuple(f"params={share}" for share in SHARES)


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
            generations=2,
            offspring=3,
            stages=(SelectionStage(2, 64), SelectionStage(1, 128, 64)),
            learning_rate=1e-3,
            mask_tokens=256,
        ),
        evaluation=replace(runs.SHORT.evaluation, texts=(str(other),)),
    )


@pytest.fixture(scope="module")
def cells(config: CompareConfig) -> dict[tuple[str, float], dict[str, Any]]:
    compare(config)
    return {(line["method"], line["kept"]): line for line in read_lines(Path(config.out) / CELLS)[1]}


def test_every_method_is_measured_at_every_size(config: CompareConfig, cells: dict[Any, dict[str, Any]]) -> None:
    assert set(cells) == {(DENSE, 1.0), *((method, kept) for method in METHODS for kept in SHARES)}
    checkpoint = Checkpoint(Path(config.model))
    grid = level_grid(checkpoint.units, 8, 4)
    dense = load(config.model)
    database = Path(config.out) / "base" / "database"
    provenance = json.loads((database / MANIFEST).read_text())["provenance"]
    stitcher = Stitcher(dense, checkpoint.family, Database(database, grid, provenance))
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, 0)
    held_out = corpus.draw_held_out(config.evaluation.tokens)
    (other,) = config.evaluation.texts
    beside = corpus.draw_beside(other, config.evaluation.tokens)
    assert cells[DENSE, 1.0]["kl"] == 0
    assert cells[DENSE, 1.0]["speedup"] == [1, 1]
    for (method, kept), cell in cells.items():
        if "levels" not in cell or cell["refused"]:
            assert kept == 0.48
            assert "give a larger one, or a method that prunes within units" in cell["refused"]
            continue
        assert (cell["seconds"] > 0) == (method != DENSE)
        assert min(cell["prefill_tokens_per_s"], cell["decode_tokens_per_s"], *cell["speedup"]) > 0
        model = repeat_shared(stitcher.stitch(Genome(tuple(cell["levels"]))))
        assert cell["parameters"] == parameter_count(model)
        assert cell["parameters"] <= kept * parameter_count(dense)
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
    assert table.startswith("| kept | method | parameters | perplexity | KL | perplexity code.txt | KL code.txt |")
    for method in METHODS:
        assert f"| params=0.88 | {method} |" in table
    assert "- shortgpt at params=0.48: whole blocks cannot make the model this small" in table
    scored = scored_tokens(level_grid(Checkpoint(Path(config.model)).units, 8, 4), config.search, 32)
    assert f"- ours: 2 generations of 3 offspring, {scored:,} scored tokens" in table
    assert "masks learn on 256\n" in table
    assert (Path(config.out) / PICTURE).read_bytes().startswith(b"\x89PNG")
    page = (Path(config.out) / NAME).read_text()
    assert "shortgpt at params=0.48: whole blocks cannot make the model this small" in page
    assert all(f"<td>{cell['kl']:.4f}</td>" in page for cell in cells.values() if cell.get("refused") is None)
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
        assert set(np.asarray(panel.lines[-1].get_ydata())) == {of(cells[DENSE, 1.0])["perplexity"]}


def test_a_resumed_comparison_measures_only_what_is_missing(
    config: CompareConfig, cells: dict[Any, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """And finds the same models; another database than the first's is refused."""
    out = Path(config.out)
    write_cells(out, [cell for cell in read_cells(out) if (cell.method, cell.kept) != ("evolution", 0.88)])
    for state in (Path(config.out) / "state" / "evolution-0.88").iterdir():
        state.unlink()
    capsys.readouterr()
    compare(config)
    assert capsys.readouterr().err.count("compare: ") == 1
    again = {(line["method"], line["kept"]): line for line in read_lines(out / CELLS)[1]}
    assert {key: line.get("levels") for key, line in again.items()} == {
        key: line.get("levels") for key, line in cells.items()
    }
    other = DatabaseConfig(levels=4, granularity=4)
    for changed in (
        replace(config, database=other),
        replace(config, search=replace(config.search, learning_rate=1e-4)),
    ):
        with pytest.raises(UsageError, match="holds another run"):
            compare(changed)


@pytest.mark.slow
def test_a_method_that_fails_does_not_stop_the_others(
    config: CompareConfig, cells: dict[Any, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(problem: Problem) -> Genome:
        raise DarwinError("every start diverges")

    changed = replace(config, out=str(tmp_path / "out"), methods=("shortgpt", "uniform"), targets=TARGETS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(shortgpt, "shortgpt", fail)
        with pytest.raises(DarwinError, match=r"^shortgpt at params=0\.88: every start diverges$"):
            compare(changed)
    table = tmp_path / "out" / TABLE
    assert "| params=0.88 | uniform |" in table.read_text()
    assert "shortgpt" not in table.read_text()
    assert [cell.levels for cell in compare(changed)[1:]] == [
        tuple(cells[method, 0.88]["levels"]) for method in changed.methods
    ]
    assert "| params=0.88 | shortgpt |" in table.read_text()


def test_cells_prove_themselves(tmp_path: Path) -> None:
    texts = {"other.txt": Quality(4.0, math.nan)}
    written = [Cell("uniform", 0.88, perplexity=3.25, texts=texts), Cell("shortgpt", 0.88, refused="too small")]
    write_cells(tmp_path, written)
    assert repr(read_cells(tmp_path)) == repr(written), "NaN differs from itself, but not in print"
    file = tmp_path / CELLS
    file.write_text(file.read_text().replace("3.25", "2.25"))
    with pytest.raises(DarwinError, match=r"cells\.jsonl is damaged"):
        read_cells(tmp_path)


def test_a_size_out_of_reach_is_a_refused_cell(config: CompareConfig, cells: dict[Any, dict[str, Any]]) -> None:
    found = compare(replace(config, methods=("uniform",), targets=("params=0.88", "params=0.42")))
    assert len(found) == 3
    assert found[1].levels == tuple(cells["uniform", 0.88]["levels"])
    assert "--target: expected parameters from" in str(found[2].refused)


def test_methods_have_names_and_targets_bounds(config: CompareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--methods", "magnitude"], "magnitude"),
        (["--methods", "training-aware"], "--methods: training-aware needs training"),
        (
            ["--targets", "params=0.8", "0.2"],
            "--targets: expected shares of the parameters that are kept, such as params=0.8",
        ),
        (["--targets", "params=1.5"], "found 'params=1.5'"),
        (["--targets", "flops=0.5"], "found 'flops=0.5'"),
    ):
        assert runs.call("compare", "M", "--data", "D", "--out", f"{config.out}-none", *flags) == 2
        assert words in capsys.readouterr().err
    assert not Path(f"{config.out}-none").exists()


@pytest.mark.slow
def test_by_default_methods_that_train_nothing_are_compared(config: CompareConfig, tmp_path: Path) -> None:
    plain = replace(config, out=str(tmp_path / "out"), methods=(), targets=TARGETS[:1])
    assert [cell.method for cell in compare(plain)] == [
        DENSE,
        *(m for m in METHODS if m not in ("sheared-llama", "training-aware")),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies'
def test_tasks_are_asked_of_every_model_and_only_once(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks can be added to a comparison, whose cells are not measured again; other questions cannot."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # a second a call, for notes
    for name in ("arc_easy", "piqa"):
        pairs = zip(words(name), words(name[::-1]), strict=True)
        records = [{"query": "Question: Which?\n", "choices": pair, "gold": 1} for pair in pairs]
        (tmp_path / LOCAL[name].file).write_text("".join(json.dumps(record) + "\n" for record in records))
    plain = replace(config, out=str(tmp_path / "out"), methods=("uniform", "shortgpt"), dtype="float32")
    with_arc = replace(plain, tasks="arc_easy", tasks_data=str(tmp_path), limit=20)
    with_both = replace(with_arc, tasks="piqa,arc_easy")
    found = [compare(each) for each in (plain, with_arc, with_both)]
    for before, after in pairwise(found):
        assert [replace(cell, scores=()) for cell in after] == [replace(cell, scores=()) for cell in before]
    said = [line for line in told(capsys.readouterr().err) if line.startswith("compare: ")]
    assert len(said) == 5 + 4 + 4  # one of the five is refused, and asked nothing
    assert said[-1] == "compare: 4/5, uniform at params=0.48: piqa"
    asked_of_each = [["piqa", "piqa", "arc_easy", "arc_easy"]] * 4 + [[]]
    assert [[score.task for score in cell.scores] for cell in found[-1]] == asked_of_each
    for cell in found[-1]:
        for score in cell.scores:
            assert score.questions == 20
    asked = [Request("piqa", None, "acc"), Request("arc_easy", None, "acc")]
    dense = Checkpoint(Path(config.model))
    alone = run_tasks(load(config.model), dense.tokenizer, asked, with_both)
    assert list(found[-1][0].scores) == alone
    values = {tuple(score.value for score in cell.scores) for cell in found[-1]}
    assert len(values) > 2  # so that the models were told apart
    table = (tmp_path / "out" / TABLE).read_text()
    assert "| KL code.txt | piqa acc | arc_easy acc |" in table
    assert f"| {alone[0]} | {alone[2]} |" in table
    gap = difference(found[-1][1].scores[1].by_question, alone[1].by_question)
    assert gap is not None
    assert f" {gap.text(share=False)} |" in table
    page = (tmp_path / "out" / NAME).read_text()
    assert f"<td>{gap.text(share=False)}</td>" in page
    assert beside_dense.leaders(found[-1])[0] in page
    # Scores without answers to each question, as earlier versions wrote them, are measured again.
    directory = Path(plain.out)
    write_cells(directory, [old(cell) for cell in read_cells(directory)])
    assert compare(with_both) == found[-1]
    for changed in (replace(with_arc, limit=10), replace(with_arc, shots=1)):
        with pytest.raises(UsageError, match="holds answers to other questions of arc_easy"):
            compare(changed)
    new = replace(plain, out=str(tmp_path / "new"), tasks="arc_easy", tasks_path=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--tasks-path: no directory"):
        compare(new)
    assert not Path(new.out).exists()


def old(cell: Cell) -> Cell:
    kept = tuple(replace(score, by_question=None) for score in cell.scores if score.metric != LIKELIHOOD)
    return replace(cell, scores=kept)


def words(seed: str) -> list[str]:
    found = sorted({word for document in tiny.documents() for word in document.split() if len(word) == 5})
    return Random(seed).sample(found, 24)
