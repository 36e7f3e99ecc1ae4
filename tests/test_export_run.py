"""`darwinlm export` of a run without an export: it stitches the model from the database, or says what is missing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runs
from darwinlm.commands import compress
from darwinlm.commands.run_directory import Run, load
from darwinlm.config.run import RunConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime.files import read_json
from refusals import only_sentence

TOKEN_IDS = torch.arange(20, 52)[None]


@pytest.fixture(scope="module")
def searched(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    out, refit = tmp_path_factory.mktemp("searched") / "run", replace(runs.SHORT.refit, tokens=0)
    config = runs.short(checkpoints["llama-gqa"], text, out, refit=refit)
    compress.run(config, until="search")
    return config


@pytest.fixture
def run(searched: RunConfig, tmp_path: Path) -> Path:
    """A copy of a run, which a test may damage."""
    return shutil.copytree(searched.out, tmp_path / "run")


def export(run: Path) -> int:
    return runs.call("export", str(run), "--no-verify", "--out", str(run.parent / "out"))


def refused(run: Path, capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    """Run an export that must fail with one sentence and change nothing."""
    before = runs.files(run)
    capsys.readouterr()
    assert export(run) == code
    sentence = only_sentence(capsys.readouterr().err)
    assert all(word in sentence for word in words), sentence
    time_spent = {"stages.json"}
    after = runs.files(run)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before.keys() - time_spent)
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_export_is_the_stitched_model(run: Path, searched: RunConfig, tmp_path: Path) -> None:
    for lost in ("table.json", "report.md"):
        (run / lost).touch()  # as in a finished run that has lost its model
    assert export(run) == 0
    checkpoint, config = Checkpoint(Path(searched.model)), searched.database
    grid = level_grid(checkpoint.units, config.levels, config.granularity)
    database = Database(run / "database", grid, read_json(run / "database" / "database.json")["provenance"])
    dense = checkpoint.load(torch.float32, torch.device("cpu"))
    expected = Stitcher(dense, checkpoint.family, database).stitch(Run(run).genome)(TOKEN_IDS).logits
    for model in (run, tmp_path / "out"):
        torch.testing.assert_close(load(model)(TOKEN_IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [("--out",), ("--format", "gguf", "--out")])
def test_a_taken_name_is_refused_before_a_model_is_stitched(
    run: Path, capsys: pytest.CaptureFixture[str], form: tuple[str, ...]
) -> None:
    before = runs.files(run)
    assert runs.call("export", str(run), *form, str(run)) == 2
    assert "choose another name" in only_sentence(capsys.readouterr().err)
    assert runs.files(run) == before


def test_missing_unit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "database" / "block-01-mlp.safetensors").unlink()
    refused(run, capsys, 1, "block-01-mlp.safetensors is missing", "run darwinlm compress again")


def test_damaged_unit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = read_json(run / "search" / "result.json")["level_of"]
    unit = next(name for name, level in levels.items() if level in (1, 2))
    file = run / "database" / f"{unit}.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(run, capsys, 1, file.name, "truncated, altered or renamed", "it alone is rebuilt")


def test_search_that_has_not_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "search" / "result.json").unlink()
    refused(run, capsys, 2, "its run has not come to its export yet")
