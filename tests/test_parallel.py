"""Two real processes under torchrun build the same database as one process, and end together."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

import runs
from darwinlm.commands.run_directory import MARK
from darwinlm.config.run import SearchConfig
from darwinlm.database.store import Database
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime.files import read_json
from darwinlm.types import SelectionStage

pytestmark = pytest.mark.slow  # several processes, each of which imports torch

DIE = """
import os, signal, sys
from darwinlm.database.store import Database
whole = Database.add
def add(self, elimination, *given):
    if elimination.unit.block == 1:
        {how}
    whole(self, elimination, *given)
Database.add = add
from darwinlm.cli import main
raise SystemExit(main())
"""


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launcher(processes: int = 2) -> list[str]:
    """What starts a command in several processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def torchrun(*command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """The command in several processes."""
    started = [*launcher(processes), *command]
    return subprocess.run(started, capture_output=True, text=True, timeout=250, env=ENVIRONMENT, check=False)


def open_database(run: Path, checkpoint: Path) -> Database:
    settings = runs.SHORT.database
    grid = level_grid(Checkpoint(checkpoint).units, settings.levels, settings.granularity)
    return Database(run / "database", grid, read_json(run / "database" / "database.json")["provenance"])


def assert_same_levels(one: Database, two: Database) -> None:
    for index in range(len(one.grid.units)):
        for level in range(1, one.grid.highest(index)):
            alone, shared = one.level(index, level), two.level(index, level)
            assert alone.kept.tolist() == shared.kept.tolist()
            torch.testing.assert_close(alone.weight, shared.weight, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert runs.call(*runs.command(runs.short(checkpoints["llama-gqa"], text, out), name="database")) == 0
    return out


def test_two_processes_keep_what_one_keeps(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, alone: Path
) -> None:
    """Each process calibrates on half of the tokens, and eliminates at least one block."""
    out = tmp_path / "run"
    done = torchrun("-m", "darwinlm", *runs.command(runs.short(checkpoints["llama-gqa"], text, out), name="database"))
    assert done.returncode == 0, done.stderr
    assert_same_levels(open_database(alone, checkpoints["llama-gqa"]), open_database(out, checkpoints["llama-gqa"]))


def test_two_processes_take_the_path_of_one(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, alone: Path
) -> None:
    """Sensitivities and offspring are shared out, untrained and trained; all that follows is the same."""
    stages = (SelectionStage(3, 64), SelectionStage(2, 64, 64), SelectionStage(1, 128, 128))
    search = SearchConfig(generations=2, offspring=5, stages=stages, learning_rate=1e-3)
    for name in ("one", "two"):
        shutil.copytree(alone, tmp_path / name)
        settings = yaml.safe_load((alone / "run.yaml").read_text())
        settings["search"] = json.loads(json.dumps(asdict(search)))
        (tmp_path / name / "run.yaml").write_text(MARK + yaml.safe_dump(settings))
    one, two = (
        runs.command(runs.short(checkpoints["llama-gqa"], text, tmp_path / name, search=search), name="search")
        for name in ("one", "two")
    )
    assert runs.call(*one) == 0
    done = torchrun("-m", "darwinlm", *two)
    assert done.returncode == 0, done.stderr
    assert runs.history(tmp_path / "one") == runs.history(tmp_path / "two")
    assert len(runs.history(tmp_path / "two")) == 3
    for file in ("sensitivities.json", "result.json"):
        assert (tmp_path / "one" / "search" / file).read_text() == (tmp_path / "two" / "search" / file).read_text()
    assert done.stderr.count("search: 2/2") == 1  # only the first speaks


HASHES = """
import os
from pathlib import Path
from darwinlm.model.checkpoint import Checkpoint
hashed = Checkpoint.__dict__["fingerprint"]
compute = hashed.func
def noted(checkpoint):
    Path({place!r}, os.environ["RANK"]).touch()
    return compute(checkpoint)
hashed.func = noted
from darwinlm.cli import main
raise SystemExit(main())
"""


def test_a_checkpoint_is_hashed_by_one_process(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, alone: Path
) -> None:
    out, program, place = tmp_path / "run", tmp_path / "hashing.py", tmp_path / "hashed-by"
    shutil.copytree(alone, out)
    place.mkdir()
    program.write_text(HASHES.format(place=str(place)))
    done = torchrun(str(program), *runs.command(runs.short(checkpoints["llama-gqa"], text, out), name="database"))
    assert done.returncode == 0, done.stderr
    assert [file.name for file in place.iterdir()] == ["0"]


def test_two_machines_that_share_files_take_the_path_of_one(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, alone: Path
) -> None:
    """Two launchers, each with one process of local rank 0: what two machines do, but for the network between them."""
    for name in ("one", "two"):
        shutil.copytree(alone, tmp_path / name)
        settings = tmp_path / name / "run.yaml"
        settings.write_text(settings.read_text().replace("\ndtype: auto\n", "\ndtype: float32\n"))
    one, two = (  # in one precision: which one `auto` finds to be faster depends on what else the machine does
        runs.command(runs.short(checkpoints["llama-gqa"], text, tmp_path / name, dtype="float32"), name="search")
        for name in ("one", "two")
    )
    assert runs.call(*one) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    machines = [
        subprocess.Popen([*launch, "--node-rank", str(rank), "-m", "darwinlm", *two], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=250)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert runs.history(tmp_path / "one") == runs.history(tmp_path / "two")
    assert [error.count("search: 2/2") for error in errors] == [1, 0]  # only the first process speaks


def die(how: str, command: list[str], program: Path) -> str:
    """The error of a run whose second process dies when it would write the first unit of its block."""
    program.write_text(DIE.format(how=how))
    dead = torchrun(str(program), *command)
    assert dead.returncode != 0
    errors = re.findall(r"^darwinlm: .*", dead.stderr, flags=re.MULTILINE)
    assert len(errors) == 1, dead.stderr
    return errors[0]


def test_a_process_that_dies_ends_the_run_with_one_error_and_the_next_run_resumes(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, alone: Path
) -> None:
    out = tmp_path / "run"
    command = runs.command(runs.short(checkpoints["llama-gqa"], text, out), name="database")
    error = die("os.kill(os.getpid(), signal.SIGKILL)", command, tmp_path / "dying.py")
    assert re.search("another process of this run has died .* run the same command again", error)
    assert not list((out / "database").glob("block-01*"))
    finished = torchrun("-m", "darwinlm", *command)
    assert finished.returncode == 0, finished.stderr
    assert_same_levels(open_database(alone, checkpoints["llama-gqa"]), open_database(out, checkpoints["llama-gqa"]))


def test_only_the_process_that_failed_says_why(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    command = runs.command(runs.short(checkpoints["llama-gqa"], text, tmp_path / "run"), name="database")
    error = die("raise OSError(28, 'No space left on device')", command, tmp_path / "dying.py")
    assert re.search("No space left on device; .* run the same command again", error)


def test_arguments_that_cannot_be_used_are_told_once(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = runs.short(checkpoints["llama-gqa"], tmp_path / "missing.txt", tmp_path / "run")
    done = torchrun("-m", "darwinlm", *runs.command(config, name="database"))
    assert done.returncode != 0
    assert len(re.findall(r"^darwinlm: .*", done.stderr, flags=re.MULTILINE)) == 1, done.stderr
    assert not (tmp_path / "run" / "run.yaml").exists()
