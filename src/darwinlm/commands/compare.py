"""`darwinlm compare`: allocators at several sizes over one database, as lines of JSON, a table and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from darwinlm.commands.compress import run as prune
from darwinlm.config.checks import expect
from darwinlm.config.evaluation import CompareConfig
from darwinlm.config.run import RefitConfig, RunConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.data.draw import draw_texts, draw_tokens
from darwinlm.data.packing import bos_of
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import MANIFEST, Database
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.evaluation.speed import speed
from darwinlm.evaluation.tasks import SUITE, Request, questions, requested, run_tasks
from darwinlm.genome import Grid
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.families import find_grid
from darwinlm.model.size import parameter_count
from darwinlm.report.comparison import (
    DENSE,
    HELD_OUT,
    Cell,
    markdown,
    print_table,
    read_cells,
    save_picture,
    write_cells,
)
from darwinlm.rivals.methods import DEFAULT_METHODS, METHODS, Method
from darwinlm.rivals.problem import Problem, mask_tokens, scored_tokens
from darwinlm.runtime.device import resolve_device, resolve_dtype
from darwinlm.runtime.files import read_record, write_record, write_text
from darwinlm.runtime.locking import locked_directory
from darwinlm.runtime.progress import say
from darwinlm.runtime.stopwatch import Stopwatch
from darwinlm.search.budget import Target
from darwinlm.search.costs import Costs, parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.uniform import uniform
from darwinlm.types import DarwinError, Genome, UsageError

QUESTIONS, TABLE, PICTURE = "questions.json", "comparison.md", "comparison.png"


METRICS = {request.task: request.metric for request in SUITE}


@dataclass(frozen=True)
class _Bench:
    """What every cell is chosen and measured with.

    Attributes:
        searched: stitches models in the precision of the search and of the tasks.
        judged: stitches models in the checkpoint's precision, in which perplexity, KL and speed are measured.
        of_dense: the dense model's last hidden states on each text, which all models are judged against.
    """

    config: CompareConfig
    run: RunConfig
    grid: Grid
    costs: Costs
    tokenizer: PreTrainedTokenizerBase
    searched: Stitcher
    judged: Stitcher
    tokens: dict[str, Int[Tensor, "sequences length"]]
    texts: dict[str, Int[Tensor, "_ length"]]
    of_dense: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


class _Cells:
    """The cells that are measured, as `cells.jsonl` in a directory holds them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.of = {(cell.method, cell.kept): cell for cell in read_cells(directory)}

    def keep(self, cell: Cell) -> Cell:
        """Add a cell, or replace the one of the same method and size, and write the file."""
        self.of[cell.method, cell.kept] = cell
        write_cells(self.directory, self.of.values())
        return cell


def compare(config: CompareConfig) -> list[Cell]:
    """Measure every method at every size, print the table, and write `comparison.md` and `comparison.png`.

    A cell that is in `cells.jsonl` is not measured again, nor is a task repeated whose score it holds. A method that
    fails at a size does not stop the others; table and picture then lack its cell.

    Returns:
        The dense model's cell, then those of the methods, by size and in the order of `config.methods`.

    Raises:
        UsageError: if a setting, model or text cannot be used.
        DarwinError: if the database, the dense model or a task fails, or, at the end, if a method has. The same call
            goes on from there.
    """
    methods, shares = _methods(config), _shares(config)
    out = Path(config.out)
    with locked_directory(out):
        requests, questions_asked = _requests(config)
        base = _base(config)
        prune(base, until="database")
        if questions_asked:
            write_record(out / QUESTIONS, {"questions": questions_asked}, {})
        bench, cells = _open(config, base), _Cells(out)
        chosen, failures = _measure_all(bench, cells, [(m, share) for share in shares for m in methods], requests)
        write_text(out / TABLE, markdown(chosen, _protocol(bench), PICTURE))
        save_picture(out / PICTURE, chosen)
    print_table(chosen)
    print(out / TABLE, out / PICTURE, sep="\n")
    if failures:
        raise DarwinError("; ".join(failures))
    return chosen


