"""Gradual pruning: `darwinlm gradual`. A recipe prunes and trains a model in several stages.

The pruning and the training of each stage have directories of their own, and each goes on where it was interrupted.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any

from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import GRADUAL_SETTINGS, claim, find_export
from darwinlm.commands.train import check, train
from darwinlm.config.run import RunConfig
from darwinlm.config.training import GradualConfig, GradualStage, TrainConfig, steps_of
from darwinlm.data.draw import tokens_taken
from darwinlm.data.stream import draw_sequences
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.families import find_grid, find_units
from darwinlm.model.size import parameter_count
from darwinlm.report import tables
from darwinlm.runtime import parallel
from darwinlm.runtime.device import resolve_device, resolve_dtype
from darwinlm.runtime.files import write_json, write_text
from darwinlm.runtime.names import short_name
from darwinlm.runtime.progress import say
from darwinlm.search.costs import parameter_costs
from darwinlm.search.uniform import uniform_genome
from darwinlm.training.directory import FINISHED
from darwinlm.training.own_text import DIRECTORY, with_own_text, writes_own_text

LEFT_BEHIND = ("cache", "dense", DIRECTORY)  # what a refused command may leave, and the next one uses


def gradual(config: GradualConfig) -> Path:
    """Run all stages of a recipe and return the directory of the last model.

    A later stage measures the trained model anew and builds its database from each unit's own level up. Its search
    starts from that model's own sensitivities or, where `search.start` is uniform, as in the paper, from the model as
    it is, with further levels lost at random units until it is small enough.

    Raises:
        UsageError: if a setting cannot be used.
        DarwinError: if a stage fails. The same call goes on from what is finished.
    """
    out = Path(config.out)
    with parallel.together(), parallel.shared_directory(out, lambda: _claim(out, config)):
        return _stages(config, out)


def _claim(out: Path, config: GradualConfig) -> None:
    """Claim the directory: all settings may change until a pruning begins, and those of training until one begins."""
    trained = any(out.glob("*-train/result.json")) or any(out.glob(f"*-train/checkpoints/*/{FINISHED}"))
    free = ["stream", "distillation", "training"] if any(out.glob("*-prune")) else [f.name for f in fields(config)]
    claim(out, GRADUAL_SETTINGS, config, LEFT_BEHIND, () if trained else free)


def _check(config: GradualConfig, dense: Checkpoint) -> None:
    """Check the settings and the text of the trainings before the first pruning."""
    trainings = (_training(config, stage, 1, Path(config.model), dense) for stage in config.stages)
    first = next(filter(None, trainings), None)  # all have the same settings
    if first is not None:
        check(first, dense, dense)
        cache = Path(str(first.cache))
        draw_sequences(config.data, config.training.batch_size, dense.tokenizer, config.stream, cache, config.seed)


def _stages(config: GradualConfig, out: Path) -> Path:
    with parallel.first_before_others():
        dense = find_checkpoint(config.model, out)
    config = _with_own_text(config, dense, out)
    _check(config, dense)
    model, rows = config.model, []
    for number, stage in enumerate(config.stages, 1):
        say(f"stage {number} of {len(config.stages)}: level {stage.target_level:g}, then {stage.tokens:,} tokens")
        pruned = run(_pruning(config, stage, number, model, dense))
        model, row = str(pruned.exported), {"stage": number, "level": stage.target_level}
        training = _training(config, stage, number, pruned.path, dense)
        if training is not None:
            trained = train(training)
            parallel.wait_for_all()  # for what the first process writes in the end
            model, row = str(trained.exported), row | trained.result
        parallel.wait_for_all()
        rows.append(row | {"parameters": parameter_count(Checkpoint(Path(model)).skeleton())})
    if parallel.first():
        _report(config, out, rows, parameter_count(dense.skeleton()))
        print(model)
    return Path(model)


def _with_own_text(config: GradualConfig, dense: Checkpoint, out: Path) -> GradualConfig:
    """The settings with files in their text for what the dense model writes of it, once for all stages."""
    if not writes_own_text(config.data):
        return config
    device = resolve_device(config.device)
    pruning, held_out = tokens_taken(_pruning(config, config.stages[0], 1, config.model, dense))
    tokens = max(pruning, sum(stage.tokens for stage in config.stages))
    taken = tokens, max(held_out, config.training.evaluation_tokens)
    dtype = resolve_dtype("auto", device)
    data = with_own_text(config.data, dense, taken, config.own, out, config.seed, device, dtype)
    return replace(config, data=data)


def _pruning(config: GradualConfig, stage: GradualStage, number: int, model: str, dense: Checkpoint) -> RunConfig:
    """The run of a stage: the first prunes the dense model to a level, others a trained model to a level's size."""
    out = Path(config.out)
    settings: dict[str, Any] = {"target_level": stage.target_level, "search": config.search}
    if number > 1:
        settings = {"target": f"params={_size_at(dense, stage.target_level, config)}", "search": config.search}
        if config.search.start != "sensitivity":
            start = _unpruned_genome(out / f"{number}-start.json", model, config)
            settings["search"] = replace(config.search, start=str(start))
    return RunConfig(
        model=model,
        data=config.data,
        out=str(out / f"{number}-prune"),
        loss_tokens=config.loss_tokens,
        seed=config.seed,
        device=config.device,
        verify=config.verify,
        calibration=config.calibration,
        database=config.database,
        refit=config.refit,
        evaluation=config.evaluation,
        **settings,
    )


