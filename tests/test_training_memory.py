"""What a training holds: the count, the simulated accelerator's bytes, and torch's account of one rank of eight."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import trainings
from accelerator import MEMORY, NAME, accelerator
from darwinlm.commands.train import train
from darwinlm.config.run import DatabaseConfig
from darwinlm.config.training import DistillationConfig, TrainConfig, TrainingConfig
from darwinlm.data.stream import draw_held_out
from darwinlm.losses.logits import hidden_states
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_grid
from darwinlm.model.size import parameter_count
from darwinlm.search.costs import parameter_costs
from darwinlm.search.uniform import uniform_genome
from darwinlm.training import trainer as module
from darwinlm.training.memory import TrainedModel, TrainingMemory, count_training
from test_memory import SCALED, scaled
from test_plan import planned, qwen_2_5_14b

__all__ = ["scaled"]  # a fixture

LENGTH = 64


def sizes(checkpoint: Checkpoint) -> TrainedModel:
    """Those of the dense model."""
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, DatabaseConfig(levels=8))
    return TrainedModel.of(parameter_count(checkpoint.skeleton()), checkpoint.config, grid, grid.dense())


def settings(model: Path, text: Path, out: Path, length: int, weight: float | None, **training: Any) -> TrainConfig:
    few = {
        "batch_size": 4, "micro_batch_size": 2, "dtype": "bfloat16", "evaluate_every": 100, "save_every": 100,
        "warmup_steps": 0, "log_every": 100, "evaluation_tokens": 2 * length,
    }  # fmt: skip
    common = {"training": few | training, "stream": {"sequence_length": length}, "tokens": 3 * 4 * length}
    config = trainings.short(model, text, out, device=NAME, **common)
    if weight is None:
        return config
    return replace(config, teacher=str(model), distillation=DistillationConfig(weight=weight))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most bytes that each micro-batch of a training from now on holds."""
    most, whole = [], module.RecoveryTrainer.training_step

    def step(self: Any, *given: Any, **named: Any) -> Any:
        MEMORY.begin()
        loss = whole(self, *given, **named)
        most.append(MEMORY.most)
        return loss

    monkeypatch.setattr(module.RecoveryTrainer, "training_step", step)
    return most


def most_held(config: TrainConfig, held: list[int]) -> int:
    held.clear()
    gc.collect()
    MEMORY.begin()
    before = MEMORY.most
    with accelerator():
        train(config)
    return max(held) - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "weight", "changes"),
    [
        pytest.param(LENGTH, None, {}, marks=pytest.mark.long),
        (2 * LENGTH, None, {"gradient_checkpointing": True}),
        pytest.param(LENGTH, 1.0, {"gradient_checkpointing": True}, marks=pytest.mark.long),
        (LENGTH, None, {"lora_rank": 4}),
    ],
)
def test_a_training_holds_what_is_counted(
    length: int, weight: float | None, changes: Any, scaled: Path, text: Path, tmp_path: Path, held: list[int]
) -> None:
    config = settings(scaled, text, tmp_path / "out", length, weight, **changes)
    found = most_held(config, held)
    model = sizes(Checkpoint(scaled))
    teacher = 0 if weight is None else model.parameters
    distillation = replace(config.distillation, weight=weight or 0.0)
    counted = count_training(model, config.training, distillation, length, torch.bfloat16, 1, teacher)
    assert found == pytest.approx(counted.most, rel=0.15)


@pytest.mark.slow
def test_a_teacher_that_only_judges_is_not_on_the_device(
    scaled: Path, text: Path, tmp_path: Path, held: list[int]
) -> None:
    """And judges as a whole one does."""
    alone = most_held(settings(scaled, text, tmp_path / "alone", LENGTH, None), held)
    config = settings(scaled, text, tmp_path / "judged", LENGTH, 0.0)
    assert most_held(config, held) < alone + parameter_count(Checkpoint(scaled).skeleton()) / 10
    with accelerator():
        trained = train(config)  # which is finished
    kl = trained.result["after"]["kl"]
    models: list[Any] = [
        Checkpoint(path).load(torch.float32, torch.device("cpu")) for path in (scaled, trained.exported)
    ]
    cache = Path(config.out) / "cache"
    drawn = draw_held_out(config.data, 2, Checkpoint(scaled).tokenizer, config.stream, cache)
    with torch.no_grad():
        logs = [
            torch.cat([model.lm_head(hidden_states(model, drawn[i]["input_ids"][None]))[0, :-1] for i in range(2)])
            .log_softmax(-1)
            for model in models
        ]  # fmt: skip
    plain = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert kl == pytest.approx(plain.item(), rel=0.05)  # bfloat16


