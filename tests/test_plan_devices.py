"""Plans for GPUs: what a table says of them, what one of them was measured to take, and what does not fit."""

from __future__ import annotations

import math
import socket
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import LlamaConfig

from darwinlm.cli import main
from darwinlm.commands.plan.devices import Machine, gpus, machine_of, table
from darwinlm.commands.plan.fits import first_misfit, summary
from darwinlm.commands.plan.shapes import shape_of, shapes
from darwinlm.commands.plan.stages import Pruning, Stage, stages_of
from darwinlm.commands.plan.work import plan
from darwinlm.config.files import read_settings
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, EvaluationConfig, RefitConfig, SearchConfig
from darwinlm.config.training import GradualConfig, GradualStage, TrainingConfig
from darwinlm.search.memory import allowance, count_memory
from darwinlm.types import SelectionStage, UsageError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

plans: Any = import_module("plans")  # a benchmark

GIB = 2**30
RECIPE = GradualConfig("M", "D", "O", stages=(GradualStage(5.0, 0),))


def shape(name: str) -> Any:
    config = shape_of(name)
    assert config is not None
    return config


def planned(name: str, machine: Machine, config: GradualConfig = RECIPE) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages_of(shape(name), config, machine)}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-3.2-1B", 1.24),
        ("meta-llama/Llama-2-7b-hf", 6.74),
        ("llama-3.1-8b", 8.03),
        ("Qwen2.5-14B-Instruct", 14.77),
        ("qwen/qwen2.5-32b-instruct", 32.76),
        ("Llama-3.1-70B", 70.55),
    ],
)
def test_known_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    machine = gpus("h100", 1)
    found = plan(shape(name), CalibrationConfig(), DatabaseConfig(), 5.0, machine.rates)
    assert round(found.parameters / 1e9, 2) == billions


def test_every_known_shape_and_device_can_be_planned_for() -> None:
    for device in table()["devices"]:
        for name in shapes():
            stages = stages_of(shape(name), replace(RECIPE, stages=(GradualStage(5.0, 10**9),)), gpus(device, 2))
            assert all(math.isfinite(stage.seconds) and stage.seconds > 0 for stage in stages)
            assert [stage.kind for stage in stages][::4] == ["calibration", "refit"]
            assert stages[-1].kind == "training"


def test_a_plan_of_a_known_shape_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["plan", "meta-llama/Llama-3.1-8B", "--device", "h100:8"]) == 0
    printed = capsys.readouterr().out
    assert "estimates for 8 x h100, by counting" in printed
    assert "the first stage that does not fit is training" in printed
    assert printed.rstrip().endswith("take --training.fsdp true")


@pytest.mark.parametrize("device", ["h1000", "h100:0", "h100:", "H100 8", "cuda"])
def test_an_unknown_device_is_refused_with_those_that_are_known(device: str) -> None:
    with pytest.raises(UsageError, match=r"--device: expected cpu or one of a10g, .*h100:8"):
        machine_of(device, LlamaConfig(), "float32")


