"""Several processes train as one does: the same sequences make up each step, whoever reads them."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

import runs
import trainings
from darwinlm.commands.train import SHARDS, train
from darwinlm.config.training import TrainConfig
from darwinlm.training.directory import FINISHED, Training
from darwinlm.types import DarwinError
from test_parallel import ENVIRONMENT, launcher, torchrun

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


@pytest.fixture(scope="module")
def sharded(alone: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A training of three processes, which do not divide the vocabulary of 320, killed after its eighth step."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    dense = Path(str(alone.teacher))
    settings = {"fsdp": True, "batch_size": 6, "micro_batch_size": 1}
    tokens = trainings.STEPS * 6 * trainings.LENGTH
    config = trainings.distilled(Path(alone.model), Path(alone.data), out, dense, training=settings, tokens=tokens)
    command = [*launcher(3), "-m", "darwinlm", *runs.command(config, name="train")]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as running:
        while not (out / "checkpoints" / "checkpoint-8" / FINISHED).exists():
            assert running.poll() is None, "it ended too early"
            time.sleep(0.05)
        started = psutil.Process(running.pid)
        for process in [*started.children(recursive=True), started]:  # kill -9, which torchrun cannot pass on
            process.kill()
    return config


@pytest.fixture(scope="module")
def whole(sharded: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The same training in one process, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    config = replace(sharded, out=str(out), training=replace(sharded.training, fsdp=False))
    train(config)
    return config


@pytest.mark.parametrize(("processes", "tolerance"), [(3, 1e-4), (2, 1e-3)])
def test_a_sharded_training_that_was_killed_goes_on(
    processes: int, tolerance: float, sharded: TrainConfig, whole: TrainConfig, tmp_path: Path
) -> None:
    """In as many processes and in others; what ends it is the whole model, as one process trains it."""
    config = replace(sharded, out=str(tmp_path / "out"))
    shutil.copytree(sharded.out, config.out)
    done = torchrun("-m", "darwinlm", *runs.command(config, name="train"), processes=processes)
    assert done.returncode == 0, done.stderr
    assert f"shared by {processes} processes" in done.stderr
    steps = [line["step"] for line in Training(config.out).history if "loss" in line]
    assert steps == list(range(1, trainings.STEPS + 1))
    assert_same_training(whole, config, tolerance)


def test_resumed_or_not_is_the_same_to_the_last_bit(sharded: TrainConfig, tmp_path: Path) -> None:
    out = [tmp_path / "resumed", tmp_path / "at-once"]
    shutil.copytree(sharded.out, out[0])
    for path in out:
        config = replace(sharded, out=str(path))
        done = torchrun("-m", "darwinlm", *runs.command(config, name="train"), processes=3)
        assert done.returncode == 0, done.stderr
    resumed, at_once = (Training(path) for path in out)
    assert trainings.losses(resumed.history) == trainings.losses(at_once.history)
    assert (resumed.exported / "model.safetensors").read_bytes() == (
        at_once.exported / "model.safetensors"
    ).read_bytes()


def test_a_checkpoint_of_another_kind_is_refused(sharded: TrainConfig, tmp_path: Path) -> None:
    config = replace(sharded, out=str(tmp_path / "out"))
    shutil.copytree(sharded.out, config.out)
    with pytest.raises(DarwinError, match=r"expected optimizer\.pt in .*checkpoint-8, found none: resume a sharded"):
        train(config)  # in one process, which has nothing to shard
    shutil.rmtree(Path(config.out) / "checkpoints" / "checkpoint-8" / SHARDS)
    done = torchrun("-m", "darwinlm", *runs.command(config, name="train"), processes=2)
    assert done.returncode == 1
    assert f"darwinlm: --training.fsdp: expected {SHARDS} in" in done.stderr


def test_gradients_of_shards_are_summed_in_float32(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """After every micro-batch, what is kept of gradients is in float32 and sharded, and it sums up to their mean."""
    program = tmp_path / "program.py"
    program.write_text(GRADIENTS)
    done = torchrun(str(program), str(checkpoints["llama-gqa"]), str(tmp_path))
    assert done.returncode == 0, done.stderr
    kept, error = done.stdout.splitlines()
    assert kept == "{(True, torch.float32)}"
    assert float(error) < 1e-5


GRADIENTS = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from darwinlm.training.arguments import SHARDING
from darwinlm.config.training import DistillationConfig
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime import parallel
from darwinlm.training.arguments import arguments_on
from darwinlm.training.trainer import RecoveryTrainer
from torch.distributed.tensor import DTensor

class Text(Dataset):
    ids = torch.randint(320, (128, 16), generator=torch.Generator().manual_seed(0))
    def __len__(self): return 128
    def __getitem__(self, index): return {"input_ids": self.ids[index]}

Accelerator.is_fsdp2 = True  # as on GPUs; on CPUs accelerate forgets it, and then synchronises every batch anyway
kept = set()

def mean_gradient(micro_batches, steps):
    model = Checkpoint(Path(sys.argv[1])).load(torch.float32, torch.device("cpu")).requires_grad_(True).train()
    arguments = arguments_on(
        torch.device("cpu"), output_dir=sys.argv[2], max_steps=steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=micro_batches, max_grad_norm=0.0, use_cpu=True, bf16=True, learning_rate=0.0,
        save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        **SHARDING)
    no_teacher, log = DistillationConfig(weight=0.0), Path(sys.argv[2]) / "log"
    trainer = RecoveryTrainer(model, arguments, Text(), Text(), None, no_teacher, {}, log)
    sums = {}
    step = torch.optim.AdamW.step
    def counted(self, *rest, **others):
        for name, parameter in trainer.model_wrapped.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.full_tensor().double() / steps
        return step(self, *rest, **others)
    torch.optim.AdamW.step = counted
    whole_step = trainer.training_step
    def looked_at(*rest, **others):
        loss = whole_step(*rest, **others)
        gradients = [parameter.grad for parameter in trainer.model_wrapped.parameters()]
        kept.update((isinstance(each, DTensor), getattr(each, "dtype", None)) for each in gradients)
        return loss
    trainer.training_step = looked_at
    trainer.train()
    trainer.close()
    torch.optim.AdamW.step = step
    return sums

with parallel.together():
    found, exact = mean_gradient(64, 1), mean_gradient(1, 64)
    difference = sum(float((found[name] - exact[name]).norm() ** 2) for name in exact) ** 0.5
    size = sum(float(gradient.norm() ** 2) for gradient in exact.values()) ** 0.5
    if parallel.first():
        print(kept)
        print(difference / size)
"""
