"""Recipes: several stages by one command, and those of the paper's models, unchanged but for their size."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
import trainings
from darwinlm.cli import PRESETS
from darwinlm.commands import gradual as recipes
from darwinlm.commands.gradual import _size_at, gradual
from darwinlm.config.files import read_settings
from darwinlm.config.run import DatabaseConfig, RunConfig
from darwinlm.config.training import GradualConfig, GradualStage, TrainConfig, steps_of
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes_of
from darwinlm.model.reading import load
from darwinlm.runtime.files import read_json
from darwinlm.types import UsageError
from test_parallel import torchrun

RECIPES = Path(__file__).parents[1] / "src" / "darwinlm" / "recipes"
# What makes a recipe of the paper one of seconds; the rest of it is used as it stands.
SMALL = [
    "--calibration.tokens=512", "--calibration.sequence-length=32", "--database.granularity=8",
    "--search.generations=1", "--search.offspring=2", "--search.stages",
    "[{survivors: 1, fitness_tokens: 64, training_tokens: 32}]",
    "--evaluation.tokens=128", "--evaluation.continuation-tokens=2", "--evaluation.speed-tokens=16",
    "--evaluation.decode-tokens=2", "--evaluation.repeats=1", "--evaluation.prompts=[Hello]",
    "--stream.sequence-length=32", "--training.evaluation-tokens=128", "--training.warmup-steps=1", "--no-verify",
]  # fmt: skip


def two_stages(model: Path, data: Path, out: Path) -> GradualConfig:
    tokens = trainings.STEPS * trainings.BATCH * trainings.LENGTH
    return GradualConfig(
        model=str(model),
        data=str(data),
        out=str(out),
        stages=(GradualStage(1.0, tokens), GradualStage(2.0, tokens)),
        verify=False,
        calibration=runs.SHORT.calibration,
        database=runs.SHORT.database,
        search=replace(runs.SHORT.search, start="uniform"),
        refit=runs.SHORT.refit,
        evaluation=runs.SHORT.evaluation,
        stream=trainings.SHORT.stream,
        training=trainings.SHORT.training,
    )


@pytest.fixture(scope="module")
def finished(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> GradualConfig:
    config = two_stages(checkpoints["llama-gqa"], text, tmp_path_factory.mktemp("gradual") / "out")
    gradual(config)
    return config


@pytest.mark.slow
def test_every_stage_is_smaller_and_no_unit_grows_again(finished: GradualConfig):
    out, dense = Path(finished.out), Checkpoint(Path(finished.model))
    models: list[Any] = [load(out / f"{stage}-train" / "model") for stage in (1, 2)]
    table = read_json(out / "table.json")
    for model, stage, row in zip(models, finished.stages, table, strict=True):
        size = sum(parameter.numel() for parameter in model.parameters())
        assert size == row["parameters"] <= _size_at(dense, stage.target_level, finished)
        assert row["after"]["perplexity"] < row["before"]["perplexity"]
    first, second = (block_sizes_of(model) for model in models)
    if len(first) == len(second):
        for before, after in zip(first, second, strict=True):
            assert all(b >= a for b, a in zip(asdict(before).values(), asdict(after).values(), strict=True))
    assert "| 2 | 2 |" in (out / "report.md").read_text()
    trainings_of = [read_settings(out / f"{stage}-train" / "train.yaml", TrainConfig) for stage in (1, 2)]
    assert [training.skip for training in trainings_of] == [0, finished.stages[0].tokens]


@pytest.mark.slow
def test_the_second_search_starts_from_the_model_that_was_trained(finished: GradualConfig):
    """Its run is on the trained export, and its first parent is that with further levels lost, as small as asked."""
    out = Path(finished.out)
    second = read_settings(out / "2-prune" / "run.yaml")
    assert second.model == str(out / "1-train" / "model")
    assert set(json.loads(Path(second.search.start).read_text())) == {0}
    manifest = json.loads((out / "2-prune" / "database" / "database.json").read_text())
    assert manifest["provenance"]["model"] == Checkpoint(Path(second.model)).fingerprint


def test_a_later_search_may_start_from_sensitivities_and_has_the_size_of_the_level(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
):
    """Of a model whose embedding is tied: its head counts once."""
    model = checkpoints["llama-gqa"]
    config = two_stages(model, text, tmp_path)
    config = replace(config, search=replace(config.search, start="sensitivity"))
    run = recipes._pruning(config, config.stages[1], 2, str(model), Checkpoint(model))
    dense: Any = load(model)
    size = sum(parameter.numel() for parameter in dense.parameters())
    embedding = dense.get_input_embeddings().weight.numel()
    assert run.search.start == "sensitivity"
    share = (int(str(run.target).removeprefix("params=")) - embedding) / (size - embedding)
    assert share == pytest.approx(1 - config.stages[1].target_level / config.database.levels, abs=0.1)


@pytest.mark.slow
def test_an_interrupted_recipe_goes_on(finished: GradualConfig, tmp_path: Path):
    """What is lost of the second stage is made again, and the first stage is not touched."""
    out = Path(finished.out)
    table = (out / "table.json").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (out / "1-train" / "model").iterdir()}
    shutil.rmtree(out / "2-train")
    (out / "table.json").unlink()
    gradual(finished)
    assert (out / "table.json").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in (out / "1-train" / "model").iterdir()} == kept


@pytest.mark.slow
def test_two_processes_run_a_recipe_as_one_does(finished: GradualConfig, tmp_path: Path):
    config = replace(finished, out=str(tmp_path / "out"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    done = torchrun("-m", "darwinlm", "gradual", "--config", str(recipe))
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(*(read_json(Path(each.out) / "table.json") for each in (config, finished)), strict=True):
        assert ours["parameters"] == theirs["parameters"]
        for when in ("before", "after"):
            assert ours[when] == pytest.approx(theirs[when], rel=1e-3, abs=1e-3)


def test_training_is_checked_before_anything_is_pruned_and_may_be_mended(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Once a training has begun it may not change any more."""

    class PruningError(Exception):
        """It would begin now."""

    def prune(_: RunConfig) -> None:
        (out / "1-prune").mkdir(exist_ok=True)
        raise PruningError

    monkeypatch.setattr(recipes, "run", prune)
    good, out = two_stages(checkpoints["llama-gqa"], text, tmp_path / "out"), tmp_path / "out"
    for part, changes, sentence in (
        ("training", {"batch_size": 3}, "--training.batch-size: expected a multiple of 2"),
        ("training", {"report_to": ("paper",)}, "expected what is installed"),
        ("stream", {"score_column": "rating"}, "has no column rating"),
    ):
        with pytest.raises(UsageError, match=sentence):
            gradual(replace(good, **{part: replace(getattr(good, part), **changes)}))
        assert not (out / "1-prune").exists()
    for learning_rate in (1e-3, 2e-3):
        with pytest.raises(PruningError):
            gradual(replace(good, training=replace(good.training, learning_rate=learning_rate)))
    with pytest.raises(UsageError, match=r"its seed is 0, not 1"):
        gradual(replace(good, seed=1))
    checkpoint = out / "1-train" / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "darwinlm.json").touch()
    with pytest.raises(UsageError, match=r"its training\.learning_rate is 0\.002, not 0\.003"):
        gradual(good)


