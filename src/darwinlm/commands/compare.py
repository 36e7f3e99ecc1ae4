"""`darwinlm compare`: every method at every size over one database, a line of JSON each, a table and a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from darwinlm.commands.compress import run as prune
from darwinlm.config.evaluation import CompareConfig
from darwinlm.config.run import RefitConfig, RunConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.data.draw import draw_texts, draw_tokens, scored_text
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import MANIFEST, Database
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.evaluation.speed import speed
from darwinlm.evaluation.tasks import SUITE, Request, questions, requested, run_tasks
from darwinlm.genome import Grid
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.families import find_grid
from darwinlm.model.size import parameter_count
from darwinlm.report.comparison import CELLS, DENSE, HELD_OUT, Cell, markdown, print_table, read_cells, save_picture
from darwinlm.rivals.methods import ALLOCATORS, OURS
from darwinlm.rivals.problem import Problem, mask_tokens, scored_tokens
from darwinlm.runtime.device import resolve_device, resolve_dtype
from darwinlm.runtime.files import locked_directory, read_json, write_json, write_text
from darwinlm.runtime.progress import say
from darwinlm.runtime.stopwatch import Stopwatch
from darwinlm.search.budget import Budget, Costs, parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.uniform import uniform
from darwinlm.types import DarwinError, Genome, UsageError

QUESTIONS, TABLE, PICTURE = "questions.json", "comparison.md", "comparison.png"


METRICS = {request.task: request.metric for request in SUITE}


@dataclass(frozen=True)
class _Bench:
    """What every cell is found and measured with.

    Attributes:
        stitcher: in the precision of the search and of the tasks.
        judged: in the checkpoint's, in which perplexity, KL and speed are measured.
        of_dense: the dense model's last hidden states on each text, for all models to be judged against.
    """

    config: CompareConfig
    grid: Grid
    costs: Costs
    tokenizer: PreTrainedTokenizerBase
    stitcher: Stitcher
    judged: Stitcher
    tokens: dict[str, Int[Tensor, "sequences length"]]
    texts: dict[str, Int[Tensor, "_ length"]]
    of_dense: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


def compare(config: CompareConfig) -> list[Cell]:
    """Measure every method at every size, print the table, and write `comparison.md` and `comparison.png`.

    A cell that is in `cells.jsonl` is not measured again, nor asked again what it has answered. A method that fails at
    a size does not stop the others; table and picture then lack its cell.

    Raises:
        UsageError: if a setting, model or text cannot be used.
        DarwinError: if the database, the dense model or a task fails, or, at the end, if a method has. The same call
            goes on from there.
    """
    out = Path(config.out)
    run = RunConfig(
        config.model, config.data, str(out / "base"), config.database.levels / 2, config.seed, config.device,
        config.dtype, calibration=config.calibration, database=config.database, search=config.search,
        refit=RefitConfig(tokens=0), evaluation=config.evaluation,
    )  # fmt: skip
    with locked_directory(out):
        requests, asked = _requests(config)
        prune(run, until="database")
        if asked:
            write_json(out / QUESTIONS, asked)
        bench = _open(config, run)
        cells = {(cell.method, cell.target): cell for cell in read_cells(out)}
        wanted = [(DENSE, 0.0), *((method, target) for target in config.targets for method in config.methods)]
        failures: dict[tuple[str, float], str] = {}
        for number, (method, target) in enumerate(wanted, 1):
            place = f"compare: {number}/{len(wanted)}, {method} at {target:g}"
            if (method, target) not in cells:
                say(place)
                try:
                    found = _find(bench, method, target, run)
                except DarwinError as error:
                    if method == DENSE:  # of which every other cell is a ratio
                        raise
                    failures[method, target] = f"{method} at {target:g}: {error}"
                    say(failures[method, target])
                    continue
                _write(out, cells, found)
            found = cells[method, target]
            answered = {score.task for score in found.scores}
            left = [request for request in requests if request.task not in answered and found.refused is None]
            if left:
                model = bench.stitcher.stitch(Genome(found.levels))
                for request in left:
                    say(f"{place}: {request.task}")
                    scores = run_tasks(model, bench.tokenizer, [request], config)
                    found = replace(found, scores=(*found.scores, *scores))
                    _write(out, cells, found)
        chosen = [_with_scores(cells[key], requests) for key in wanted if key not in failures]
        write_text(out / TABLE, markdown(chosen, _protocol(bench), PICTURE))
        save_picture(out / PICTURE, chosen)
    print_table(chosen)
    print(out / TABLE, out / PICTURE, sep="\n")
    if failures:
        raise DarwinError("; ".join(failures.values()))
    return chosen


def _requests(config: CompareConfig) -> tuple[list[Request], dict[str, Any]]:
    """The tasks, each by the metric that the paper's protocol takes, or by all that it has, and their questions.

    Raises:
        UsageError: if there is no such task, or the comparison holds answers to other questions.
    """
    requests = [replace(request, metric=METRICS.get(request.task)) for request in requested(config)]
    asked = questions(requests, config) if requests else {}
    path = Path(config.out) / QUESTIONS
    before = read_json(path) if path.exists() else {}
    for task in before.keys() & asked.keys():
        if before[task] != asked[task]:
            raise UsageError(
                f"{config.out} holds answers to other questions of {task} ({before[task]}, not {asked[task]}); choose "
                "another --out"
            )
    return requests, before | asked


def _protocol(bench: _Bench) -> list[str]:
    """What stands below the table: on how much text genomes are found and judged."""
    config = bench.config
    search, scored = config.search, scored_tokens(bench.grid, config.search)
    return [
        f"ours: {search.generations} generations of {search.offspring} offspring, {scored:,} scored tokens, the start "
        f"included; as many for rivals that search; sheared-llama's masks learn on {mask_tokens(bench.grid, search):,}",
        f"judged on {bench.tokens['evaluation'].numel():,} held-out tokens; seed {config.seed}",
    ]


def _write(out: Path, cells: dict[tuple[str, float], Cell], cell: Cell) -> None:
    cells[cell.method, cell.target] = cell
    write_text(out / CELLS, "".join(cell.line for cell in cells.values()))


def _open(config: CompareConfig, run: RunConfig) -> _Bench:
    path, device = Path(run.out), resolve_device(config.device)
    checkpoint = find_checkpoint(config.model, path)
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, config.seed)
    tokens, texts = draw_tokens(corpus, run), draw_texts(corpus, run)
    manifest = read_json(path / "database" / MANIFEST, "provenance")
    database = Database(path / "database", grid, manifest["provenance"])
    precisions = (resolve_dtype(config.dtype, device), checkpoint.dtype)
    models = {dtype: checkpoint.load(dtype, device) for dtype in dict.fromkeys(precisions)}
    searched, judged = (Stitcher(models[dtype], checkpoint.family, database) for dtype in precisions)
    costs = parameter_costs(grid, parameter_count(searched.dense))
    return _Bench(config, grid, costs, checkpoint.tokenizer, searched, judged, tokens, texts)


def _budget(bench: _Bench, target: float, run: RunConfig) -> tuple[Genome, Budget]:
    """The uniform genome at a size, and the budget that it sets all methods."""
    prunable = sum(levels[0] for levels in bench.costs.units)
    limit = bench.costs.of(bench.grid.dense()) - target * prunable
    settings = {**vars(run), "target": f"params={math.ceil(limit)}"}
    return uniform(bench.grid, bench.costs, RunConfig(**settings))


def _find(bench: _Bench, method: str, target: float, run: RunConfig) -> Cell:
    """Let a method choose a genome, and measure what it chose; or measure the dense model."""
    config = bench.config
    if method == DENSE:
        return _measure(bench, method, target, bench.grid.dense(), 0.0)
    # Each method pays for its own scores: nothing of another's is reused.
    text, calibration = bench.tokens["search"], bench.tokens["calibration"]
    scored = scored_text(text, config.search) if method in OURS else text
    fitness = Fitness(bench.stitcher, scored, bench.tokens["training"], config.search)
    state = Path(config.out) / "state" / f"{method}-{target:g}"
    try:
        even, budget = _budget(bench, target, run)
        problem = Problem(bench.stitcher, budget, even, fitness, text, calibration, config.search, config.seed, state)
        with Stopwatch(state.with_name(f"{state.name}.seconds"), go_on=state.exists()) as stopwatch:
            genome = ALLOCATORS[method](problem)
    except UsageError as error:
        return Cell(method, target, refused=str(error))
    assert budget.fits(genome)
    return _measure(bench, method, target, genome, stopwatch.seconds)


def _measure(bench: _Bench, method: str, target: float, genome: Genome, seconds: float) -> Cell:
    models = {DENSE: bench.judged.dense, method: bench.judged.stitch(genome)}
    held_out = bench.tokens["evaluation"]
    quality = perplexity_and_kl(models, held_out, bench.of_dense[HELD_OUT])[method]
    speeds = speed(models, held_out, bench.config.evaluation)
    dense, found = speeds[DENSE], speeds[method]
    texts = {text: perplexity_and_kl(models, ids, bench.of_dense[text])[method] for text, ids in bench.texts.items()}
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


def _with_scores(cell: Cell, requests: list[Request]) -> Cell:
    """The cell with the scores that were asked for, in their order."""
    scores = [score for request in requests for score in cell.scores if score.task == request.task]
    return replace(cell, scores=tuple(scores))
