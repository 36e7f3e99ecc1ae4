"""What a command leaves where it is stopped or refused, or loses its directory or its reader: nothing in the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runs
from darwinlm.commands import compress
from darwinlm.config.run import RunConfig
from darwinlm.database.calibrate import calibrate
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime.files import write_text
from darwinlm.runtime.locking import locked_directory
from darwinlm.runtime.scratch import scratch_directory, scratch_writing
from darwinlm.types import DarwinError, UsageError
from refusals import refused


@pytest.fixture
def config(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> RunConfig:
    """A run that would work."""
    return runs.short(checkpoints["qwen2"], text, tmp_path / "run")


def test_a_temporary_directory_of_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = (
        "import os, tempfile, sys; tempfile.tempdir = sys.argv[1]\n"
        "from darwinlm.runtime.scratch import scratch_directory\n"
        "with scratch_directory('test') as d: (d / 'x').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    (tmp_path / "darwinlm-mine").mkdir()  # without a lock it is not ours to remove
    assert len(list(tmp_path.glob("darwinlm-test-*/x"))) == 1
    with scratch_directory("one") as one, scratch_directory("two") as two:
        assert {path.name for path in tmp_path.iterdir()} == {"darwinlm-mine", one.name, two.name}
    assert [path.name for path in tmp_path.iterdir()] == ["darwinlm-mine"]


def test_no_place_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DarwinError, match=r"no temporary directory can be made .* set TMPDIR"), scratch_directory("x"):
        pass


def test_a_full_temporary_directory_is_named(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever writes to it: activations, the states of candidates in training, a file that some library makes."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=False).returncode:
        pytest.skip("only root may mount a small file system")
    checkpoint = Checkpoint(checkpoints["qwen2"])
    checkpoint.skeleton()  # the process keeps the code of pruned models in a temporary directory of its own
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    ids = torch.zeros(64, 32, dtype=torch.int64)
    named = rf"the temporary directory {small} is full; free some of it, or set TMPDIR"
    try:
        with pytest.raises(DarwinError, match=named):
            list(calibrate(checkpoint, ids, batch_size=4, device=torch.device("cpu"), spill_bytes=0))
        with pytest.raises(DarwinError, match=named), scratch_writing(), tempfile.TemporaryFile(buffering=0) as file:
            torch.save(torch.zeros(1 << 20), file)
        with pytest.raises(DarwinError, match=named), scratch_directory("test") as directory:
            (directory / "large").write_bytes(bytes(1 << 20))
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)  # pytest keeps a frame with an open file


def test_a_refused_command_leaves_a_foreign_directory_as_it_was(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(config.out)
    out.mkdir()
    (out / "letter").write_text("dear")
    refused(config, capsys, 2, "holds no run")
    assert [path.name for path in out.iterdir()] == ["letter"]
    deep = replace(config, out=str(out.parent / "a" / "b" / "c"), data="nowhere.txt")
    refused(deep, capsys, 2, "no text at")
    assert not (out.parent / "a").exists()


def test_a_directory_that_is_removed_meanwhile_is_not_made_anew(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked_directory(out):
        write_text(out / "database" / "one", "1")
        shutil.rmtree(out)
        with pytest.raises(DarwinError, match="was removed while this command worked in it"):
            write_text(out / "database" / "two", "2")
    assert not out.exists()


@pytest.mark.parametrize("name", ["run-\udcff"])
def test_names_that_are_no_text_are_refused_before_anything_is_written(
    name: str, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert runs.call("compress", config.model, "--data", config.data, "--out", str(tmp_path / name)) == 2
    assert "expected arguments in UTF-8" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--out: expected a name in UTF-8"):
        replace(config, out=str(tmp_path / name))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_termination_acts_like_an_interruption(config: RunConfig) -> None:
    arguments, environment = runs.process(*runs.command(replace(config, verify=False)))
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    while not (Path(config.out) / "run.yaml").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "darwinlm: interrupted; the same command goes on from here"
    assert not list(Path(config.out).rglob("*.partial"))
    compress.run(config)


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_without_a_word(config: RunConfig) -> None:
    compress.run(config)  # finished: the command says so on stderr, and plan on stdout
    arguments, environment = runs.process("plan", config.model)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(arguments, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr
