"""What every stage of a run reads, opened and checked before hours are spent."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.commands.run_directory import Run, read_genome, versions
from darwinlm.config.checks import bytes_of
from darwinlm.config.run import STARTS, RunConfig, Stage
from darwinlm.data.corpus import Drawn, fingerprint, read_corpus
from darwinlm.data.draw import apart, draw_counted, draw_texts, fit_to_text, tokens_taken
from darwinlm.data.packing import check_ids
from darwinlm.database.store import reused_database
from darwinlm.evaluation.memory import evaluation_bytes
from darwinlm.evaluation.rows import prompts_of
from darwinlm.genome import Grid, prunable_parameters
from darwinlm.model.blocks import Blocks, InHostMemory, InShards, Resident
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.families import block_sizes, find_grid
from darwinlm.model.family import Family
from darwinlm.model.licence import licence_of
from darwinlm.model.pruned import pruned_config
from darwinlm.model.size import parameter_count
from darwinlm.runtime import parallel
from darwinlm.runtime.device import memory_held_to, memory_limit, resolve_device, resolve_dtype
from darwinlm.runtime.progress import say
from darwinlm.search.budget import TIMED, Budget, Measure, Target
from darwinlm.search.costs import Costs, a_token, counted_costs, parameter_costs
from darwinlm.search.guard import guard_prompts
from darwinlm.search.latency import latency_costs
from darwinlm.search.memory import HEADROOM, Allowance, allowance, count_memory
from darwinlm.search.uniform import check_export, uniform
from darwinlm.training.own_text import with_own_text, writes_own_text
from darwinlm.types import DarwinError, Genome

SINCE = {"divisible_by": 1, "loss_tokens": "all"}  # settings that a database need not name, with their defaults


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every stage reads: the run, the dense model and its units, the text, and where to compute.

    Attributes:
        dense_parameters: parameters of the dense model.
        uniform: the uniform genome at the target's size.
        given_genome: the genome of `--genome`, which replaces the search.
        start_genome: the genome of an earlier search from which this one starts.
        tokens: token blocks by purpose, for the stages that are run.
        counts: by purpose, for every token whether the prediction after it counts, where not all do.
        texts: further texts to judge models on.
        parts: of a mixture, held-out text of each source by itself.
        dtype: precision of the search.
        allowance: what the search may keep on the device to save time.
        models: the dense model in each precision that was asked for, loaded once.
    """

    run: Run
    config: RunConfig
    checkpoint: Checkpoint
    grid: Grid
    dense_parameters: int
    uniform: Genome
    budget: Budget
    given_genome: Genome | None
    start_genome: Genome | None
    tokens: dict[str, Int[Tensor, "sequences length"]]
    counts: dict[str, Bool[Tensor, "sequences length"]]
    texts: dict[str, Drawn]
    parts: dict[str, Drawn]
    device: torch.device
    dtype: torch.dtype
    allowance: Allowance
    provenance: dict[str, Any]
    models: dict[torch.dtype, PreTrainedModel] = field(default_factory=dict)

    @property
    def database_provenance(self) -> dict[str, Any]:
        """All that determines the database's content."""
        return self.provenance | database_settings(self.config)

    def dense(self, dtype: torch.dtype) -> PreTrainedModel:
        """The dense model in a precision: in the host's memory where the device has no room for it."""
        if dtype not in self.models:
            there = self.device if self.allowance.resident else torch.device("cpu")
            self.models[dtype] = self.checkpoint.load(dtype, there)
        return self.models[dtype]

    def at(self, this: Run, config: RunConfig, until: Stage) -> Work:
        """The work of another run on the same model, text and levels, at another size. Raises as `open_work`."""
        costs = _costs(this, config, self.checkpoint, self.grid, self.device, self.dense_parameters)
        genome, budget = uniform(self.grid, costs[0], config, self.dense_parameters, costs[1:])
        allowed = _allowance(
            config, self.checkpoint, self.grid, self.dense_parameters, genome, self.device, self.dtype, until
        )
        return replace(self, run=this, config=config, uniform=genome, budget=budget, allowance=allowed)

    def after_search(self, uniform: bool = True) -> Work:
        """The same work, with the dense model outside where the device has no room to judge the pruned one beside it.

        Args:
            uniform: whether the uniform model is judged beside both.
        """
        limit, size = _limit(self.config, self.device), self.dense_parameters
        if limit is None or not self.allowance.resident:
            return self
        exported = parameter_costs(self.grid, size).of(self.uniform)
        shared = prunable_parameters(self.grid, self.uniform)  # what the uniform one shares no embeddings in
        own = (size, shared, exported) if uniform else (size, exported)
        length, each = self.config.calibration.sequence_length, self.checkpoint.dtype.itemsize
        if evaluation_bytes(own, self.checkpoint.config, length, each) <= HEADROOM * limit:
            return self
        self.models.clear()
        return replace(self, allowance=replace(self.allowance, resident=False))

    def dense_by_block(self) -> tuple[PreTrainedModel, Blocks]:
        """The dense model in the search's precision, and its blocks, of which an accelerator has one at a time.

        No dense model stays on the accelerator.
        """
        if self.device.type == "cpu":
            dense = self.dense(self.dtype)
            return dense, Resident(dense, self.checkpoint.family)
        self.models.clear()
        blocks = InShards.of(self.checkpoint, self.dtype, self.device)
        return blocks.skeleton, blocks

    def blocks_of(self, model: PreTrainedModel, family: Family) -> Blocks:
        """A model's blocks: on the device where there is room for the model, else in the host's memory.

        What the model has beside its blocks is on the device from then on.
        """
        if self.allowance.resident:
            return Resident(model, family)
        return InHostMemory.of(model, family, self.device)

    def within_memory(self) -> AbstractContextManager[None]:
        """Let torch hold no more of the device than the search and the refit may use."""
        return memory_held_to(_limit(self.config, self.device), self.device)

    def keep_only(self, dtype: torch.dtype) -> None:
        """Free the dense model in every other precision."""
        for other in self.models.keys() - {dtype}:
            del self.models[other]


