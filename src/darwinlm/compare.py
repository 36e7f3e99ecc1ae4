"""`darwinlm compare`: every method at every size over one database, a line of JSON each, a table and a picture."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from darwinlm import pipeline
from darwinlm.allocate.methods import ALLOCATORS
from darwinlm.allocate.problem import Problem
from darwinlm.allocate.uniform import uniform
from darwinlm.artifact import locked_directory, read_json, read_json_lines, write_text
from darwinlm.budget import Budget, Costs, parameter_costs
from darwinlm.checkpoint import find_checkpoint
from darwinlm.comparison import DENSE, Cell, markdown, print_table, save_picture
from darwinlm.config import RefitConfig, RunConfig
from darwinlm.data import read_corpus
from darwinlm.database import MANIFEST, Database
from darwinlm.device import resolve_device, resolve_dtype
from darwinlm.evaluate import parameter_count, perplexity_and_kl, speed
from darwinlm.evaluation_config import CompareConfig
from darwinlm.families import find_grid
from darwinlm.fitness import Fitness
from darwinlm.genome import Grid
from darwinlm.progress import say
from darwinlm.surgery import Stitcher
from darwinlm.types import Genome, UsageError

CELLS, TABLE, PICTURE = "cells.jsonl", "comparison.md", "comparison.png"


@dataclass(frozen=True)
class _Bench:
    """What every cell is found and measured with.

    Attributes:
        stitcher: in the precision of the search.
        judged: in the checkpoint's, in which models are measured.
    """

    config: CompareConfig
    grid: Grid
    costs: Costs
    stitcher: Stitcher
    judged: Stitcher
    tokens: dict[str, Int[Tensor, "sequences length"]]
    texts: dict[str, Int[Tensor, "_ length"]]


def compare(config: CompareConfig) -> list[Cell]:
    """Measure every method at every size, print the table, and write `comparison.md` and `comparison.png`.

    A cell that is in `cells.jsonl` is not measured again.

    Raises:
        UsageError: if a setting, model or text cannot be used, or a target is out of reach.
        DarwinError: if a stage fails. The same call goes on from there.
    """
    out = Path(config.out)
    run = RunConfig(
        config.model, config.data, str(out / "base"), config.database.levels / 2, config.seed, config.device,
        config.dtype, calibration=config.calibration, database=config.database, search=config.search,
        refit=RefitConfig(tokens=0), evaluation=config.evaluation,
    )  # fmt: skip
    with locked_directory(out):
        pipeline.run(run, until="database")
        bench = _open(config, run)
        problems = {target: _budget(bench, target, run) for target in config.targets}
        cells = (
            [Cell.of(line) for line in read_json_lines(out / CELLS, "method", "target")]
            if (out / CELLS).exists()
            else []
        )
        wanted = [(DENSE, 0.0), *((method, target) for target in config.targets for method in config.methods)]
        for number, (method, target) in enumerate(wanted, 1):
            if any((cell.method, cell.target) == (method, target) for cell in cells):
                continue
            say(f"compare: {number}/{len(wanted)}, {method} at {target:g}")
            if method == DENSE:
                cell = _measure(bench, method, target, bench.grid.dense(), 0.0)
            else:
                cell = _find(bench, method, target, *problems[target])
            cells.append(cell)
            write_text(out / CELLS, "".join(cell.line for cell in cells))
        chosen = [next(cell for cell in cells if (cell.method, cell.target) == key) for key in wanted]
        write_text(out / TABLE, markdown(chosen, PICTURE))
        save_picture(out / PICTURE, chosen)
    print_table(chosen)
    print(out / TABLE, out / PICTURE, sep="\n")
    return chosen


def _open(config: CompareConfig, run: RunConfig) -> _Bench:
    path, device = Path(run.out), resolve_device(config.device)
    checkpoint = find_checkpoint(config.model, path)
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, config.seed)
    tokens, texts = pipeline.draw_tokens(corpus, run), pipeline.draw_texts(corpus, run)
    manifest = read_json(path / "database" / MANIFEST, "made_from")
    database = Database(path / "database", grid, manifest["made_from"])
    precisions = (resolve_dtype(config.dtype, device), checkpoint.dtype)
    models = {dtype: checkpoint.load(dtype, device) for dtype in dict.fromkeys(precisions)}
    searched, judged = (Stitcher(models[dtype], checkpoint.family, database) for dtype in precisions)
    costs = parameter_costs(grid, parameter_count(searched.dense))
    return _Bench(config, grid, costs, searched, judged, tokens, texts)


def _budget(bench: _Bench, target: float, run: RunConfig) -> tuple[Genome, Budget]:
    """The uniform genome at a size, and the budget that it sets all methods."""
    prunable = sum(levels[0] for levels in bench.costs.units)
    limit = bench.costs.of(bench.grid.dense()) - target * prunable
    settings = {**vars(run), "target": f"params={math.ceil(limit)}"}
    return uniform(bench.grid, bench.costs, RunConfig(**settings))


def _find(bench: _Bench, method: str, target: float, even: Genome, budget: Budget) -> Cell:
    """Let a method choose a genome, and measure what it chose."""
    config = bench.config
    began = time.monotonic()
    # Each method pays for its own scores: nothing of another's is reused.
    fitness = Fitness(bench.stitcher, bench.tokens["search"], bench.tokens["training"], config.search)
    state = Path(config.out) / "state" / f"{method}-{target:g}"
    text = bench.tokens["search"]
    problem = Problem(bench.stitcher, budget, even, fitness, text, config.search, config.seed, state)
    try:
        genome = ALLOCATORS[method](problem)
    except UsageError as error:
        return Cell(method, target, refused=str(error))
    assert budget.fits(genome)
    return _measure(bench, method, target, genome, time.monotonic() - began)


def _measure(bench: _Bench, method: str, target: float, genome: Genome, seconds: float) -> Cell:
    models = {DENSE: bench.judged.dense, method: bench.judged.stitch(genome)}
    quality = perplexity_and_kl(models, bench.tokens["evaluation"])[method]
    speeds = speed(models, bench.tokens["evaluation"], bench.config.evaluation)
    dense, found = speeds[DENSE], speeds[method]
    texts = {text: perplexity_and_kl(models, ids)[method] for text, ids in bench.texts.items()}
    return Cell(
        method,
        target,
        levels=genome.levels,
        parameters=bench.costs.of(genome),
        perplexity=quality.perplexity,
        kl=quality.kl,
        prefill_tokens_per_s=found.prefill_tokens_per_s,
        decode_tokens_per_s=found.decode_tokens_per_s,
        speedup=(
            found.prefill_tokens_per_s / dense.prefill_tokens_per_s,
            found.decode_tokens_per_s / dense.decode_tokens_per_s,
        ),
        seconds=seconds,
        texts=texts,
    )
