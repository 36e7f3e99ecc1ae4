"""A training between two commands: what may change, what is damaged or lost, and what was refused before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trainings
from darwinlm.commands.run_directory import find_export
from darwinlm.commands.train import train
from darwinlm.config.training import DistillationConfig, StreamConfig, TrainConfig
from darwinlm.training.directory import Training
from darwinlm.types import DarwinError, UsageError


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("whole")
    export = trainings.write_pruned(checkpoints["llama-gqa"], root)
    config = trainings.distilled(export, text, root / "out", checkpoints["llama-gqa"])
    train(config)
    return config


@pytest.fixture
def stopped(whole: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The same, stopped after its eighth step of twelve."""
    shutil.copytree(whole.out, tmp_path / "out")
    for lost in ("model", "checkpoints/checkpoint-12"):
        shutil.rmtree(tmp_path / "out" / lost)
    (tmp_path / "out" / "result.json").unlink()
    return replace(whole, out=str(tmp_path / "out"))


def test_what_needs_less_memory_or_another_disk_may_change(whole: TrainConfig, stopped: TrainConfig, tmp_path: Path):
    thrifty = replace(stopped.training, micro_batch_size=1, gradient_checkpointing=True)
    resumed = train(replace(stopped, training=thrifty, cache=str(tmp_path / "elsewhere")))
    expected = Training(whole.out)
    assert trainings.losses(resumed.history) == pytest.approx(trainings.losses(expected.history), abs=1e-4)
    assert resumed.result["after"] == pytest.approx(expected.result["after"], rel=1e-4)


def test_what_decides_the_result_may_not(stopped: TrainConfig):
    with pytest.raises(UsageError, match=r"its training\.learning_rate is 0\.003, not 0\.1"):
        train(replace(stopped, training=replace(stopped.training, learning_rate=0.1)))


def test_what_was_killed_before_its_first_checkpoint_begins_again(whole: TrainConfig, stopped: TrainConfig):
    """Its log and its half a checkpoint are there; so its settings may still change."""
    (Path(stopped.out) / "checkpoints/checkpoint-8/darwinlm.json").unlink()
    assert (Path(stopped.out) / "log.jsonl").exists()
    found = train(replace(stopped, training=replace(stopped.training, max_gradient_norm=0.5)))
    assert len(trainings.losses(found.history)) == trainings.STEPS
    assert trainings.losses(found.history) != trainings.losses(Training(whole.out).history)


def test_a_copy_of_a_checkpoint_is_passed_over(whole: TrainConfig, stopped: TrainConfig):
    checkpoints = Path(stopped.out) / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-8", checkpoints / "checkpoint-8 copy")
    assert trainings.losses(train(stopped).history) == trainings.losses(Training(whole.out).history)


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(stopped: TrainConfig):
    (Path(stopped.out) / "checkpoints/checkpoint-8/optimizer.pt").unlink()
    with pytest.raises(
        DarwinError, match=r"expected optimizer\.pt in .*checkpoint-8, found none: resume a sharded training with"
    ):
        train(stopped)


def test_a_damaged_optimizer_is_one_sentence(stopped: TrainConfig):
    file = Path(stopped.out) / "checkpoints/checkpoint-8/optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DarwinError, match=r"checkpoint-8 is damaged: expected the optimizer\.pt") as caught:
        train(stopped)
    assert "\n" not in str(caught.value)


def test_a_damaged_model_is_refused_and_trained_to_again(whole: TrainConfig, tmp_path: Path):
    """Wherever it is read; a model that was not sealed is written again."""
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    file = out / "model" / "model.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(DarwinError, match=r"model is damaged: expected the model\.safetensors that the training wrote"):
        find_export(out)
    for left in ("result.json", "model.json"):
        (out / left).unlink()
    train(replace(whole, out=str(out)))
    assert file.read_bytes() == sound
    assert find_export(out) == out / "model"


def test_a_lost_log_costs_no_figures(whole: TrainConfig, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    for lost in ("log.jsonl", "result.json"):
        (out / lost).unlink()
    assert train(replace(whole, out=str(out))).result == Training(whole.out).result


def test_settings_that_would_do_nothing_are_refused(whole: TrainConfig, stopped: TrainConfig, tmp_path: Path):
    short: dict[str, Any] = {"model": whole.model, "data": whole.data, "out": str(tmp_path / "new")}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"distillation": DistillationConfig(temperature=3.0)}, "--distillation: expected --teacher"),
        ({"distillation": DistillationConfig(weight=0.5)}, "--distillation.weight: expected --teacher"),
        ({"distillation": DistillationConfig(top_k=8)}, "--distillation: expected --teacher"),
        ({"tokens": 50 * 128 * 1024}, "--training.warmup-steps: expected fewer than the 50 steps"),
        ({"seed": -1}, "--seed: expected 0 to 4294967295, found -1"),
    )
    for settings, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            TrainConfig(**short | settings)
    with pytest.raises(UsageError, match=r"--stream\.min-score: expected --stream\.score-column with it"):
        StreamConfig(min_score=0.9)
    wide = DistillationConfig(top_k=10**6)
    with pytest.raises(UsageError, match=r"--distillation\.top-k: expected at most .* found 1000000"):
        train(replace(whole, out=str(tmp_path / "wide"), distillation=wide))


def test_one_process_has_nothing_to_shard(
    whole: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Nor does a launcher's precision count: that of the command does."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = train(replace(whole, out=str(tmp_path / "out"), training=replace(whole.training, fsdp=True)))
    assert "--training.fsdp: there is one process" in capsys.readouterr().err
    assert trainings.losses(found.history) == trainings.losses(Training(whole.out).history)
