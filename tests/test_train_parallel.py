"""Several processes train as one does: the same sequences make up each step, whoever reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

import runs
import trainings
from darwinlm.commands.train import train
from darwinlm.config.training import TrainConfig
from darwinlm.training.directory import Training
from test_parallel import torchrun

pytestmark = pytest.mark.slow  # several processes, each of which imports torch


def assert_same_training(alone: TrainConfig, together: TrainConfig, tolerance: float) -> None:
    one, two = Training(alone.out), Training(together.out)
    assert len(trainings.losses(two.history)) == trainings.STEPS
    for name in ("loss", "kl", "eval_perplexity", "eval_kl"):
        found, expected = ([line[name] for line in each.history if name in line] for each in (two, one))
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), name
    ours, theirs = (load_file(each.exported / "model.safetensors") for each in (two, one))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 0.01, name


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A training of one process."""
    root, dense = tmp_path_factory.mktemp("alone"), checkpoints["llama-gqa"]
    config = trainings.distilled(trainings.write_pruned(dense, root), text, root / "out", dense)
    train(config)
    return config


def _together(config: TrainConfig) -> subprocess.CompletedProcess[str]:
    return torchrun("-m", "darwinlm", *runs.command(config, name="train"))


def test_two_processes_have_the_loss_curve_of_one(alone: TrainConfig, tmp_path: Path) -> None:
    config = trainings.distilled(Path(alone.model), Path(alone.data), tmp_path / "out", Path(str(alone.teacher)))
    done = _together(config)
    assert done.returncode == 0, done.stderr
    assert_same_training(alone, config, 1e-3)
    assert "FSDP2" not in done.stderr


@pytest.mark.slow
def test_blocks_of_any_size_are_sharded(alone: TrainConfig, tmp_path: Path) -> None:
    """FSDP2 wraps each decoder block. What accelerate (1.15) cannot do, resume that on CPU, is refused."""
    out = tmp_path / "out"
    config = trainings.distilled(
        Path(alone.model), Path(alone.data), out, Path(str(alone.teacher)), training={"fsdp": True}
    )
    done = _together(config)
    assert done.returncode == 0, done.stderr
    assert re.search(r"FSDP2: \d+ modules, each decoder block one, shared by 2 processes", done.stderr)
    assert_same_training(alone, config, 1e-3)
    for lost in ("checkpoints/checkpoint-12", "model"):
        shutil.rmtree(out / lost)
    (out / "result.json").unlink()
    done = _together(config)
    assert done.returncode == 1
    assert "darwinlm: --training.fsdp: a sharded training cannot be resumed on CPU" in done.stderr