def _methods(config: CompareConfig) -> tuple[str, ...]:
    """The names of the methods. Raises `UsageError` if there is no such method, or it lacks a setting."""
    for name in config.methods:
        expect(name in METHODS, "methods", ", ".join(METHODS), repr(name))
    if "training-aware" in config.methods and not any(stage.training_tokens for stage in config.search.stages):
        raise UsageError(
            "--methods: training-aware needs training: expected training_tokens above 0 in --search.stages, found "
            "none; give some, or take evolution"
        )
    return config.methods or DEFAULT_METHODS


def _shares(config: CompareConfig) -> list[float]:
    """The shares of the dense model's parameters that are kept. Raises `UsageError` if a target is no such share."""
    return list(dict.fromkeys(map(_share, config.targets)))


def _share(text: str) -> float:
    try:
        target = Target.parse(text)
    except UsageError:
        target = None
    of_parameters = target is not None and target.measure == "params" and target.share
    expect(of_parameters, "targets", "shares of the parameters that are kept, such as params=0.8", repr(text))
    assert target is not None
    return target.amount


def _base(config: CompareConfig) -> RunConfig:
    """The run whose database all methods share."""
    return RunConfig(
        model=config.model,
        data=config.data,
        out=str(Path(config.out) / "base"),
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        calibration=config.calibration,
        database=config.database,
        search=config.search,
        refit=RefitConfig(tokens=0),
        evaluation=config.evaluation,
    )


def _measure_all(
    bench: _Bench, cells: _Cells, wanted: Sequence[tuple[str, float]], requests: list[Request]
) -> tuple[list[Cell], list[str]]:
    """The dense model's cell and the wanted ones that there are, with their scores; and the failures of methods."""
    count = 1 + len(wanted)
    place = f"compare: 1/{count}, {DENSE}"
    dense = cells.of.get((DENSE, 1.0)) or _measure_dense(bench, cells, place)
    chosen, failures = [_with_scores(bench, cells, dense, requests, place)], []
    for number, (method, kept) in enumerate(wanted, 2):
        name = f"{method} at params={kept:.4g}"
        place = f"compare: {number}/{count}, {name}"
        try:
            cell = cells.of.get((method, kept)) or _measure_method(bench, cells, method, kept, place)
        except DarwinError as error:
            failures.append(f"{name}: {error}")
            say(failures[-1])
            continue
        chosen.append(_with_scores(bench, cells, cell, requests, place))
    return chosen, failures


def _measure_dense(bench: _Bench, cells: _Cells, place: str) -> Cell:
    say(place)
    return cells.keep(_measure(bench, DENSE, 1.0, bench.grid.dense(), 0.0))


def _measure_method(bench: _Bench, cells: _Cells, method: str, kept: float, place: str) -> Cell:
    """Let a method choose a genome, and measure it; a method that has none of this size gives a refused cell."""
    say(place)
    try:
        genome, seconds = _choose(bench, METHODS[method], kept)
    except UsageError as error:
        return cells.keep(Cell(method, kept, refused=str(error)))
    return cells.keep(_measure(bench, method, kept, genome, seconds))


def _choose(bench: _Bench, method: Method, kept: float) -> tuple[Genome, float]:
    """The genome that a method chooses, and the seconds that it took. Raises `UsageError` if there is none."""
    config, settings = bench.config, bench.config.search
    text = bench.tokens["search"]
    # Each method pays for its own scores: nothing of another's is reused.
    scored_by = settings if method.ours else replace(settings, scrambled=0.0)
    bos = bos_of(bench.tokenizer)
    wanted, dense_parameters = replace(bench.run, target=f"params={kept!r}"), parameter_count(bench.searched.dense)
    uniform_genome, budget = uniform(bench.grid, bench.costs, wanted, dense_parameters)
    state = Path(config.out) / "state" / f"{method.name}-{kept:g}"
    problem = Problem(
        stitcher=bench.searched,
        budget=budget,
        uniform=uniform_genome,
        fitness=Fitness(bench.searched, text, bench.tokens["training"], scored_by, bos),
        token_ids=text,
        calibration=bench.tokens["calibration"],
        config=settings,
        seed=config.seed,
        state=state,
    )
    allocate = method.allocate
    with Stopwatch(state.with_name(f"{state.name}.seconds"), go_on=state.exists()) as stopwatch:
        genome = allocate(problem)
    assert budget.fits(genome)
    return genome, stopwatch.seconds


