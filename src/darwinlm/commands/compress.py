"""The whole flow on one screen: calibrate, eliminate, allocate, stitch, export, evaluate, report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.commands.in_memory import Given, read_arguments
from darwinlm.commands.run_directory import (
    SETTINGS,
    Run,
    claim,
    explain_failures,
    read_genome,
    versions,
    versions_text,
)
from darwinlm.config.run import STARTS, RunConfig, Stage
from darwinlm.data.corpus import fingerprint, read_corpus
from darwinlm.data.draw import draw_texts, draw_tokens, fit_to_text, scored_text
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import Stitcher, repeat_shared
from darwinlm.database.store import Database, add_unit
from darwinlm.evaluation.rows import Row, evaluate
from darwinlm.export.card import model_card
from darwinlm.export.hf import export_hf
from darwinlm.export.verify import Expected, verify_export
from darwinlm.export.vllm import check_vllm
from darwinlm.genome import Grid
from darwinlm.losses.metrics import label
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.families import block_sizes, find_family, find_grid
from darwinlm.model.licence import licence_of
from darwinlm.model.pruned import family_of, load, pruned_config
from darwinlm.model.size import parameter_bytes, parameter_count
from darwinlm.report import run_report
from darwinlm.runtime import parallel
from darwinlm.runtime.device import DTYPES, resolve_device, resolve_dtype
from darwinlm.runtime.files import write_text
from darwinlm.runtime.names import short_name
from darwinlm.runtime.progress import say, track
from darwinlm.search.budget import Budget, Costs, Target, amount_of, cache_costs, flop_costs, parameter_costs
from darwinlm.search.evolution import evolve
from darwinlm.search.fitness import Fitness
from darwinlm.search.held_out import curves
from darwinlm.search.latency import latency_costs
from darwinlm.search.sensitivity import find_starts
from darwinlm.search.uniform import later_start, uniform
from darwinlm.training.refit import refit, set_consumers
from darwinlm.types import Curve, DarwinError, Genome, SearchResult


def compress(
    model: str | Path | PreTrainedModel,
    data: str | Path | Iterable[Any],
    *,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> Run:
    """Compress a model: the same as `darwinlm compress MODEL --data DATA --out RUN`.

    Args:
        model: a hub id, a directory, a `.gguf` file, `smollm2-135m`, or a model in memory.
        data: the text to calibrate, search and evaluate on: a source by name, a list of strings, or a data set with a
            column of text.
        out: directory of the run; an unfinished one of the same settings is resumed.
        tokenizer: of a model in memory.
        settings: the other fields of `RunConfig`, such as `target="params=0.6"`; for a section (`calibration`) its
            dataclass or a dict of some of its fields.

    Returns:
        The run, whose `model`, `genome` and `table` are the result.

    Raises:
        UsageError: if a setting cannot be used; nothing has been written then.
        DarwinError: if anything about model, data or directory stops the run, in one sentence.
    """
    config, given = read_arguments(model, tokenizer, data, out, settings)
    return run(config, given=given)


def run(config: RunConfig, until: Stage = "report", given: Given | None = None) -> Run:
    """Run all stages up to `until`. What an earlier, interrupted run has finished is not done again.

    Args:
        given: a model or texts in memory, which are written to where the settings name them.

    Raises:
        UsageError: if a setting cannot be used; a directory that was new is left as if nothing had happened.
        DarwinError: if a stage fails. The same call goes on from there once the cause is mended.
    """
    told = explain_failures(f"the run in {config.out}", "lower --calibration.batch-size")
    this = Run(config.out)
    # Until there is a first parent: what made every start diverge may be mended.
    searching = until != "database" and not this.history_path.exists()
    free = ("search.learning_rate",) if searching else ()

    def prepare() -> None:
        claim(this.path, SETTINGS, config, open_to=free)
        if given is not None:
            given.write(this.path)

    with told, parallel.together(), parallel.shared_directory(this.path, prepare):
        if this.finished:
            say(f"{this.path} is finished: {this.report_path} has its figures")
            return this
        work = _open(this, config, until)
        database = _eliminate(work)
        if until == "database":
            return this
        result = _allocate(work, database)
        if until == "search" or not parallel.first():
            return this
        _export(work, result, _finish(work, database, "searched", result.best))
        if until == "export":
            return this
        uniform_model = _finish(work, database, "uniform", work.uniform)
        work.keep_only(work.checkpoint.dtype)
        rows = _evaluate(work, uniform_model)
        _report(work, result, rows, _curves(work, database, result))
    return this


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every stage reads: the run, the dense model and its units, the text, and where to compute.

    Attributes:
        uniform: the uniform genome at the target's size.
        given_genome: the genome of `--genome`, which replaces the search.
        start_genome: the genome of an earlier search from which this one starts.
        tokens: token blocks by purpose, for the stages that are run.
        texts: further texts to judge models on.
        dtype: precision of the search.
        models: the dense model in each precision that was asked for, loaded once.
    """

    run: Run
    config: RunConfig
    checkpoint: Checkpoint
    grid: Grid
    uniform: Genome
    budget: Budget
    given_genome: Genome | None
    start_genome: Genome | None
    tokens: dict[str, Int[Tensor, "sequences length"]]
    texts: dict[str, Int[Tensor, "_ length"]]
    device: torch.device
    dtype: torch.dtype
    provenance: dict[str, Any]
    models: dict[torch.dtype, PreTrainedModel] = field(default_factory=dict)

    @property
    def database_settings(self) -> dict[str, Any]:
        """Settings that determine the database's content."""
        config = self.config
        return {"calibration": asdict(config.calibration), "database": asdict(config.database), "seed": config.seed}

    def dense(self, dtype: torch.dtype) -> PreTrainedModel:
        """The dense model in a precision."""
        if dtype not in self.models:
            self.models[dtype] = self.checkpoint.load(dtype, self.device)
        return self.models[dtype]

    def keep_only(self, dtype: torch.dtype) -> None:
        """Free the dense model in every other precision."""
        for other in self.models.keys() - {dtype}:
            del self.models[other]