def made_from(checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of the dense model and of the text, and the model's licence, for people.

    Args:
        provenance: as `Work.provenance`.
    """
    licence = licence_of(checkpoint.path)
    return {
        "SHA-256 of the dense model": provenance["model"],
        "SHA-256 of the text": provenance["text"],
        "Licence of the dense model": ", ".join(licence.values()) or "its card names none",
    }


def database_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that determine the database's content. Those of `SINCE` are left out: earlier versions had none."""

    def of(section: Any) -> dict[str, Any]:
        return {name: value for name, value in asdict(section).items() if SINCE.get(name) != value}

    return {"calibration": of(config.calibration), "database": of(config.database), "seed": config.seed}


def open_work(this: Run, config: RunConfig, until: Stage) -> Work:
    """Everything that can be wrong with the arguments is found here, before hours are spent."""
    try:
        device = resolve_device(config.device)
        assert this.database  # that there is one, if it is another run's
        with parallel.first_before_others():
            checkpoint = find_checkpoint(config.model, this.path)
        assert checkpoint.family  # that it can be pruned
        checkpoint.check_length(config.calibration.sequence_length, "calibration.sequence-length")
        judged = config.evaluation
        prompts_of(checkpoint.tokenizer, checkpoint.config, judged)  # raises if there are none that were asked for
        guard_prompts(config.guard, checkpoint.tokenizer, checkpoint.config)
        if until == "report":
            checkpoint.check_length(judged.speed_tokens + judged.decode_tokens, "evaluation.speed-tokens")
            checkpoint.check_length(judged.continuation_tokens, "evaluation.continuation-tokens")
        grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
        for sentence in grid.fewer(config.database.levels):
            say(sentence)
        length = config.calibration.sequence_length
        data = own_text(config, checkpoint, this.path, device)
        corpus = read_corpus(data, checkpoint.tokenizer, length, config.seed, config.loss_tokens)
        config = fit_to_text(corpus, config) if config.fit_data else config
        drawn, texts = draw_counted(corpus, config, until), draw_texts(corpus, config)
        parts = corpus.draw_parts(config.evaluation.tokens) if until == "report" else {}
        for ids, _ in (*drawn.values(), *texts.values()):
            check_ids(ids, checkpoint.config.vocab_size)
        provenance = {
            "model": checkpoint.agree_on_fingerprint(),
            "text": corpus.fingerprint,
            "grid": {
                "levels": config.database.levels,
                "granularity": config.database.granularity,
                "structure": config.database.structure,
            }
            | ({"divisible_by": config.database.divisible_by} if config.database.divisible_by > 1 else {}),
            "versions": versions(),
        } | ({"evaluation text": {text: fingerprint(*judged) for text, judged in texts.items()}} if texts else {})
        if config.reuse is not None:
            reused_database(this.database, grid, provenance | database_settings(config))
        dense_parameters = parameter_count(checkpoint.skeleton())
        costs = _costs(this, config, checkpoint, grid, device, dense_parameters)
        uniform_genome, budget = uniform(grid, costs[0], config, dense_parameters, costs[1:])
        given_genome = start_genome = None
        if config.genome is not None:
            given_genome = read_genome(Path(config.genome), grid, provenance)
            exported = parameter_costs(grid, dense_parameters).of(given_genome)
            check_export(exported, dense_parameters, config)
            pruned_config(checkpoint.config, block_sizes(grid, given_genome, checkpoint.config))  # it can be exported
        elif config.search.start not in STARTS:
            start_genome = read_genome(Path(config.search.start), grid, {"grid": provenance["grid"]}, "--search.start")
        dtype = resolve_dtype(this.begun_in or config.dtype, device)
        allowed = _allowance(config, checkpoint, grid, dense_parameters, uniform_genome, device, dtype, until)
    except DarwinError:
        if parallel.first():
            this.abandon()
        raise
    tokens, counts = apart(drawn)
    return Work(
        run=this,
        config=config,
        checkpoint=checkpoint,
        grid=grid,
        dense_parameters=dense_parameters,
        uniform=uniform_genome,
        budget=budget,
        given_genome=given_genome,
        start_genome=start_genome,
        tokens=tokens,
        counts=counts,
        texts=texts,
        parts=parts,
        device=device,
        dtype=dtype,
        allowance=allowed,
        provenance=provenance,
    )


def own_text(config: RunConfig, checkpoint: Checkpoint, out: Path, device: torch.device) -> str:
    """The text of a run, with what the dense model writes of it in files; the first call writes them, which takes time.

    Raises:
        UsageError: as `with_own_text`.
    """
    if not writes_own_text(config.data):
        return config.data
    dtype = resolve_dtype(config.dtype, device)
    return with_own_text(config.data, checkpoint, tokens_taken(config), config.own, out, config.seed, device, dtype)


def _allowance(
    config: RunConfig,
    checkpoint: Checkpoint,
    grid: Grid,
    dense_parameters: int,
    uniform: Genome,
    device: torch.device,
    dtype: torch.dtype,
    until: Stage,
) -> Allowance:
    """What the search may keep on the device. Raises `UsageError` if it does not fit."""
    limit = _limit(config, device)
    if limit is None or until == "database":
        return Allowance()
    length = config.calibration.sequence_length
    counted = count_memory(
        dense_parameters, checkpoint.config, grid, uniform, config.search, config.refit, length, dtype, config.guard
    )
    return allowance(counted, limit)


def _limit(config: RunConfig, device: torch.device) -> int | None:
    return memory_limit(device, None if config.memory is None else bytes_of(config.memory))


def _costs(
    this: Run, config: RunConfig, checkpoint: Checkpoint, grid: Grid, device: torch.device, dense_parameters: int
) -> tuple[Costs, ...]:
    """What every level of every unit costs, in the measure of each target."""
    measures = ["params"] if config.target is None else [each.measure for each in Target.parse_all(config.target)]
    return tuple(
        _timed_costs(measure, this, config, checkpoint, grid, device)
        if measure in TIMED
        else counted_costs(
            measure,
            grid,
            checkpoint.config,
            dense_parameters,
            config.calibration.sequence_length,
            checkpoint.dtype.itemsize,
            config.serving,
        )
        for measure in measures
    )


def _timed_costs(
    measure: Measure, this: Run, config: RunConfig, checkpoint: Checkpoint, grid: Grid, device: torch.device
) -> Costs:
    """Seconds of the pass that a target limits, measured on the device, or the tokens a second that it makes."""
    serving, passes = config.serving, config.latency
    if measure != "latency":
        new, before = (1, serving.context) if measure == "decode" else (serving.context, 0)
        passes = replace(passes, batch=serving.batch, tokens=new, context=before)
    checkpoint.check_length(
        passes.context + passes.tokens, "latency.context" if measure == "latency" else "serving.context"
    )
    with parallel.first_before_others():
        costs = latency_costs(checkpoint, grid, passes, device, this.search / f"{measure}.json")
    if measure == "latency":
        return costs
    whose, tokens = ("decoding", 1) if measure == "decode" else ("prefill", passes.batch * passes.tokens)
    return a_token(costs, whose, tokens)
