"""Run directories that a run cannot use, or finds damaged: one sentence, and what is there stays as it is."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from darwinlm.commands import compress
from darwinlm.commands.run_directory import Run, load
from darwinlm.config.run import RunConfig
from darwinlm.runtime.files import read_lines, write_lines, write_record
from darwinlm.runtime.locking import locked_directory
from darwinlm.types import DarwinError
from refusals import as_if_nothing_had_happened, copied_model, only_sentence, refused


@pytest.fixture
def config(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> RunConfig:
    """A run that would work."""
    return runs.short(checkpoints["qwen2"], text, tmp_path / "run")


def test_directory_that_cannot_be_written_to(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("a file")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(replace(config, out=str(out)), capsys, 2, f"cannot write to {out}", "choose another directory")
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "run"
    refused(replace(config, out=str(out)), capsys, 2, "cannot write", "Permission denied", "choose another directory")


def test_directory_that_holds_another_run(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    compress.run(config, until="database")
    before = runs.files(tmp_path / "run")
    words = "holds another run", "its seed is 0, not 7", "choose another --out"
    refused(replace(config, seed=7), capsys, 2, *words)
    other = replace(config.calibration, tokens=512)
    refused(replace(config, calibration=other), capsys, 2, "its calibration.tokens is 1024, not 512")
    assert runs.files(tmp_path / "run") == before
    (tmp_path / "run" / "run.yaml").write_text("seed: [")
    refused(config, capsys, 2, "run.yaml", "does not hold the settings of a run")


def test_a_run_of_the_first_version_is_refused(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its settings lack the line that says which version's files these are."""
    compress.run(config, until="database")
    settings = tmp_path / "run" / "run.yaml"
    first, _, rest = settings.read_text().partition("\n")
    assert first.startswith("#")
    settings.write_text(rest)
    before = runs.files(tmp_path / "run")
    refused(config, capsys, 2, "holds a run of darwinlm 0.1.0", "does not read", "use another --out, or darwinlm 0.1.0")
    assert runs.files(tmp_path / "run") == before