def _open(this: Run, config: RunConfig, until: Stage) -> _Work:
    """Everything that can be wrong with the arguments is found here, before hours are spent."""
    try:
        device = resolve_device(config.device)
        with parallel.first_before_others():
            checkpoint = find_checkpoint(config.model, this.path)
        find_family(checkpoint.config)
        if until in ("export", "report"):
            family_of(checkpoint.config)  # that it can be exported
        checkpoint.check_length(config.calibration.sequence_length)
        grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
        for sentence in grid.fewer(config.database.levels):
            say(sentence)
        corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, config.seed)
        config = fit_to_text(corpus, config) if config.fit_data else config
        tokens, texts = draw_tokens(corpus, config, until), draw_texts(corpus, config)
        provenance = {
            "model": checkpoint.fingerprint,
            "text": corpus.fingerprint,
            "grid": {
                "levels": config.database.levels,
                "granularity": config.database.granularity,
                "structure": config.database.structure,
            },
            "versions": versions(),
        } | ({"evaluation text": {text: fingerprint(ids) for text, ids in texts.items()}} if texts else {})
        uniform_genome, budget = uniform(grid, _costs(this, config, checkpoint, grid, device), config)
        given_genome = start_genome = None
        if config.genome is not None:
            given_genome = read_genome(Path(config.genome), grid, provenance)
            pruned_config(checkpoint.config, block_sizes(grid, given_genome, checkpoint.config))  # it can be exported
        elif config.search.start not in STARTS:
            start_genome = read_genome(Path(config.search.start), grid, {"grid": provenance["grid"]}, "--search.start")
        dtype = resolve_dtype(config.dtype, device)
    except DarwinError:
        if parallel.first():
            this.abandon()
        raise
    return _Work(
        run=this,
        config=config,
        checkpoint=checkpoint,
        grid=grid,
        uniform=uniform_genome,
        budget=budget,
        given_genome=given_genome,
        start_genome=start_genome,
        tokens=tokens,
        texts=texts,
        device=device,
        dtype=dtype,
        provenance=provenance,
    )