def _requests(config: CompareConfig) -> tuple[list[Request], dict[str, Any]]:
    """The tasks, each by the metric that the paper's protocol takes, or by all that it has, and their questions.

    Raises:
        UsageError: if there is no such task, or the comparison holds answers to other questions.
    """
    requests = [replace(request, metric=METRICS.get(request.task)) for request in requested(config)]
    asked = questions(requests, config) if requests else {}
    path = Path(config.out) / QUESTIONS
    before = read_record(path, "questions")["questions"] if path.exists() else {}
    for task in before.keys() & asked.keys():
        if before[task] != asked[task]:
            raise UsageError(
                f"{config.out} holds answers to other questions of {task} ({before[task]}, not {asked[task]}); choose "
                "another --out"
            )
    return requests, before | asked


def _protocol(bench: _Bench) -> list[str]:
    """The notes below the table: on how much text genomes are chosen and judged."""
    config = bench.config
    search, length = config.search, config.calibration.sequence_length
    scored, masked = (count(bench.grid, search, length) for count in (scored_tokens, mask_tokens))
    return [
        f"ours: {search.generations} generations of {search.offspring} offspring, {scored:,} scored tokens, the start "
        f"included; as many for rivals that search; sheared-llama's masks learn on {masked:,}",
        f"judged on {bench.tokens['evaluation'].numel():,} held-out tokens; seed {config.seed}",
    ]


def _open(config: CompareConfig, run: RunConfig) -> _Bench:
    """Open the database that the base run has built, and load the dense model once in each precision."""
    path, device = Path(run.out), resolve_device(config.device)
    checkpoint = find_checkpoint(config.model, path)
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, config.seed)
    tokens, texts = draw_tokens(corpus, run), draw_texts(corpus, run)
    manifest = read_record(path / "database" / MANIFEST, "provenance")
    database = Database(path / "database", grid, manifest["provenance"])
    precisions = (resolve_dtype(config.dtype, device), checkpoint.dtype)
    models = {dtype: checkpoint.load(dtype, device) for dtype in dict.fromkeys(precisions)}
    searched, judged = (Stitcher(models[dtype], checkpoint.family, database) for dtype in precisions)
    costs = parameter_costs(grid, parameter_count(searched.dense))
    return _Bench(config, run, grid, costs, checkpoint.tokenizer, searched, judged, tokens, texts)


def _measure(bench: _Bench, method: str, kept: float, genome: Genome, seconds: float) -> Cell:
    """The cell of a genome, with perplexity, KL and speed measured beside the dense model's."""
    models = {DENSE: bench.judged.dense, method: bench.judged.stitch(genome)}
    held_out = bench.tokens["evaluation"]
    quality = perplexity_and_kl(models, held_out, bench.of_dense[HELD_OUT])[method]
    speeds = speed(models, held_out, bench.config.evaluation)
    own = speeds[method]
    texts = {text: perplexity_and_kl(models, ids, bench.of_dense[text])[method] for text, ids in bench.texts.items()}
    return Cell(
        method,
        kept,
        levels=genome.levels,
        parameters=bench.costs.of(genome),
        perplexity=quality.perplexity,
        kl=quality.kl,
        prefill_tokens_per_s=own.prefill_tokens_per_s,
        decode_tokens_per_s=own.decode_tokens_per_s,
        speedup=(own.prefill_ratio.median, own.decode_ratio.median),
        uncertain_speed=own.prefill_ratio.wide or own.decode_ratio.wide,
        seconds=seconds,
        texts=texts,
    )


def _with_scores(bench: _Bench, cells: _Cells, cell: Cell, requests: list[Request], place: str) -> Cell:
    """The cell with the scores that are requested, in their order; the model runs the tasks that it has none of."""
    answered = {score.task for score in cell.scores}
    left = [request for request in requests if request.task not in answered and cell.refused is None]
    if left:
        model = bench.searched.stitch(Genome(cell.levels))
        for request in left:
            say(f"{place}: {request.task}")
            scores = run_tasks(model, bench.tokenizer, [request], bench.config)
            cell = cells.keep(replace(cell, scores=(*cell.scores, *scores)))
    by_request = [score for request in requests for score in cell.scores if score.task == request.task]
    return replace(cell, scores=tuple(by_request))