def test_a_run_that_began_before_refits_had_a_rank_goes_on_as_it_began(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its consumers alone were trained. What its refit would be counts only where there is one."""
    begun = replace(config, refit=replace(config.refit, rank=0))
    compress.run(begun, until="export")
    settings, refitted = tmp_path / "run" / "run.yaml", tmp_path / "run" / "refit" / "searched.safetensors"
    earlier = settings.read_text().replace("\n  rank: 0", "")
    assert earlier != settings.read_text()
    settings.write_text(earlier)
    before = refitted.read_bytes()
    assert b'"rank"' not in before[:4096]
    assert Run.open(tmp_path / "run").config == begun
    refused(config, capsys, 2, "holds another run", f"its refit.rank is 0, not {config.refit.rank}")
    compress.run(begun, until="export")
    assert refitted.read_bytes() == before
    without = replace(config, out=str(tmp_path / "without"), refit=replace(begun.refit, tokens=0))
    compress.run(without, until="database")
    compress.run(replace(without, refit=replace(config.refit, tokens=0, batch_size=7)), until="database")


def test_directory_that_holds_something_else(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.partial").write_text("mine")
    refused(config, capsys, 2, "not empty and holds no run", "letters.partial", "choose another --out")
    assert runs.files(tmp_path / "run") == {"letters.partial": b"mine"}


@pytest.mark.slow
def test_two_runs_in_one_directory(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    with locked_directory(Path(config.out)):
        arguments, environment = runs.process(*runs.command(config))
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another process is working in" in only_sentence(done.stderr)
    as_if_nothing_had_happened(config)


def test_a_corrected_command_may_use_the_same_directory(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    refused(replace(config, data="nowhere.txt"), capsys, 2)
    assert runs.call(*runs.command(config, name="database")) == 0


def test_a_wrong_command_leaves_an_unfinished_run_alone(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(config.data, tmp_path / "text.jsonl")
    config = replace(config, data=str(tmp_path / "text.jsonl"))
    compress.run(config, until="database")
    before = runs.files(tmp_path / "run")
    (tmp_path / "text.jsonl").unlink()
    refused(config, capsys, 2, "no text at")
    assert runs.files(tmp_path / "run") == before


# The database.


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.fixture
def measured(config: RunConfig, tmp_path: Path) -> Path:
    """The database of a run that has not searched yet."""
    compress.run(config, until="database")
    return tmp_path / "run" / "database"


@pytest.mark.parametrize("damage", [_flip, _truncate])
def test_damaged_unit(
    damage: Callable[[Path], None], measured: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    whole = runs.files(measured)
    damage(measured / "block-01-mlp.safetensors")
    words = "block-01-mlp.safetensors", "truncated, altered or renamed", "delete it and run the command again"
    refused(config, capsys, 1, *words)
    (measured / "block-01-mlp.safetensors").unlink()  # as it was told
    assert runs.call(*runs.command(config, name="database")) == 0
    assert runs.files(measured) == whole


def test_swapped_units(measured: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    """Each is whole, but says which it is."""
    one, other = (measured / f"block-0{block}-mlp.safetensors" for block in (0, 1))
    data = one.read_bytes(), other.read_bytes()
    other.write_bytes(data[0])
    one.write_bytes(data[1])
    refused(config, capsys, 1, "block-00-mlp.safetensors was", "renamed after it was written")


def test_a_unit_of_another_database(
    measured: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = replace(config, out=str(tmp_path / "other"), seed=1)
    compress.run(other, until="database")
    file = "database/block-01-mlp.safetensors"
    shutil.copy(tmp_path / "other" / file, tmp_path / "run" / file)
    refused(config, capsys, 1, "block-01-mlp.safetensors", "is of another database", "delete that file")


@pytest.fixture(scope="module")
def finished(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    return compress.run(runs.short(checkpoints["qwen2"], text, run)).path


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """A run, at the place of `config`, that wants only its report."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.md").unlink()
    return tmp_path / "run"