def on_the_h100(blocks: int, levels: int, tokens: int) -> dict[str, Stage]:
    """What benchmarks/gpu_run.py does, planned: benchmarks/RESULTS.md says what it took."""
    config, length = shape("llama-3.1-8b"), 2048
    config.num_hidden_layers = blocks
    stages = SelectionStage(4, 2 * length), SelectionStage(2, 4 * length, 2 * length)
    recipe = GradualConfig(
        "M",
        "D",
        "O",
        stages=(GradualStage(0.37 * levels, 0),),
        calibration=CalibrationConfig(tokens=tokens, sequence_length=length, batch_size=4, dtype="bfloat16"),
        database=DatabaseConfig(levels=levels),
        search=SearchConfig(generations=2, offspring=8, stages=(*stages, SelectionStage(1, 8 * length, 4 * length))),
        refit=RefitConfig(tokens=16 * length),
        evaluation=EvaluationConfig(tokens=8 * length, speed_tokens=length // 2, decode_tokens=8),
    )
    return {stage.name: stage for stage in stages_of(config, recipe, gpus("h100", 1, torch.bfloat16))}


@pytest.mark.parametrize(("run", "seconds", "gibibytes"), [((32, 4, 32_768), 264.3, 6.1), ((4, 8, 131_072), 32.9, 6.9)])
def test_the_database_of_the_measured_gpu_takes_what_is_planned(
    run: tuple[int, int, int], seconds: float, gibibytes: float
) -> None:
    found = on_the_h100(*run)
    assert found["calibration"].seconds + found["elimination"].seconds == pytest.approx(seconds, rel=0.2)
    assert max(found[name].device for name in ("calibration", "elimination")) * 0.92 == pytest.approx(
        gibibytes * GIB, rel=0.15
    )


def test_the_search_of_the_measured_gpu_takes_what_is_planned() -> None:
    found = on_the_h100(4, 8, 131_072)
    assert found["start of the search"].seconds + found["search"].seconds == pytest.approx(11.1, rel=0.2)


@pytest.mark.parametrize("name", plans.MODELS)
@pytest.mark.parametrize("device", ["rtx4090", "l40s", "h100"])
def test_what_is_said_not_to_fit_is_refused_by_the_search(name: str, device: str) -> None:
    """A search or a refit fits by the plan if and only if `allowance`, which a run asks, does not refuse it."""
    machine, model = gpus(device, 1), shape(name)
    for config in (RECIPE, plans.with_training(RECIPE)):
        found = {stage.kind: stage for stage in stages_of(model, config, machine)}
        this = Pruning.of(model, config, config.stages[0], machine)
        sizes, length = (this.at.parameters, model, this.at.grid, this.at.uniform), 512
        for kind, refit in (("search", RefitConfig(tokens=0)), ("refit", config.refit)):
            counted = count_memory(*sizes, config.search, refit, length, torch.bfloat16)
            if kind == "search":
                fits = found["search"].device <= machine.limit
            else:
                fits = max(found[kind].device for kind in ("search", "refit")) <= machine.limit
            try:
                allowance(counted, machine.limit)
            except UsageError:
                assert not fits, f"{kind} of {name} is refused on {device}"
            else:
                assert fits, f"{kind} of {name} is not refused on {device}"


def test_the_settings_that_are_named_make_the_stage_fit() -> None:
    machine, model = gpus("rtx4090", 1), shape("Qwen2.5-14B-Instruct")
    config = plans.with_training(RECIPE)
    misfit = first_misfit(model, config, machine, stages_of(model, config, machine))
    assert misfit is not None
    assert misfit.stage.kind == "search"
    assert misfit.settings == ("--search.stages without training_tokens",)
    without = first_misfit(model, RECIPE, machine, stages_of(model, RECIPE, machine))
    assert without is None or without.stage.kind != "search"


def test_what_nothing_makes_fit_is_said_so() -> None:
    machine, model = gpus("rtx4090", 1), shape("Llama-3.1-70B")
    misfit = first_misfit(model, RECIPE, machine, stages_of(model, RECIPE, machine))
    told = summary(misfit, machine)
    assert "does not fit is elimination" in told
    assert told.endswith("take a device with more memory, or more of them")


def test_eight_devices_share_work_and_a_sharded_training() -> None:
    training = TrainingConfig(fsdp=True, gradient_checkpointing=True)
    config = replace(RECIPE, stages=(GradualStage(5.0, 10**9),), training=training)
    one, eight = (planned("llama-3.1-8b", gpus("h100", count), config) for count in (1, 8))
    assert one["training"].seconds / eight["training"].seconds == pytest.approx(8)
    assert one["training"].device > 2.5 * eight["training"].device
    for name in ("calibration", "elimination", "search"):
        assert eight[name].seconds < one[name].seconds
        assert eight[name].device <= one[name].device
    assert eight["search"].host > 7 * one["search"].host  # each process has a model of its own


def test_blocks_that_wait_on_the_host_cost_its_memory_and_its_link() -> None:
    near, far = (planned("Qwen2.5-14B-Instruct", gpus(device, 1)) for device in ("l40s", "rtx4090"))
    assert far["search"].note.endswith("blocks in host memory")
    assert far["search"].device < near["search"].device / 4
    assert far["search"].host >= 2 * 14.7e9
    # 40 generations of four stages send 13.1 B weights of 2 bytes at 25.6 GB/s at least once each.
    assert far["search"].seconds >= 40 * 4 * 2 * 13.1e9 / 25.6e9


def test_the_documentation_has_what_is_counted() -> None:
    _, written, _ = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8").split(plans.MARK)
    assert written == plans.page(), "python benchmarks/plans.py --write brings docs/gpus.md up to date"


@pytest.mark.parametrize("recipe", plans.OF_RECIPES)
def test_the_papers_recipes_fit_eight_gpus_of_80_gb(recipe: str) -> None:
    config = read_settings(plans.RECIPES / f"{recipe}.yaml", GradualConfig)
    model, machine = shape(plans.OF_RECIPES[recipe]), gpus("h100", 8, torch.bfloat16)
    for stage in config.stages:
        at = replace(config, stages=(stage,))
        assert first_misfit(model, at, machine, stages_of(model, at, machine)) is None