def _costs(this: Run, config: RunConfig, checkpoint: Checkpoint, grid: Grid, device: torch.device) -> Costs:
    """What every level of every unit costs, in the measure of the target."""
    measure = "params" if config.target is None else Target.parse(config.target).measure
    if measure == "flops":
        return flop_costs(grid, checkpoint.config, config.calibration.sequence_length)
    if measure == "kv-cache":
        return cache_costs(grid, checkpoint.config, checkpoint.dtype.itemsize)
    if measure == "latency":
        with parallel.first_before_others():
            return latency_costs(checkpoint, grid, config.latency, device, this.search / "latency.json")
    return parameter_costs(grid, parameter_count(checkpoint.skeleton()))


def _eliminate(work: _Work) -> Database:
    """Calibrate the dense model and eliminate structures, one block after another, into the database."""
    config, checkpoint = work.config, work.checkpoint
    database = Database(work.run.database, work.grid, work.provenance | work.database_settings)
    finished = database.finished()
    statistics = calibrate(
        checkpoint,
        work.tokens["calibration"],
        batch_size=config.calibration.batch_size,
        device=work.device,
        finished=finished,
        units=work.grid.units,
        dtype=DTYPES[config.calibration.dtype],
    )
    mine = [unit.name for unit in work.grid.units if parallel.is_mine(unit.block)]
    for unit in track(statistics, "database", len(mine), len(finished.intersection(mine))):
        add_unit(database, unit, config.database, checkpoint.dtype)
    parallel.wait_for_all()
    return database


def _allocate(work: _Work, database: Database) -> SearchResult:
    """The best genome found within the budget, or the one that was given. All processes search, the first writes."""
    config = work.config.search
    stitcher = _stitcher(work, database, work.dtype)
    text = scored_text(work.tokens["search"], config)
    fitness = Fitness(stitcher, text, work.tokens["training"], config)
    if work.given_genome is not None:
        score = fitness.score(work.given_genome, config.stages[-1])
        if score == inf:
            raise DarwinError(
                "the model of --genome diverges: expected a finite fitness, found NaN or infinity; lower "
                "--search.learning-rate or take --dtype float32, and another --out"
            )
        result = SearchResult(work.given_genome, score, ())
    else:
        budget, seed, start_genome = work.budget, work.config.seed, work.start_genome
        if start_genome is None:
            starts = find_starts(work.uniform, budget, fitness, config, seed, work.run.search)
        else:
            start, budget = later_start(start_genome, work.uniform, budget, config.moves, seed)
            starts = {"earlier": start}
        result = evolve(starts, budget, fitness, config, seed, work.run.history_path)
    if parallel.first():
        work.run.save_search(result, work.grid, work.provenance)
    return result


def _stitcher(work: _Work, database: Database, dtype: torch.dtype) -> Stitcher:
    return Stitcher(work.dense(dtype), work.checkpoint.family, database)


def _finish(work: _Work, database: Database, name: str, genome: Genome) -> PreTrainedModel:
    """The pruned model of a genome, its consumers solved again against the dense distribution by the refit.

    The refit computes in the search's precision, the model has the checkpoint's.
    """
    model, config = _stitcher(work, database, work.checkpoint.dtype).stitch(genome), work.config.refit
    if config.tokens:
        learner = _stitcher(work, database, work.dtype)
        file, provenance = work.run.refit / f"{name}.safetensors", work.provenance | work.database_settings
        set_consumers(model, refit(learner, genome, work.tokens["refit"], config, file, provenance))
    repeat_shared(model)
    return model


