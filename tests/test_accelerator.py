"""Every stage on a device of its own: the simulated one, or a GPU with DARWINLM_TEST_DEVICE=cuda (`make gpu`).

On it, a tensor that was left on the CPU is an error, and every wait of the host for the device is counted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import runs
import tiny
import trainings
from accelerator import DEVICE, DeviceMismatchError, accelerator
from darwinlm.commands.compare import compare
from darwinlm.commands.compress import run
from darwinlm.commands.evaluate import evaluate
from darwinlm.commands.run_directory import Run
from darwinlm.commands.train import train
from darwinlm.config.evaluation import CompareConfig, EvaluateConfig, SpeedConfig
from darwinlm.config.run import DatabaseConfig, RunConfig, SearchConfig, Stage
from darwinlm.database.calibrate import calibrate
from darwinlm.database.cholesky import dampen
from darwinlm.database.eliminate import QUEUE, eliminate, solve_levels
from darwinlm.database.stitch import Stitcher
from darwinlm.model.blocks import Arguments
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.family import Family
from darwinlm.rivals.methods import METHODS
from darwinlm.search.fitness import Fitness
from darwinlm.types import Genome, MetricName, SelectionStage, Structure
from pruned import prune, token_ids
from test_eliminate import make_problem, make_unit

STRUCTURES: list[tuple[str, Structure]] = [
    ("llama-mha", "head"),
    ("llama-gqa", "kv_group"),
    ("llama-gqa", "head"),
    ("qwen2", "balanced"),
]


def test_a_tensor_that_was_left_on_the_cpu_is_an_error() -> None:
    with accelerator():
        there = torch.ones(3, device=DEVICE)
        with pytest.raises((DeviceMismatchError, RuntimeError)):
            _ = there + torch.ones(3)


def test_waits_are_counted() -> None:
    with accelerator() as waits:
        values = torch.ones(3, device=DEVICE)
        _ = values.sum() + values
        assert sum(waits.values()) == 0
        assert float(values.sum()) == 3
        assert sum(waits.values()) == 1


@pytest.mark.parametrize(("width", "readers"), [(1, 1), (8, 1), (8, 4)])
def test_a_removal_is_one_wait_and_the_structures_are_those_of_the_cpu(width: int, readers: int) -> None:
    structures = 320 if width == 1 else 16
    unit = replace(make_unit(structures, width), readers=readers, in_turns=readers > 1)
    weight, _, hessian = make_problem(48, structures * width, 4 * structures * width, dtype=torch.float32)
    hessian = dampen(hessian)
    on_cpu = eliminate(unit, weight, hessian)
    with accelerator() as waits:
        there = weight.to(DEVICE), hessian.to(DEVICE)
        before = sum(waits.values())
        found = eliminate(unit, *there)
        waited = sum(waits.values()) - before
        levels = solve_levels(unit, *there, found, [0, structures // 2])
    assert found.order.tolist() == on_cpu.order.tolist()
    torch.testing.assert_close(found.errors.cpu(), on_cpu.errors, rtol=1e-4, atol=1e-4)
    (expected,) = solve_levels(unit, weight, hessian, on_cpu, [0, structures // 2])
    torch.testing.assert_close(levels[0].weight.cpu(), expected.weight, rtol=1e-3, atol=1e-4)
    queues = structures // QUEUE if width == 1 else 0
    of_a_group = 2 * structures if readers > 1 else 0  # which of its structures must wait
    assert structures <= waited <= structures + 12 + 8 * queues + of_a_group


def test_a_device_with_a_worse_cholesky_keeps_what_a_cpu_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSOLVER's float32 factor of 4,096 channels was off by 9e-6, LAPACK's by 2e-6: other channels were kept."""
    exact, noise = torch.linalg.cholesky_ex, torch.randn(512, 512, generator=torch.Generator().manual_seed(0))

    def worse(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, failed = exact(matrix)
        if matrix.dtype == torch.float32:
            factor = factor * (1 + 1e-3 * noise[: len(factor), : len(factor)].to(factor.device))
        return factor, failed

    unit = make_unit(512, 1)
    weight, _, hessian = make_problem(48, 512, 300, dtype=torch.float32)
    hessian = dampen(hessian)
    on_cpu = eliminate(unit, weight, hessian).order.tolist()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", worse)
    disturbed = eliminate(unit, weight, hessian).order.tolist()
    with accelerator():
        there = eliminate(unit, weight.to(DEVICE), hessian.to(DEVICE)).order.tolist()
    counts = range(51, 512, 51)
    assert any(set(disturbed[gone:]) != set(on_cpu[gone:]) for gone in counts)
    assert all(set(there[gone:]) == set(on_cpu[gone:]) for gone in counts)


@pytest.mark.slow
def test_what_float32_removes_is_as_good_as_what_float64_removes() -> None:
    """Sets may differ where scores hardly do. Fewer tokens than channels make the Hessian ill-conditioned."""
    structures = 2048
    unit = make_unit(structures, 1)
    weight, _, hessian = make_problem(256, structures, 1024, dtype=torch.float32)
    hessian = dampen(hessian)
    W, P = weight.double(), torch.linalg.inv(hessian.double())

    def error(gone: torch.Tensor) -> float:
        return float((W[:, gone] @ torch.linalg.inv(P[gone][:, gone]) * W[:, gone]).sum())

    exact = eliminate(unit, weight.double(), hessian.double()).order
    with accelerator():
        order = eliminate(unit, weight.to(DEVICE), hessian.to(DEVICE)).order
    for count in range(structures // 10, structures, structures // 10):
        assert error(order[:count]) <= 1.01 * error(exact[:count])
    assert error(torch.arange(structures // 2)) > 1.5 * error(exact[: structures // 2])


def test_buffers_in_front_of_the_blocks_are_on_the_device(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frequencies of rotary angles among them: in transformers before 5.2x, Cohere 2 uses them where they are."""
    models = []

    class Noted(Arguments):
        def __init__(self, model: PreTrainedModel, family: Family):
            models.append(model)
            super().__init__(model, family)

    monkeypatch.setattr("darwinlm.database.calibrate.Arguments", Noted)
    checkpoint = Checkpoint(checkpoints["cohere2"])
    with accelerator():
        list(calibrate(checkpoint, token_ids(0, 4), batch_size=2, device=torch.device(DEVICE)))
        (model,) = models
        inside = set(model.get_submodule(checkpoint.family.blocks).modules())
        outside = [module for module in model.modules() if module not in inside]
        buffers = [buffer for module in outside for buffer in module.buffers(recurse=False)]
        assert {buffer.device.type for buffer in buffers} == {torch.device(DEVICE).type}


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_a_scored_batch_is_one_wait(metric: MetricName, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """For the scores of all candidates; once, transformers looks whether a batch's sequences hold several texts."""
    case = prune(checkpoints["llama-gqa"], tmp_path / "database")
    text = torch.randint(0, tiny.VOCAB, (16, 32), generator=torch.Generator().manual_seed(0))
    grid = case.database.grid
    genomes = [Genome(tuple(min(level, grid.highest(i)) for i in range(len(grid.units)))) for level in (1, 2, 3)]
    with accelerator() as waits:
        dense = case.checkpoint.load(torch.float32, torch.device(DEVICE))
        stitcher = Stitcher(dense, case.checkpoint.family, case.database)
        stages = tuple(SelectionStage(9 - batches, batches * 64) for batches in range(1, 9))  # a batch more in each
        config = SearchConfig(stages=stages, metric=metric)
        fitness = Fitness(stitcher, text, text, config)
        fitness.scores(genomes[:1], stages[-1])  # the dense model's distributions are kept from here on
        for genome in genomes[1:]:
            stitcher.stitch(genome)
        before = waits.copy()
        fitness.scores(genomes[1:], stages[-1])
        waits.subtract(before)
    assert sum(waits.values()) == 8, waits


def on_both(config: RunConfig, tmp_path: Path, until: Stage = "report") -> tuple[Path, Path]:
    """The directories of a run on the CPU and of the same on the device."""
    directories = tmp_path / "on-cpu", tmp_path / "on-device"
    run(replace(config, out=str(directories[0]), device="cpu"), until=until)
    with accelerator():
        run(replace(config, out=str(directories[1]), device=DEVICE), until=until)
    return directories


@pytest.mark.slow
@pytest.mark.parametrize(("family", "structure"), STRUCTURES)
def test_every_command_runs_on_the_device(
    family: str, structure: Structure, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    dense = checkpoints[family]
    search = replace(runs.SHORT.search, start="sensitivity")
    database = DatabaseConfig(levels=4, granularity=8, structure=structure)
    config = runs.short(dense, text, tmp_path, dtype="float32", search=search, database=database)
    directories = on_both(config, tmp_path)
    on_cpu, there = ([row["kl"] for row in Run(directory).table] for directory in directories)
    assert there == pytest.approx(on_cpu, abs=1e-3)
    if structure != "kv_group":  # training and evaluation do not ask how attention was cut
        return
    training = trainings.distilled(directories[1], text, tmp_path / "trained", dense, device=DEVICE)
    with accelerator():
        train(training)
        evaluate(
            EvaluateConfig(
                str(tmp_path / "trained"),
                data=str(text),
                against=str(dense),
                generation=True,
                tokens=256,
                window=64,
                continuation_tokens=4,
                device=DEVICE,
            ),
            SpeedConfig(prompt_tokens=16, new_tokens=4, repeats=1),
            speed=True,
        )


@pytest.mark.slow
def test_every_method_is_compared_on_the_device(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    config = CompareConfig(
        str(checkpoints["llama-gqa"]),
        str(text),
        str(tmp_path / "out"),
        tuple(METHODS),
        ("params=0.8",),
        device=DEVICE,
        dtype="float32",
        calibration=runs.SHORT.calibration,
        database=DatabaseConfig(levels=8, granularity=4),
        search=replace(runs.SHORT.search, mask_tokens=256),
        evaluation=runs.SHORT.evaluation,
    )
    with accelerator():
        cells = compare(config)
    assert {cell.method for cell in cells if cell.refused is None} >= {"evolution"}
    assert not [cell for cell in cells if cell.refused and "expected all tensors on" in cell.refused]


# Those in whose blocks the most differs; the others are for `make long`, and for a GPU.
DIFFERENT = (
    "llama-gqa", "gemma2", "phi3", "olmo2", "gpt2-mha", "falcon-mqa", "bloom-mha", "mpt-mha", "opt-mha",
    "qwen3_5-hybrid", "lfm2-hybrid", "falcon_h1-hybrid",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in DIFFERENT else pytest.mark.long) for name in tiny.CONFIGS]
)
def test_every_family_is_searched_on_the_device(
    family: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    shared = getattr(tiny.CONFIGS[family], "num_kv_shared_layers", 0)
    if shared and not hasattr(tiny.CONFIGS[family], "kv_sharing_modes"):
        pytest.skip("this version of transformers does not say which blocks share keys and values")
    search = replace(runs.SHORT.search, generations=1, offspring=2)
    config = runs.short(checkpoints[family], text, tmp_path / "run", dtype="float32", device=DEVICE, search=search)
    with accelerator():
        run(config, until="search")
    assert len(runs.history(tmp_path / "run")) == 2
