"""A run that is killed and started again ends like one that was never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import runs
from darwinlm.commands import compress
from darwinlm.config.run import CalibrationConfig, RunConfig, SearchConfig
from darwinlm.types import SelectionStage

BLOCKS = 9  # enough that every stage lasts long enough to be hit
UNITS = 2 * BLOCKS
GENERATIONS = 8
PATIENCE = 120.0  # seconds


@pytest.fixture(scope="module")
def deep(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of many blocks: those of the tiny Llama, again and again."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(checkpoints["llama-gqa"], path)
    config = json.loads((path / "config.json").read_text())
    blocks = config["num_hidden_layers"]
    weights = load_file(path / "model.safetensors")
    for name, tensor in list(weights.items()):
        if name.startswith("model.layers."):
            _, _, block, rest = name.split(".", 3)
            weights |= {f"model.layers.{n}.{rest}": tensor.clone() for n in range(int(block), BLOCKS, blocks)}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS}))
    return path


def _config(deep: Path, text: Path, out: Path) -> RunConfig:
    search = SearchConfig(
        generations=GENERATIONS,
        offspring=4,
        stages=(
            SelectionStage(survivors=2, fitness_tokens=64, training_tokens=32),
            SelectionStage(survivors=1, fitness_tokens=128, training_tokens=64),
        ),
        learning_rate=1e-3,
    )
    calibration = CalibrationConfig(tokens=8192, sequence_length=32, batch_size=4)
    return runs.short(deep, text, out, calibration=calibration, search=search)


@pytest.fixture(scope="module")
def uninterrupted(deep: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a run that is never stopped ends with."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    arguments, environment = runs.process(*runs.command(_config(deep, text, out)))
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    return _end(out)


def _end(run: Path) -> dict[str, object]:
    """What must be equal: the whole history, the genome, all weights, the database."""
    files = runs.files(run)
    result = json.loads(files["search/result.json"])
    kept = {name: data for name, data in files.items() if name.startswith("model/") and name != "model/README.md"}
    database = {name: data for name, data in files.items() if name.startswith("database/")}
    table = [
        (row["model"], row["parameters"], row["perplexity"], row["kl"])
        for row in json.loads(files["table.json"])["rows"]
    ]
    return {"history": runs.history(run), "result": result, "model": kept, "database": database, "table": table}


def _assert_nothing_is_left_over(run: Path) -> None:
    assert [str(path) for path in run.rglob("*partial*")] == []


def _units(run: Path) -> int:
    return len(list((run / "database").glob("*.safetensors")))


def _generations(run: Path) -> int:
    try:
        return len(runs.history(run)) - 1
    except OSError:  # not there yet
        return 0


def _kill_when(arguments: list[str], environment: dict[str, str], moment: Callable[[], bool]) -> None:
    """Start a command and kill it as soon as `moment` has come."""
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + PATIENCE
        while not moment():
            assert running.poll() is None, f"ended before the moment came: {running.stderr and running.stderr.read()}"
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        running.kill()
        assert running.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(
    deep: Path, text: Path, tmp_path: Path, uninterrupted: dict[str, object]
):
    run = tmp_path / "run"
    arguments, environment = runs.process(*runs.command(_config(deep, text, run)))

    _kill_when(arguments, environment, lambda: _units(run) >= 3)
    assert 3 <= _units(run) < UNITS
    early = {path: path.stat().st_mtime_ns for path in sorted((run / "database").glob("*.safetensors"))[:2]}

    _kill_when(arguments, environment, lambda: _generations(run) >= 2)
    assert _units(run) == UNITS
    assert 2 <= _generations(run) < GENERATIONS
    assert early == {path: path.stat().st_mtime_ns for path in early}, "finished units were done again"
    (run / "database" / "block-00-mlp.partial").write_bytes(b"half a file")
    (run / "search" / "history.jsonl.partial").write_text('{"generat')

    _kill_when(arguments, environment, (run / "search" / "result.json").exists)
    assert not (run / "model").exists()
    (run / ".model.partial").mkdir()
    (run / ".model.partial" / "model.safetensors").write_bytes(b"half a file")

    written = run / ".model.partial" / "config.json"
    _kill_when(arguments, environment, lambda: written.exists() or (run / "model").exists())
    assert not (run / "report.md").exists()

    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert _end(run) == uninterrupted
    _assert_nothing_is_left_over(run)


def _files_that_appear_in(run: Path) -> list[str]:
    """Finished artifacts of a short run in the order in which they appear: cutting the list anywhere is a kill."""
    return sorted(runs.files(run), key=lambda name: (run / name).stat().st_mtime_ns)


@pytest.fixture(scope="module")
def finished(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = runs.short(checkpoints["qwen2"], text, tmp_path_factory.mktemp("finished") / "run")
    compress.run(config)
    return config


@pytest.mark.parametrize(
    "lost",
    [
        "database/block-01-mlp.safetensors",
        "database/database.json",
        "search/history.jsonl",
        "search/sensitivities.json",
        "search/result.json",
        "refit/searched.safetensors",
        "model",
        "model.json",
        "table.json",
        "report.md",
    ],
)
def test_what_is_deleted_from_a_run_is_made_again_alike(lost: str, finished: RunConfig, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    (run / "report.md").unlink()  # so that the run is not finished
    if (run / lost).is_dir():
        shutil.rmtree(run / lost)
    else:
        (run / lost).unlink(missing_ok=True)
    (run / f"{lost}.partial").write_bytes(b"half a file")
    compress.run(replace(finished, out=str(run)))
    assert _end(run) == _end(Path(finished.out))
    assert set(runs.files(run)) == set(runs.files(Path(finished.out)))
    _assert_nothing_is_left_over(run)


def test_a_run_is_finished_only_with_its_report(finished: RunConfig, tmp_path: Path):
    """A kill between table.json and report.md must not leave a run without its report for ever."""
    names = _files_that_appear_in(Path(finished.out))
    assert names[-2:] == ["table.json", "report.md"]


def test_a_kill_before_the_settings_are_written_leaves_a_directory_that_can_be_used(
    finished: RunConfig, tmp_path: Path
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml.partial").write_text("model: ")
    (run / ".lock").touch()
    assert compress.run(replace(finished, out=str(run)), until="database").path == run
    _assert_nothing_is_left_over(run)


def test_a_resumed_run_verifies_an_export_that_was_not_verified(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    (run / "report.md").unlink()
    seen: list[Path] = []
    monkeypatch.setattr(compress, "verify_export", lambda directory, *_: seen.append(directory) or 0.0)
    compress.run(replace(finished, out=str(run), verify=True))
    assert seen == [run / "model"]
