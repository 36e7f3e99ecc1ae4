"""The whole flow on one screen: calibrate, eliminate, allocate, stitch, export, evaluate, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.commands.in_memory import Given, read_arguments
from darwinlm.commands.reporting import card_of, report
from darwinlm.commands.run_directory import SETTINGS, THRIFT, Run, claim, explain_failures
from darwinlm.commands.work import Work, open_work
from darwinlm.config.run import RunConfig, Stage
from darwinlm.data.corpus import Drawn
from darwinlm.data.packing import bos_of
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import Stitcher, repeat_shared
from darwinlm.database.store import Database, add_unit, reused_database
from darwinlm.evaluation.quality import ByBlock
from darwinlm.evaluation.rows import Row, evaluate
from darwinlm.export.hf import export_hf
from darwinlm.export.verify import Expected, verify_export
from darwinlm.export.vllm import check_vllm
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_bytes, parameter_count
from darwinlm.model.wrapper_code import foreign_code
from darwinlm.runtime import parallel
from darwinlm.runtime.device import DTYPES
from darwinlm.runtime.progress import say, track
from darwinlm.runtime.stages import Stages
from darwinlm.runtime.trackers import check_trackers, tracking
from darwinlm.search.evolution import evolve
from darwinlm.search.fitness import Fitness
from darwinlm.search.guard import Guard, guard_prompts
from darwinlm.search.held_out import curves
from darwinlm.search.sensitivity import find_starts
from darwinlm.search.uniform import later_start
from darwinlm.training.own_text import DIRECTORY
from darwinlm.training.refit import refit, refitted, set_refitted
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
    told = explain_failures(f"the run in {config.out}", THRIFT)
    this = Run(config.out)
    check_trackers(config.report_to, "report-to")
    # Until there is a first parent: what made every start diverge may be mended.
    searching = until != "database" and not this.history_path.exists()
    free = ("search.learning_rate",) if searching else ()

    def prepare() -> None:
        claim(this.path, SETTINGS, config, (DIRECTORY,), free)
        if given is not None:
            given.write(this.path)

    shared = parallel.shared_directory(this.path, prepare)
    with told, parallel.together(), shared, tracking(config.report_to, this.path / "tracked"):
        if this.finished:
            say(f"{this.path} is finished: {this.report_path} has its figures")
            return this
        began = time.monotonic()
        work = open_work(this, config, until)
        stages = Stages(this.stages_path, work.device)
        stages.add("preparation", time.monotonic() - began)
        with stages.measured("database"):
            database = build_database(work)
        if until == "database":
            return this
        with stages.measured("search"), work.within_memory():
            result = allocate(work, make_fitness(work, database))
        if until == "search":
            return this
        work = work.after_search()
        with stages.measured("refit"):
            weights = refitted_weights(work, database, "searched", result.best)
        if parallel.first():
            with stages.measured("export"):
                _export(work, result, finish(work, database, result.best, weights))
        if until == "export":
            return this
        with stages.measured("refit"):
            weights = refitted_weights(work, database, "uniform", work.uniform)
        if not parallel.first():
            return this
        with stages.measured("evaluation"):
            # It is not kept: the curves need its room.
            rows = _evaluate(work, finish(work, database, work.uniform, weights))
            curves, uniform = _curves(work, database, result)
        report(work, database, result, rows, curves, uniform, stages.used)
    return this


def build_database(work: Work) -> Database:
    """Calibrate the dense model and eliminate structures, one block after another, into the database.

    Raises:
        UsageError: if the database of another run is to be used, and is not finished or made from something else.
    """
    config, checkpoint = work.config, work.checkpoint
    if config.reuse is not None:
        return reused_database(work.run.database, work.grid, work.database_provenance)
    database = Database(work.run.database, work.grid, work.database_provenance)
    finished = database.finished()
    statistics = calibrate(
        checkpoint,
        work.tokens["calibration"],
        batch_size=config.calibration.batch_size,
        device=work.device,
        finished=finished,
        units=work.grid.units,
        dtype=DTYPES[config.calibration.dtype],
        counts=work.counts.get("calibration") if config.calibration.loss_tokens == "assistant" else None,
    )
    mine = [unit.name for unit in work.grid.units if parallel.is_mine(unit.block)]
    for unit in track(statistics, "database", len(mine), len(finished.intersection(mine))):
        add_unit(database, unit, config.database, checkpoint.dtype)
    parallel.wait_for_all()
    if parallel.first():
        say(f"database: {_first_token(work, database)}")
    return database


def _first_token(work: Work, database: Database) -> str:
    """How much of the Hessians comes from the first token of each sequence, as a sentence."""
    shares = database.first_token()
    what = "the first token" if bos_of(work.checkpoint.tokenizer) is None else "the BOS token"
    most = max(shares, key=shares.__getitem__)
    return f"{what} makes up {median(shares.values()):.1%} of a unit's Hessian, at most {shares[most]:.1%} ({most})"


def allocate(work: Work, fitness: Fitness, find: Callable[[], Mapping[str, Genome]] | None = None) -> SearchResult:
    """The best genome found within the budget, or the one that was given. All processes search, the first writes.

    Args:
        find: finds the genomes from which a search may start, by name, if it is not to start as its settings say.
    """
    config = work.config.search
    if parallel.first():
        work.run.note_precision(work.dtype)
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
        if start_genome is not None:
            start, budget = later_start(start_genome, work.uniform, budget, config.moves, seed)
            starts = {"earlier": start}
        elif find is not None:
            starts = find()
        else:
            starts = find_starts(work.uniform, budget, fitness, config, seed, work.run.search)
        guard = _guard(work, fitness)
        may_win = None if guard is None else guard.passes
        result = evolve(starts, budget, fitness, config, seed, work.run.history_path, fitness.length, may_win)
    if parallel.first():
        work.run.save_search(result, work.grid, work.provenance)
    return result


def _guard(work: Work, fitness: Fitness) -> Guard | None:
    """What keeps candidates whose answers do not end from winning, if the run asks for it."""
    config, checkpoint = work.config.guard, work.checkpoint
    prompts = guard_prompts(config, checkpoint.tokenizer, checkpoint.config)
    return Guard(fitness, checkpoint.tokenizer, prompts, config) if prompts else None


def make_fitness(work: Work, database: Database) -> Fitness:
    """The fitness of the run's candidates, within what it may keep on the device."""
    allowed, family = work.allowance, work.checkpoint.family
    dense = work.dense(work.dtype) if allowed.resident else work.checkpoint.load(work.dtype, torch.device("cpu"))
    return Fitness(
        Stitcher(dense, family, database, allowed.narrow),
        work.tokens["search"],
        work.tokens["training"],
        work.config.search,
        bos_of(work.checkpoint.tokenizer),
        blocks=work.blocks_of(dense, family),
        keeps_states=allowed.states,
        kept_bytes=allowed.survivors,
        wave_bytes=allowed.wave,
        counts=work.counts,
    )


