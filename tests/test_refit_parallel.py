"""Several processes refit as one does: they share the sequences of every step, and take the same step."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runs
from darwinlm.config.run import RefitConfig, RunConfig
from darwinlm.runtime.files import read_tensors
from test_parallel import torchrun

pytestmark = pytest.mark.slow  # several processes, each of which imports torch

LENGTH = 32
REFIT = RefitConfig(tokens=10 * LENGTH, learning_rate=1e-3, batch_size=4)  # the last step has two sequences

BEGIN = """
import sys, os, signal
from darwinlm.runtime import parallel
from darwinlm.training import refit as module
step, module.SAVE_SECONDS = module._Learner.step, 0.0
def counted(self, *given):
    counted.steps += 1
    if counted.steps == 3 and parallel.rank() == parallel.processes() - 1:
        {how}
    return step(self, *given)
counted.steps = 0
module._Learner.step = counted
from darwinlm.cli import main
raise SystemExit(main())
"""


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    config = runs.short(checkpoints["llama-gqa"], text, out, refit=REFIT, dtype="float32")
    assert runs.call(*runs.command(config, name="compress")) == 0
    return config


def searched(config: RunConfig, out: Path) -> RunConfig:
    """The same run in another directory, where its search has ended."""
    here = replace(config, out=str(out))
    with_search = runs.command(here, name="search")
    assert runs.call(*with_search) == 0
    return here


def weights(config: RunConfig, name: str) -> dict[str, torch.Tensor]:
    return read_tensors(Path(config.out) / "refit" / f"{name}.safetensors")[1]


def assert_same_weights(one: RunConfig, two: RunConfig) -> None:
    for name in ("searched", "uniform"):
        ours, theirs = weights(one, name), weights(two, name)
        assert ours.keys() == theirs.keys()
        for path, weight in theirs.items():
            torch.testing.assert_close(ours[path], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_steps_of_one(alone: RunConfig, tmp_path: Path, processes: int) -> None:
    config = searched(alone, tmp_path / "run")
    done = torchrun("-m", "darwinlm", *runs.command(config), processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same_weights(config, alone)
    assert (tmp_path / "run" / "report.md").exists()


def die(config: RunConfig, how: str, program: Path) -> str:
    """The error of a run of two processes, of which the second dies at the third step of its refit."""
    program.write_text(BEGIN.format(how=how))
    dead = torchrun(str(program), *runs.command(config))
    assert dead.returncode != 0
    errors = re.findall(r"^darwinlm: .*", dead.stderr, flags=re.MULTILINE)
    assert len(errors) == 1, dead.stderr
    return errors[0]


def test_a_process_that_dies_ends_the_refit_with_one_error_and_the_next_run_resumes(
    alone: RunConfig, tmp_path: Path
) -> None:
    """In another number of processes, from the steps that all had taken."""
    config = searched(alone, tmp_path / "run")
    error = die(config, "os.kill(os.getpid(), signal.SIGKILL)", tmp_path / "dying.py")
    assert re.search("another process of this run has died .* run the same command again", error)
    record, tensors = read_tensors(tmp_path / "run" / "refit" / "searched.safetensors")
    assert record["steps"] == 2
    assert any(name.startswith("exp_avg.") for name in tensors)
    assert runs.call(*runs.command(config)) == 0
    assert_same_weights(config, alone)


def test_only_the_process_that_failed_says_why(alone: RunConfig, tmp_path: Path) -> None:
    config = searched(alone, tmp_path / "run")
    error = die(config, "raise OSError(28, 'No space left on device')", tmp_path / "dying.py")
    assert re.search("No space left on device; .* run the same command again", error)


def test_a_refit_that_diverges_is_told_once(alone: RunConfig, tmp_path: Path) -> None:
    """Also where one process alone finds it."""
    config = searched(alone, tmp_path / "run")
    error = die(config, "module._accumulate = lambda *_: float('nan')", tmp_path / "diverging.py")
    assert re.search(r"the refit diverged at step 3: lower --refit.learning-rate", error)