def _export(work: _Work, result: SearchResult, model: PreTrainedModel) -> None:
    """Write the searched model as a directory that transformers loads, and prove it in a fresh process."""
    exported = work.run.exported
    expected = Expected.of(model) if work.config.verify else None
    if not exported.exists():
        if any(unit.uneven for unit in work.grid.units):
            say(
                "export: an attention that lost heads gets K and V for every query head that is left; "
                "--database.structure kv_group and balanced share them"
            )
        sizes = block_sizes(work.grid, result.best, work.checkpoint.config)
        counts = parameter_count(work.checkpoint.skeleton()), parameter_count(model)
        card = _card(work, result, counts)
        export_hf(model, sizes, work.checkpoint.tokenizer, exported, card, expected, work.checkpoint.path)
        for refusal in check_vllm(exported):
            say(f"vLLM would refuse this export: {refusal}")
    elif expected is not None:
        verify_export(exported, expected)


def _evaluate(work: _Work, uniform_model: PreTrainedModel) -> list[Row]:
    """Dense, uniform and searched on held-out documents; the searched one as it was reloaded from its export."""
    reloaded: Any = load(work.run.exported)
    dense = work.dense(work.checkpoint.dtype)
    models = {"dense": dense, "uniform": uniform_model, "searched": reloaded.to(work.device).eval()}
    sizes = {name: parameter_bytes(model) for name, model in models.items()}
    held_out, tokenizer = work.tokens["evaluation"], work.checkpoint.tokenizer
    return evaluate(models, held_out, tokenizer, work.config.evaluation, sizes, work.texts)


def _curves(work: _Work, database: Database, result: SearchResult) -> dict[str, Curve]:
    """How the search did on text that it never saw."""
    stitcher = _stitcher(work, database, work.checkpoint.dtype)
    texts = {f"{work.config.data}, held out": work.tokens["evaluation"]} | work.texts
    return curves(stitcher, result.history, texts, work.run.search / "curves.json") if result.history else {}


def _report(work: _Work, result: SearchResult, rows: list[Row], elsewhere: dict[str, Curve]) -> None:
    """Tables and pictures, in the run directory and on the screen."""
    genomes = {"uniform": work.uniform, "searched": result.best}
    title = f"{short_name(work.config.model)} at {_target(work.config)}"
    settings = _settings(work, result)
    card = _card(work, result, (rows[0].parameters, rows[-1].parameters), run_report.models_table(rows))
    write_text(work.run.exported / "README.md", card)
    metric = label(work.config.search.metric)
    history = result.history
    paths = run_report.write_report(
        work.run.path, title, rows, work.grid, genomes, history, settings, metric, elsewhere
    )
    run_report.print_table(rows)
    for path in [work.run.exported, *paths]:
        print(path)


def _card(work: _Work, result: SearchResult, parameters: tuple[int, int], table: str = "") -> str:
    """The export's model card, with the parameters of the dense and of the pruned model, and what was measured."""
    return model_card(work.config.model, licence_of(work.checkpoint.path), _settings(work, result), *parameters, table)


def _settings(work: _Work, result: SearchResult) -> dict[str, str]:
    """What made the result, for people."""
    config = work.config
    search = {"Genome": f"{config.genome}, without a budget", "Compared with": f"uniform at {_target(config)}"}
    if result.history:
        search = {
            "Target": f"at most {amount_of(work.budget.limit)} {work.budget.costs.measure}: {_target(config)}",
            "Search": f"{len(result.history) - 1} generations of {config.search.offspring} offspring",
            f"Search {label(config.search.metric)}": (
                f"{result.history[0].fitness:.4f} (start) to {result.fitness:.4f} nats a token"
            ),
        }
    return {
        "Model": config.model,
        "Text": config.data,
        "Calibration": f"{config.calibration.tokens:,} tokens",
        **search,
        "Refit": f"{config.refit.tokens:,} tokens" if config.refit.tokens else "none",
        "Seed": str(config.seed),
        "Versions": versions_text(),
    }


def _target(config: RunConfig) -> str:
    """What the user asked for."""
    return config.target or f"level {config.level:g} of {config.database.levels}"