def _unpruned_genome(file: Path, model: str, config: GradualConfig) -> Path:
    """Write the genome that removes nothing from a model to a file, and return its path."""
    source = Checkpoint(find_export(Path(model)))
    units = find_units(source.skeleton(), source.config, config.database.structure)
    if parallel.first():
        write_json(file, [0] * len(units))
    parallel.wait_for_all()
    return file


def _training(
    config: GradualConfig, stage: GradualStage, number: int, pruned: Path, dense: Checkpoint
) -> TrainConfig | None:
    """The training of a stage, if it has one, on text that no earlier stage has seen."""
    if not stage.tokens:
        return None
    out = Path(config.out)
    return TrainConfig(
        model=str(pruned),
        data=config.data,
        out=str(out / f"{number}-train"),
        tokens=stage.tokens,
        skip=sum(steps_of(earlier.tokens, config.training, config.stream) for earlier in config.stages[: number - 1])
        * config.training.batch_size
        * config.stream.sequence_length,
        teacher=str(dense.path),
        loss_tokens=config.loss_tokens,
        seed=config.seed,
        device=config.device,
        cache=config.cache or str(out / "cache"),
        verify=config.verify,
        stream=config.stream,
        distillation=config.distillation,
        training=config.training,
    )


def _size_at(dense: Checkpoint, level: float, config: GradualConfig) -> int:
    """The parameters that the dense model has at a uniform level."""
    skeleton = dense.skeleton()
    grid = find_grid(skeleton, dense.config, config.database)
    genome = uniform_genome(grid, level, config.database.levels, Random(config.seed))
    return parameter_costs(grid, parameter_count(skeleton)).of(genome)


def _report(config: GradualConfig, out: Path, rows: list[dict[str, Any]], dense_parameters: int) -> None:
    """Write a table of every stage's size and held-out quality."""
    titles = ["stage", "level", "parameters", "perplexity as pruned", "trained", "KL as pruned", "trained"]
    cells = []
    for row in rows:
        figures = [row.get(when, {}).get(what) for what in ("perplexity", "kl") for when in ("before", "after")]
        shown = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        cells.append([str(row["stage"]), f"{row['level']:g}", f"{row['parameters']:,}", *shown])
    lines = [
        f"# {short_name(config.model)} in {len(rows)} stage{'s' * (len(rows) > 1)}",
        "",
        f"Dense: {dense_parameters:,} parameters. Held-out perplexity, and KL from the dense model in nats a token.",
        "",
        tables.markdown(titles, cells),
    ]
    write_json(out / "table.json", [{k: v for k, v in row.items() if k != "provenance"} for row in rows])
    write_text(out / "report.md", "\n".join(lines) + "\n")