def _stitcher(work: Work, database: Database, dtype: torch.dtype) -> Stitcher:
    return Stitcher(work.dense(dtype), work.checkpoint.family, database, work.allowance.narrow)


def refitted_weights(work: Work, database: Database, name: str, genome: Genome) -> dict[str, Tensor]:
    """What the refit makes of the weights of a genome's model, in the search's precision.

    All processes take part, unless it has been done before. Without a refit, there are none.
    """
    config = work.config.refit
    if not config.tokens:
        return {}
    file, provenance = work.run.refit / f"{name}.safetensors", work.database_provenance
    done = refitted(genome, config, file, provenance)
    if done is not None:
        return done
    with work.within_memory():
        dense, blocks = work.dense_by_block()
        learner = Stitcher(dense, work.checkpoint.family, database, kept_bytes=0)
        tokens, counts = work.tokens["refit"], work.counts.get("refit")
        return refit(learner, genome, tokens, config, file, provenance, blocks, counts)


def finish(work: Work, database: Database, genome: Genome, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The pruned model of a genome with its refitted weights, in the checkpoint's precision."""
    model = _stitcher(work, database, work.checkpoint.dtype).stitch(genome)
    set_refitted(model, weights)
    repeat_shared(model)
    return model


def _export(work: Work, result: SearchResult, model: PreTrainedModel) -> None:
    """Write the searched model as a directory that transformers loads, and prove it in a fresh process."""
    exported = work.run.exported
    expected = Expected.of(model, work.checkpoint.whole) if work.config.verify else None
    if exported.exists() and (change := _change(work.run)):
        say(f"export: {change} in {exported} is not what was written; the model is written again")
        shutil.rmtree(exported)
    if not exported.exists():
        if any(unit.uneven for unit in work.grid.units):
            say(
                "export: an attention that lost heads gets K and V for every query head that is left; "
                "--database.structure kv_group and balanced share them"
            )
        sizes = block_sizes(work.grid, result.best, work.checkpoint.config)
        counts = work.dense_parameters, parameter_count(model)
        card = card_of(work, result, counts)
        export_hf(model, sizes, work.checkpoint.tokenizer, exported, card, expected, work.checkpoint.path)
        work.run.seal_export()
        for refusal in check_vllm(exported):
            say(f"vLLM would refuse this export: {refusal}")
    elif expected is not None:
        verify_export(exported, expected)


def _change(this: Run) -> str | None:
    """The first file of the export that must not be used, for it is not what was written, or None."""
    try:
        return this.damage or foreign_code(this.exported)
    except DarwinError:  # the process died before it had sealed the export
        return this.seal_path.name


def _evaluate(work: Work, uniform_model: PreTrainedModel) -> list[Row]:
    """Dense, uniform and searched on held-out documents; the searched one as it was reloaded from its export."""
    work.keep_only(work.checkpoint.dtype)
    reloaded: Any = load(work.run.exported)
    dense = work.dense(work.checkpoint.dtype)
    models = {"dense": dense, "uniform": uniform_model, "searched": reloaded.to(dense.device).eval()}
    sizes = {name: parameter_bytes(model) for name, model in models.items()}
    held_out, tokenizer = work.tokens["evaluation"], work.checkpoint.tokenizer
    counts = work.counts.get("evaluation")

    def by_block(name: str) -> ByBlock:
        family = Checkpoint(work.run.exported).family if name == "searched" else work.checkpoint.family
        return ByBlock(family, work.blocks_of(models[name], family))

    texts = work.parts | work.texts
    rows = evaluate(models, held_out, tokenizer, work.config.evaluation, sizes, texts, by_block, counts)
    return [replace(row, parts=tuple(work.parts)) for row in rows]


def _curves(work: Work, database: Database, result: SearchResult) -> tuple[dict[str, Curve], dict[str, float]]:
    """How the search did on text that it never saw, and the KL divergence of the uniform genome there."""
    if not result.history:
        return {}, {}
    stitcher = Stitcher(work.dense(work.checkpoint.dtype), work.checkpoint.family, database, kept_bytes=0)
    held_out = Drawn(work.tokens["evaluation"], work.counts.get("evaluation"))
    texts = {f"{work.config.data}, held out": held_out} | work.parts | work.texts
    blocks = work.blocks_of(stitcher.dense, stitcher.family)
    return curves(stitcher, blocks, result.history, work.uniform, texts, work.run.search / "curves.json")
