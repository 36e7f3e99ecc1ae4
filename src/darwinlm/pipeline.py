"""The whole flow on one screen: calibrate, eliminate, allocate, stitch, export, evaluate, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm import report
from darwinlm.allocate.evolution import evolve
from darwinlm.allocate.uniform import uniform
from darwinlm.artifact import locked_directory
from darwinlm.calibrate import calibrate
from darwinlm.checkpoint import Checkpoint, find_checkpoint
from darwinlm.config import RunConfig
from darwinlm.data import read_corpus
from darwinlm.database import Database, add_unit
from darwinlm.device import resolve_device, resolve_dtype
from darwinlm.evaluate import Row, evaluate, parameter_bytes, parameter_count
from darwinlm.export.card import model_card
from darwinlm.export.hf import export_hf, verify_export
from darwinlm.families import block_sizes
from darwinlm.fitness import Fitness
from darwinlm.genome import level_grid
from darwinlm.modeling import load
from darwinlm.progress import say, track
from darwinlm.run import Run, versions
from darwinlm.surgery import Stitcher
from darwinlm.types import Genome, SearchResult

Stage = Literal["database", "search", "report"]
VERIFIED_SEQUENCES, VERIFIED_TOKENS = 2, 128


def compress(model: str, data: str, out: str | Path, target_level: float = 5.0, **settings: Any) -> Run:
    """Compress a model: the same as `darwinlm compress MODEL --data DATA --target-level LEVEL --out RUN`.

    Args:
        model: a hub id, a directory, a `.gguf` file, or `smollm2-135m`.
        data: the text to calibrate, search and evaluate on.
        out: directory of the run; an unfinished one of the same settings is resumed.
        target_level: uniform level whose size the result must not exceed, out of `database.levels`.
        settings: the other fields of `RunConfig`.

    Raises:
        DarwinError: if anything about model, data, settings or directory stops the run, in one sentence.
    """
    return run(RunConfig(model=model, data=data, out=str(out), target_level=target_level, **settings))


def run(config: RunConfig, until: Stage = "report") -> Run:
    """Run all stages up to `until`. What an earlier, interrupted run has finished is not done again."""
    with locked_directory(Path(config.out)):
        this = Run.claim(config)
        if this.finished:
            return this
        work = _open(this)
        database = _eliminate(work)
        if until == "database":
            return this
        start, result = _allocate(work, database)
        if until == "search":
            return this
        models = _stitch(work, database, start, result)
        _export(work, database, result, models)
        rows = _evaluate(work, models)
        _report(work, database, start, result, rows)
    return this


@dataclass(frozen=True)
class _Work:
    """What every stage reads: the run, the dense model, the text, and where to compute."""

    run: Run
    config: RunConfig
    checkpoint: Checkpoint
    tokens: dict[str, Int[Tensor, "sequences length"]]
    device: torch.device
    made_from: dict[str, Any]


def _open(this: Run) -> _Work:
    config = this.config
    device = resolve_device(config.device)
    checkpoint = find_checkpoint(config.model, this.path)
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, config.seed)
    tokens = corpus.draw(
        calibration=config.calibration.tokens,
        search=max(stage.fitness_tokens for stage in config.search.stages),
        training=max(stage.training_tokens for stage in config.search.stages),
    )
    tokens["evaluation"] = corpus.draw_held_out(config.evaluation.tokens)
    made_from = {"model": checkpoint.fingerprint, "text": corpus.fingerprint, "versions": versions()}
    return _Work(this, config, checkpoint, tokens, device, made_from)


def _eliminate(work: _Work) -> Database:
    """Calibrate the dense model and eliminate structures, one block after another, into the database."""
    config, checkpoint = work.config, work.checkpoint
    grid = level_grid(checkpoint.units, config.database.levels, config.database.granularity)
    settings = {"calibration": config.calibration.__dict__, "database": config.database.__dict__, "seed": config.seed}
    database = Database(work.run.database, grid, work.made_from | settings)
    finished = database.finished()
    statistics = calibrate(
        checkpoint,
        work.tokens["calibration"],
        batch_size=config.calibration.batch_size,
        device=work.device,
        finished=finished,
    )
    for unit in track(statistics, "database", len(grid.units), len(finished)):
        add_unit(database, unit, config.database, checkpoint.dtype)
    return database


def _allocate(work: _Work, database: Database) -> tuple[Genome, SearchResult]:
    """The uniform genome, whose size is the budget, and the best genome within it."""
    config = work.config
    start, budget = uniform(database.grid, config.target_level, config.database.levels, config.seed)
    dense = work.checkpoint.load(resolve_dtype(config.dtype, work.device), work.device)
    fitness = Fitness(
        Stitcher(dense, work.checkpoint.family, database),
        work.tokens["search"],
        work.tokens["training"],
        config.search.stages,
        config.search.learning_rate,
    )
    result = evolve(start, budget, fitness, config.search, config.seed, work.run.search / "state.json")
    work.run.save_search(result, database.grid, work.made_from)
    return start, result


def _stitch(work: _Work, database: Database, start: Genome, result: SearchResult) -> dict[str, PreTrainedModel]:
    """The dense, the uniform and the searched model, in the precision of the checkpoint."""
    dense = work.checkpoint.load(work.checkpoint.dtype, work.device)
    stitcher = Stitcher(dense, work.checkpoint.family, database)
    return {"dense": dense, "uniform": stitcher.stitch(start), "searched": stitcher.stitch(result.best)}


def _export(work: _Work, database: Database, result: SearchResult, models: dict[str, PreTrainedModel]) -> None:
    """Write the searched model as a directory that transformers loads, and prove it in a fresh process."""
    if work.run.exported.exists():
        return
    model = models["searched"]
    sizes = block_sizes(database.grid, result.best, work.checkpoint.config)
    card = model_card(
        work.config.model, _settings(work, result), parameter_count(models["dense"]), parameter_count(model)
    )
    export_hf(model, sizes, work.checkpoint.tokenizer, work.run.exported, card)
    token_ids = work.tokens["evaluation"][:VERIFIED_SEQUENCES, :VERIFIED_TOKENS]
    with torch.inference_mode():
        logits = model(token_ids.to(work.device)).logits
    difference = verify_export(work.run.exported, token_ids, logits)
    say(f"export: loads without darwinlm, largest difference of a logit {difference:.1e}")


def _evaluate(work: _Work, models: dict[str, PreTrainedModel]) -> list[Row]:
    """Dense, uniform and searched on held-out documents; the searched one as it was reloaded from its export."""
    reloaded = load(work.run.exported).to(work.device).eval()
    models = models | {"searched": reloaded}
    sizes = {name: parameter_bytes(model) for name, model in models.items()}
    return evaluate(models, work.tokens["evaluation"], work.checkpoint.tokenizer, work.config.evaluation, sizes)


def _report(work: _Work, database: Database, start: Genome, result: SearchResult, rows: list[Row]) -> None:
    """Tables and pictures, in the run directory and on the screen."""
    genomes = {"uniform": start, "searched": result.best}
    title = f"{Path(work.config.model).name} at level {work.config.target_level:g} of {work.config.database.levels}"
    settings = _settings(work, result)
    paths = report.write_report(work.run.path, title, rows, database.grid, genomes, result.history, settings)
    report.print_table(rows)
    for path in [work.run.exported, *paths]:
        print(path)


def _settings(work: _Work, result: SearchResult) -> dict[str, str]:
    """What made the result, for people."""
    config = work.config
    return {
        "Model": config.model,
        "Text": config.data,
        "Calibration": f"{config.calibration.tokens:,} tokens",
        "Target": f"the size of uniform level {config.target_level:g} of {config.database.levels}",
        "Search": f"{len(result.history) - 1} generations of {config.search.offspring} offspring",
        "Search KL": f"{result.history[0].fitness:.4f} (uniform) to {result.fitness:.4f} nats a token",
        "Seed": str(config.seed),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
