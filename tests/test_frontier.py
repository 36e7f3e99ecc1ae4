"""`darwinlm frontier`: sizes over one database, what its cells say, and sizes that are added later."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
from darwinlm.commands import frontier as module
from darwinlm.commands.compress import run
from darwinlm.commands.frontier import FORMATS, PICTURE, TABLE, frontier
from darwinlm.commands.run_directory import FRONTIER_SETTINGS, Run, load
from darwinlm.config.frontier import FrontierConfig
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, RunConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.data.draw import draw_tokens
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.evaluation.tasks import Score
from darwinlm.export.gguf_twin import twin
from darwinlm.export.importance import mean_squares
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.size import parameter_count
from darwinlm.report import formats
from darwinlm.report.comparison import CELLS, DENSE, Cell, InFormat, read_cells, write_cells
from darwinlm.report.frontier import KNEE, figure, find_knee
from darwinlm.report.html import NAME
from darwinlm.search.mutation import adapt
from darwinlm.types import Genome, UsageError
from refusals import only_sentence
from test_parallel import torchrun

SHARES = (0.9, 0.8, 0.7)


def config_of(model: Path, text: Path, out: Path) -> FrontierConfig:
    return FrontierConfig(
        model=str(model),
        data=str(text),
        out=str(out),
        sizes=3,
        largest=0.9,
        smallest=0.7,
        device="cpu",
        dtype="float32",
        calibration=runs.SHORT.calibration,
        database=DatabaseConfig(levels=8, granularity=4),
        search=runs.SHORT.search,
        refit=runs.SHORT.refit,
        evaluation=runs.SHORT.evaluation,
    )


@pytest.fixture(scope="module")
def config(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> FrontierConfig:
    return config_of(checkpoints["llama-gqa"], text, tmp_path_factory.mktemp("frontier") / "out")


@pytest.fixture(scope="module")
def cells(config: FrontierConfig) -> list[Cell]:
    return frontier(config)


def written(out: Path) -> dict[str, int]:
    """When every file of a directory was last written, but locks."""
    return {
        str(file.relative_to(out)): file.stat().st_mtime_ns
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def test_every_size_is_what_its_cell_says(config: FrontierConfig, cells: list[Cell], tmp_path: Path) -> None:
    dense = load(config.model)
    assert [cell.method for cell in cells] == [DENSE, *(f"params={share:g}" for share in SHARES)]
    assert all(smaller.parameters < larger.parameters for larger, smaller in pairwise(cells))
    checkpoint = Checkpoint(Path(config.model))
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, 0)
    held_out = corpus.draw_held_out(config.evaluation.tokens)
    for cell, share in zip(cells[1:], SHARES, strict=True):
        assert 0.97 * share < cell.kept <= share
        out = tmp_path / cell.method
        assert runs.call("export", config.out, "--target", cell.method, "--out", str(out), "--no-verify") == 0
        model = load(out)
        assert (cell.parameters, cell.bytes) == (parameter_count(model), 4 * parameter_count(model))
        found = perplexity_and_kl({"dense": dense, "model": model}, held_out)["model"]
        assert (cell.perplexity, cell.kl) == (pytest.approx(found.perplexity), pytest.approx(found.kl, abs=1e-6))
        assert min(cell.prefill_tokens_per_s, cell.decode_tokens_per_s, cell.seconds) > 0


def test_sizes_share_a_database_and_sensitivities(config: FrontierConfig, cells: list[Cell]) -> None:
    out = Path(config.out)
    assert {file.parent.parent.name for file in out.rglob("database.json")} == {"base"}
    assert len({file.read_text() for file in out.rglob("sensitivities.json")}) == 1
    assert len([*out.rglob("sensitivities.json")]) == 1 + len(SHARES)


def test_table_and_picture_show_all_sizes(config: FrontierConfig, cells: list[Cell]) -> None:
    table = (Path(config.out) / TABLE).read_text()
    for cell in cells:
        assert f"| {cell.method} | {cell.parameters / 1e6:.1f} M ({cell.kept:.0%})" in table
        assert f"| {cell.kl:.4f} |" in table
    assert (Path(config.out) / PICTURE).read_bytes().startswith(b"\x89PNG")
    page = (Path(config.out) / NAME).read_text()
    for cell in cells:
        assert f'<td class="words">{cell.method}</td>' in page
        assert f"<td>{cell.kl:.4f}</td>" in page
    assert "Hello there" in page
    panels = figure(cells).axes
    drawn = [tuple(np.asarray(data).tolist() for data in panel.lines[0].get_data()) for panel in panels]
    assert drawn[0] == ([cell.parameters / 1e6 for cell in cells[1:]], [cell.kl for cell in cells[1:]])
    assert drawn[7] == ([cell.decode_tokens_per_s for cell in cells[1:]], [cell.perplexity for cell in cells[1:]])


def test_the_same_command_measures_nothing_again(config: FrontierConfig, cells: list[Cell]) -> None:
    before = written(Path(config.out))
    assert frontier(config) == cells
    reports = {TABLE, PICTURE, NAME}
    after = written(Path(config.out))
    results = {name for name in before if not name.endswith("result.json") and name not in reports}
    assert {name: after[name] for name in results} == {name: before[name] for name in results}
    assert before.keys() == after.keys()


def test_an_interrupted_frontier_ends_as_if_it_had_not_been(
    config: FrontierConfig, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after the first generation of the second size, and then before the last size is measured."""
    from darwinlm.commands import judging
    from darwinlm.search import evolution

    again = replace(config, out=str(tmp_path / "out"))
    generation, measure, calls = evolution._generation, judging.Judge.measure, []

    def counted(work, at):
        def stop(*given):
            calls.append(work)
            if calls.count(work) == at:
                raise KeyboardInterrupt
            return work(*given)

        return stop

    monkeypatch.setattr(evolution, "_generation", counted(generation, 4))
    monkeypatch.setattr(judging.Judge, "measure", counted(measure, 3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            frontier(again)
    assert [(cell.method, cell.levels, cell.kl) for cell in frontier(again)] == [
        (cell.method, cell.levels, cell.kl) for cell in cells
    ]


def test_a_size_between_two_starts_from_them(
    config: FrontierConfig, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted: list[Genome] = []
    monkeypatch.setattr(module, "adapt", lambda genome, *given: (adapted.append(genome), adapt(genome, *given))[1])
    whole = tmp_path / "out"
    shutil.copytree(config.out, whole)
    assert (
        runs.call("export", str(whole), "--target", "params=0.75", "--out", str(tmp_path / "new"), "--no-verify") == 0
    )
    new = parameter_count(load(tmp_path / "new"))
    assert cells[3].parameters < new < cells[2].parameters
    assert [genome.levels for genome in adapted] == [cells[2].levels, cells[3].levels]
    assert Run(whole / "params=0.75").config.target == "params=0.75"
    later = frontier(replace(config, out=str(whole), targets=("params=0.9", "params=0.75")))
    assert [cell.method for cell in later] == [DENSE, "params=0.9", "params=0.75"]
    assert later[2].parameters == new
    assert {cell.method for cell in read_cells(whole)} == {cell.method for cell in (*cells, *later)}


def test_a_size_must_be_named_and_only_of_a_frontier(
    config: FrontierConfig, cells: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert runs.call("export", config.out, "--out", str(tmp_path / "new")) == 2
    found = only_sentence(capsys.readouterr().err)
    assert "expected --target, one of params=0.9, params=0.8, params=0.7 or a size between them" in found
    assert runs.call("export", config.model, "--target", "params=0.8", "--out", str(tmp_path / "new")) == 2
    assert "expected a frontier" in only_sentence(capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--from", "0.4", "--to", "0.9"), "1 > --from > --to > 0"),
        (("--targets", "params=0.9", "params=0.001"), "expected parameters from"),
        (("--search.start", "genome.json"), "expected sensitivity or uniform"),
        (("--sizes", "0"), "--sizes"),
        (("--formats", "q8_0", "q9_0"), "choose from"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    flags: tuple[str, ...], word: str, config: FrontierConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("frontier", config.model, "--data", config.data, "--out", str(tmp_path / "out"), "--fit-data")
    small = ("--calibration.tokens", "1024", "--calibration.sequence-length", "32", "--database.granularity", "4")
    short = ("--evaluation.speed-tokens", "16")
    capsys.readouterr()
    assert runs.call(*arguments, *small, *short, *flags) == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("database.json"))
    assert not (tmp_path / "out" / FRONTIER_SETTINGS).exists()


def test_a_run_reuses_the_database_of_another(config: FrontierConfig, cells: list[Cell], tmp_path: Path) -> None:
    """And finds what it would have found over its own."""
    settings = RunConfig(
        model=config.model,
        data=config.data,
        out=str(tmp_path / "own"),
        target="params=0.8",
        device="cpu",
        dtype="float32",
        verify=False,
        calibration=config.calibration,
        database=config.database,
        search=config.search,
        refit=config.refit,
        evaluation=config.evaluation,
    )
    run(settings, until="search")
    run(replace(settings, out=str(tmp_path / "reused"), reuse=str(tmp_path / "own")), until="search")
    assert runs.history(tmp_path / "reused") == runs.history(tmp_path / "own")
    assert not (tmp_path / "reused" / "database").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seed": 1}, "another seed"),
        ({"calibration": CalibrationConfig(tokens=512, sequence_length=32)}, "another calibration"),
        ({"reuse": "nowhere"}, "no run in nowhere"),
    ],
)
def test_a_database_of_something_else_is_not_reused(
    changes: dict[str, object],
    word: str,
    config: FrontierConfig,
    cells: list[Cell],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = runs.short(
        Path(config.model),
        Path(config.data),
        tmp_path / "run",
        **{"target": "params=0.8", "database": config.database, "reuse": str(Path(config.out) / "base")} | changes,
    )
    capsys.readouterr()
    assert runs.call(*runs.command(settings)) == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_an_unfinished_database_is_not_reused(
    config: FrontierConfig, cells: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(Path(config.out) / "base", base)
    (base / "database" / "block-00-mlp.safetensors").unlink()
    settings = runs.short(
        Path(config.model), Path(config.data), tmp_path / "run", target="params=0.8", database=config.database,
        device="cpu", dtype="float32", reuse=str(base),
    )  # fmt: skip
    capsys.readouterr()
    assert runs.call(*runs.command(settings)) == 2
    assert "lacks 1 units; run its own command to the end first" in capsys.readouterr().err.splitlines()[-1]


def test_the_knee_is_where_the_curve_bends() -> None:
    def at(parameters: int, kl: float) -> Cell:
        return Cell(str(parameters), 1.0, parameters=parameters, kl=kl)

    bends = [at(90, 0.1), at(80, 0.2), at(70, 0.3), at(60, 1.3), at(50, 2.3)]
    assert find_knee(bends) is bends[2]
    assert find_knee(bends[::-1]) is bends[2]
    straight = [at(90, 0.1), at(80, 0.2), at(70, 0.3)]
    assert find_knee(straight) is None or straight[1].kl < 0.2
    assert find_knee(bends[:2]) is None
    assert find_knee([at(90, 0.1), at(80, 0.9), at(70, 1.0)]) is None  # it bends the other way
    assert KNEE == "knee"


def test_formats_can_be_added_to_a_frontier(config: FrontierConfig, cells: list[Cell], tmp_path: Path) -> None:
    pytest.importorskip("libgguf")
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    found = frontier(replace(config, out=str(out), formats=("f16", "q4_0")))
    assert [replace(cell, formats={}) for cell in found] == cells
    assert [list(cell.formats) for cell in found] == [["f16", "q4_0"]] * 4
    for cell in found:
        assert cell.formats["f16"].bytes > 2 * 0.95 * cell.formats["q4_0"].bytes
        assert cell.formats["f16"].kl == pytest.approx(cell.kl, abs=1e-3)
        assert cell.formats["q4_0"].kl > cell.kl
    dense = load(config.model)
    quantised, size = twin(Path(config.model), "q4_0", mean_squares(dense, search_tokens(config)))
    corpus = read_corpus(config.data, Checkpoint(Path(config.model)).tokenizer, config.calibration.sequence_length, 0)
    quality = perplexity_and_kl({"dense": dense, "model": quantised}, corpus.draw_held_out(config.evaluation.tokens))
    of_dense = found[0].formats["q4_0"]
    assert (of_dense.bytes, of_dense.kl) == (size, pytest.approx(quality["model"].kl, abs=1e-6))
    table, page = ((out / name).read_text() for name in (TABLE, NAME))
    assert f"{of_dense.kl:.4f}" in table
    assert "KL over bytes, by type of file" in page
    assert (out / FORMATS).read_bytes().startswith(b"\x89PNG")


def test_scores_outlive_formats_that_are_added(config: FrontierConfig, cells: list[Cell], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    score = Score("arc_easy", "acc", 0, 0.5, 0.1, 4, "a file", (0.0, 1.0))
    write_cells(out, [replace(cell, scores=(score,)) for cell in cells])
    assert all(not cell.scores for cell in frontier(replace(config, out=str(out), formats=("f16",))))
    assert [cell.scores for cell in read_cells(out)] == [(score,)] * len(cells)
    assert all(cell.formats for cell in read_cells(out))


def test_a_format_that_a_size_cannot_have_is_told(
    config: FrontierConfig, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darwinlm.commands import formats as module

    def refuse(directory: Path, *given: Any) -> Any:
        if directory != Path(config.model):
            raise UsageError("cannot be: expected another; name one")
        return twin(directory, *given)

    monkeypatch.setattr(module, "twin", refuse)
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    found = frontier(replace(config, out=str(out), formats=("f16",)))
    assert [cell.formats["f16"].refused is None for cell in found] == [True, False, False, False]
    assert "params=0.8 in f16: cannot be: expected another; name one" in (out / TABLE).read_text()
    assert read_cells(out)[1].formats["f16"] == replace(InFormat(), refused="cannot be: expected another; name one")


def search_tokens(config: FrontierConfig) -> torch.Tensor:
    """The tokens that the searches of a frontier score on."""
    run = Run(Path(config.out) / "base").config
    tokenizer = Checkpoint(Path(config.model)).tokenizer
    return draw_tokens(read_corpus(config.data, tokenizer, config.calibration.sequence_length, 0), run)["search"]


def test_files_that_pay_are_those_that_none_beats_in_both() -> None:
    def cell(name: str, **formats: tuple[int, float]) -> Cell:
        return Cell(name, 1.0, formats={kind: InFormat(size, 1.0, kl) for kind, (size, kl) in formats.items()})

    dense = cell("dense", q8_0=(100, 0.01), q4_0=(60, 0.2))
    pruned = cell("params=0.8", q8_0=(80, 0.3), q4_0=(50, 0.6))
    small = cell("params=0.5", q8_0=(50, 0.7), q4_0=(30, 1.5))
    assert [file.name for file in formats.best([dense, pruned, small])] == [
        "dense in q8_0", "dense in q4_0", "params=0.8 in q4_0", "params=0.5 in q4_0",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_find_the_models_of_one(config: FrontierConfig, cells: list[Cell], tmp_path: Path) -> None:
    recipe = Path(config.out) / FRONTIER_SETTINGS
    settings = tmp_path / "recipe.yaml"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(("model:", "data:", "out:"))]
    settings.write_text("\n".join(lines).replace("largest:", "from:").replace("smallest:", "to:") + "\n")
    out = tmp_path / "out"
    done = torchrun(
        "-m", "darwinlm", "frontier", config.model, "--data", config.data, "--out", str(out), "--config", str(settings)
    )
    assert done.returncode == 0, done.stderr
    found = read_cells(out)
    assert [(cell.method, cell.levels) for cell in found] == [(cell.method, cell.levels) for cell in cells]
    assert [cell.kl for cell in found] == pytest.approx([cell.kl for cell in cells], abs=1e-5)
    assert (out / CELLS).exists()