def test_a_damaged_refit(unfinished: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    refit = unfinished / "refit"
    _flip(refit / "uniform.safetensors")
    refused(config, capsys, 1, "uniform.safetensors is damaged (its checksum does not match)", "delete it")
    shutil.copy(refit / "searched.safetensors", refit / "uniform.safetensors")
    refused(config, capsys, 1, "it was written as refit/searched.safetensors", "delete it")


def test_damaged_curves(unfinished: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    file = unfinished / "search" / "curves.json"
    whole = json.loads(file.read_text())
    write_record(file, {"curves": whole["curves"]}, {"genomes": [], "texts": []})
    refused(config, capsys, 1, "curves.json is of another search", "delete it")
    file.write_text(json.dumps(whole).replace("0.", "1.", 1))
    refused(config, capsys, 1, "curves.json is damaged", "delete it")


@pytest.mark.slow
def test_a_damaged_export_is_refused_and_made_again(
    unfinished: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    before = runs.files(unfinished / "model")
    for damage, file in ((_flip, "model.safetensors"), (_truncate, "tokenizer.json"), (Path.unlink, "config.json")):
        damage(unfinished / "model" / file)
        with pytest.raises(DarwinError, match=f"the model in .* is damaged: expected the {file}"):
            load(unfinished)
        (unfinished / "report.md").unlink(missing_ok=True)
        assert runs.call(*runs.command(config)) == 0
        assert "the model is written again" in capsys.readouterr().err
        after = runs.files(unfinished / "model")
        assert {name for name in before if after.get(name) != before[name]} <= {"README.md"}  # which has speeds


def test_a_damaged_table(unfinished: Path):
    table = unfinished / "table.json"
    table.write_text(table.read_text().replace('"perplexity": ', '"perplexity": 1', 1))
    with pytest.raises(DarwinError, match=r"table\.json is damaged"):
        _ = Run(unfinished).table


def test_damaged_manifest(measured: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    manifest = measured / "database.json"
    whole = manifest.read_text()
    _truncate(manifest)
    refused(config, capsys, 1, "database.json", "is damaged", "delete it and run the command again")
    changed = json.loads(whole)
    changed["provenance"]["model"] = "another"
    manifest.write_text(json.dumps(changed))
    refused(config, capsys, 1, "database.json", "is damaged", "checksum")
    write_record(manifest, {}, changed["provenance"])
    refused(config, capsys, 2, "made from another model", "choose another --out")
    for nonsense in ("[]", "{}"):
        manifest.write_text(nonsense)
        refused(config, capsys, 1, "database.json", "is damaged", "lacks provenance")


def test_run_of_another_version(measured: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    """Version 0.1.0 wrote no format and no checksum."""
    manifest = measured / "database.json"
    whole = json.loads(manifest.read_text())
    for version, content in ((1, {"provenance": whole["provenance"]}), (3, whole | {"format": 3})):
        manifest.write_text(json.dumps(content))
        words = f"written by another version of darwinlm (format {version}, expected 2)", "start a new run"
        refused(config, capsys, 1, "database.json", *words)


def test_damaged_search(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    compress.run(config, until="search")
    history = tmp_path / "run" / "search" / "history.jsonl"
    whole, (_, lines) = history.read_text(), read_lines(history)
    edited = whole.replace(json.dumps(lines[0]["genome"]), json.dumps([0] * len(lines[0]["genome"])))
    assert edited != whole
    for damaged in (whole[:-9], edited, ""):
        history.write_text(damaged)
        refused(config, capsys, 1, "history.jsonl", "is damaged", "delete it")
    first, rest = whole.split("\n", 1)
    provenance = json.loads(first)["provenance"]
    write_lines(history, lines, provenance | {"seed": provenance["seed"] + 1})
    refused(config, capsys, 1, "history.jsonl", "another search", "delete it")
    history.write_text(rest)
    refused(config, capsys, 1, "history.jsonl", "written by another version")


def test_damaged_sensitivities(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = replace(config, search=replace(config.search, start="sensitivity"))
    compress.run(config, until="search")
    run = tmp_path / "run"
    (run / "search" / "result.json").unlink()
    (run / "search" / "history.jsonl").unlink()
    file = run / "search" / "sensitivities.json"
    table = json.loads(file.read_text())
    table["rises"][0][-1] *= 2
    file.write_text(json.dumps(table))
    refused(config, capsys, 1, "sensitivities.json", "is damaged", "delete it")


# The machine.


@pytest.mark.slow
def test_full_disk(config: RunConfig, tmp_path: Path):
    """No file may grow beyond a few kilobytes, as on a full disk; the same command then goes on."""
    arguments, environment = runs.process(*runs.command(config))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    sentence = only_sentence(done.stderr)
    assert "File too large" in sentence
    assert "run the same command again" in sentence
    assert (tmp_path / "run" / "run.yaml").exists()
    assert not list((tmp_path / "run" / "database").glob("*.safetensors"))
    assert runs.call(*runs.command(config, name="database")) == 0


@pytest.mark.slow
def test_a_failure_is_one_sentence_in_a_real_process_too(config: RunConfig):
    arguments, environment = runs.process(*runs.command(replace(config, data="nowhere.txt")))
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert only_sentence(done.stderr) == "darwinlm: no text at nowhere.txt: expected a file; check --data"
    assert done.stdout == ""


def test_overflow_in_the_activations(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = copied_model(config, tmp_path)
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if "up_proj" in name or "gate_proj" in name:
            weights[name] = torch.full_like(weights[name], 1e30)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    refused(replace(config, model=str(model)), capsys, 1, "NaN or infinity", "overflow")