def test_without_stages_there_is_one_to_half_of_the_levels(text: Path):
    config = GradualConfig("M", str(text), "O", database=DatabaseConfig(levels=4))
    assert config.stages == (GradualStage(2.0, 10**10),)


def test_levels_that_do_not_rise_are_refused(text: Path):
    for levels in ((2.0, 2.0), (11.0,)):
        with pytest.raises(UsageError, match="--stages: expected levels that rise between 0 and 10"):
            GradualConfig("M", str(text), "O", stages=tuple(GradualStage(level, 0) for level in levels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "family", "batch", "warmup", "context", "levels", "trains"),
    [
        ("llama-2-7b", "llama-mha", 1024, 50, 4096, [5, 6], "all"),
        ("llama-3.1-8b", "llama-gqa", 1152, 10, 8192, [5], "all"),
        ("qwen-2.5-14b-instruct", "qwen2", 2048, 50, 4096, [5], "consumers"),  # of all weights 80 GB hold too few
    ],
)
def test_a_recipe_of_the_paper_runs_on_a_tiny_model_of_its_family(
    recipe: str, family: str, batch: int, warmup: int, context: int, levels: list[int], trains: str,
    checkpoints: dict[str, Path], text: Path, tmp_path: Path,
):  # fmt: skip
    path = RECIPES / f"{recipe}.yaml"
    config = read_settings(path, GradualConfig)
    preset = yaml.safe_load((PRESETS / "paper.yaml").read_text())
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump({"model": "M", "data": "D", "out": "O", **preset}))
    paper = read_settings(tmp_path / "paper.yaml").search
    assert (vars(config.search), paper.trains) == (vars(paper) | {"trains": trains}, "all")
    training = config.training
    assert (training.batch_size, training.warmup_steps, config.stream.sequence_length) == (batch, warmup, context)
    assert [stage.target_level for stage in config.stages] == levels
    for stage in config.stages:
        trained = steps_of(stage.tokens, training, config.stream) * batch * context
        assert trained == stage.tokens == pytest.approx(10**10, rel=1e-3)
    assert config.calibration.tokens == 2048 * context == 2048 * config.calibration.sequence_length
    stages = yaml.safe_dump([{"target_level": level, "tokens": 256} for level in levels], default_flow_style=True)
    scored = tmp_path / "scored.jsonl"
    lines = text.read_text().splitlines()
    scored.write_text("".join(f"{json.dumps(json.loads(line) | {'language_score': 0.95})}\n" for line in lines))
    small = [f"--model={checkpoints[family]}", f"--data={scored}", f"--out={tmp_path / 'out'}", "--stages", stages]
    assert config.refit.tokens == config.distillation.weight == 0
    small += [*SMALL, "--training.batch-size=4"]
    assert runs.call("gradual", "--config", str(path), *small) == 0
    table = read_json(tmp_path / "out" / "table.json")
    assert [row["level"] for row in table] == levels
    assert all(row["after"]["perplexity"] > 1 for row in table)