RANK = """
import os, sys, json
from pathlib import Path
import torch
from torch import distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import Dataset

checkpoint, out, length, checkpointing, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1", 8
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}
os.environ["MASTER_PORT"] = "1"  # nobody connects
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)

from darwinlm.config.training import DistillationConfig, StreamConfig, TrainConfig, TrainingConfig
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.training.arguments import training_arguments
from darwinlm.training.sharding import load_sharded
from darwinlm.training.trainer import RecoveryTrainer

class Text(Dataset):
    ids = torch.randint(4, 2000, (64, length), generator=torch.Generator().manual_seed(0))
    def __len__(self): return 64
    def __getitem__(self, index): return {"input_ids": self.ids[index]}

cpu, low = torch.device("cpu"), torch.bfloat16
training = TrainingConfig(batch_size=2 * world, fsdp=True, gradient_checkpointing=checkpointing, warmup_steps=0)
config = TrainConfig("M", "D", "O", 2 * 2 * world * length, training=training, stream=StreamConfig(length))
model = load_sharded(Checkpoint(Path(checkpoint)), cpu, low)
blocks = sum(weight.to_local().nbytes for weight in model.model.layers.parameters())
arguments = training_arguments(config, cpu, low, out, resumed=True)
arguments.save_strategy = "no"
no_teacher = DistillationConfig(weight=0.0)
trainer = RecoveryTrainer(model, arguments, Text(), Text(), None, no_teacher, {}, out / "log")
trainer.evaluate = lambda *_, **__: {}
tracker, whole, most = MemTracker(), trainer.training_step, []
tracker.track_external(model)
def step(*given, **named):
    tracker.reset_mod_stats()
    loss = whole(*given, **named)
    most.append(max(held["Total"] for held in tracker.get_tracker_snapshot("peak").values()))
    return loss
trainer.training_step = step
with tracker:
    trainer.train()
print(json.dumps({"most": max(most), "blocks": blocks}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("length", "checkpointing"), [(64, True), (256, False)])
def test_a_rank_of_eight_holds_what_is_counted(length: int, checkpointing: bool, scaled: Path, tmp_path: Path) -> None:
    """Of the blocks an eighth, from the checkpoint; torch counts what one of eight processes holds in a step."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [
        sys.executable,
        str(tmp_path / "rank.py"),
        str(scaled),
        str(tmp_path),
        str(length),
        str(int(checkpointing)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found, model = json.loads(done.stdout.splitlines()[-1]), sizes(Checkpoint(scaled))
    assert found["blocks"] == pytest.approx(4 * SCALED.num_hidden_layers * model.block / 8, rel=0.01)
    training = TrainingConfig(fsdp=True, gradient_checkpointing=checkpointing)
    counted = count_training(model, training, DistillationConfig(weight=0.0), length, torch.bfloat16, 8)
    assert found["most"] == pytest.approx(counted.most, rel=0.15)


def of_14b(weight: float, processes: int) -> TrainingMemory:
    config = qwen_2_5_14b()
    at = planned(config)
    model = TrainedModel.of(parameter_costs(at.grid, at.parameters).of(at.uniform), config, at.grid, at.uniform)
    training = TrainingConfig(fsdp=True, gradient_checkpointing=True)
    return count_training(
        model, training, DistillationConfig(weight=weight), 8192, torch.bfloat16, processes, at.parameters
    )


def test_the_training_of_a_14b_model_fits_eight_gpus_of_80_gb() -> None:
    """At level 5 of 10, by hand: 16 bytes of each weight shared by eight, and the dense model where it teaches."""
    judged, taught = of_14b(0.0, 8), of_14b(1.0, 8)
    weights = judged.weights * 8 // 4
    assert 7.5e9 < weights < 9e9
    assert judged.state + judged.gradients == pytest.approx(16 * weights / 8, rel=1e-6)
    assert taught.most - judged.most == taught.teacher == pytest.approx(2 * 14.77e9, rel=0.01)
    assert judged.most < taught.most < 0.92 * (78 << 30)
    assert of_14b(0.0, 1).most > 80e9


def test_a_genome_has_the_sizes_that_are_counted() -> None:
    """At level 5 of 10 half of what every unit's consumer reads."""
    config = qwen_2_5_14b()
    at = planned(config)
    genome = uniform_genome(at.grid, 5.0, 10, Random(0))
    model = TrainedModel.of(1, config, at.grid, genome)
    dense = TrainedModel.of(1, config, at.grid, at.grid.dense())
    assert sum(model.inputs) == pytest.approx(sum(dense.inputs) / 2, rel=0.05)
    assert dense.block == sum(unit.parameters(0) for unit in at.grid.units if unit.block == 0)
