"""`darwinlm compare`: allocators at several sizes over one database, as lines of JSON, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Bool, Int
from torch import Tensor

from darwinlm.commands.compress import run as prune
from darwinlm.commands.judging import Cells, Judge, find_requests, note_questions
from darwinlm.commands.run_directory import Run, base_of, versions_text
from darwinlm.commands.work import made_from, own_text
from darwinlm.config.checks import expect
from darwinlm.config.evaluation import CompareConfig
from darwinlm.config.run import RefitConfig, RunConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.data.draw import apart, draw_counted, draw_texts
from darwinlm.data.packing import bos_of
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import MANIFEST, Database
from darwinlm.evaluation.tasks import Request
from darwinlm.genome import Grid
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.families import find_grid
from darwinlm.model.size import parameter_count
from darwinlm.report import beside_dense
from darwinlm.report.cells_page import CellsFacts, comparison_lead, comparison_sections
from darwinlm.report.comparison import (
    DENSE,
    Cell,
    figure,
    markdown,
    print_table,
)
from darwinlm.report.figures import save_figure
from darwinlm.report.html import NAME, unless_it_fails, write_page
from darwinlm.rivals.methods import DEFAULT_METHODS, METHODS, Method
from darwinlm.rivals.problem import Problem, mask_tokens, scored_tokens
from darwinlm.runtime.device import resolve_device, resolve_dtype
from darwinlm.runtime.files import read_record, write_text
from darwinlm.runtime.locking import locked_directory
from darwinlm.runtime.names import short_name
from darwinlm.runtime.progress import say
from darwinlm.runtime.stages import Stages
from darwinlm.search.budget import Target
from darwinlm.search.costs import Costs, parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.uniform import uniform
from darwinlm.types import DarwinError, Genome, UsageError

TABLE, PICTURE = "comparison.md", "comparison.png"


@dataclass(frozen=True)
class _Bench:
    """What every cell is chosen and measured with.

    Attributes:
        searched: stitches models in the precision of the search and of the tasks.
        judged: stitches models in the checkpoint's precision, in which perplexity, KL and speed are measured.
        made_from: the hashes of model and text, and the licence.
    """

    config: CompareConfig
    run: RunConfig
    grid: Grid
    costs: Costs
    searched: Stitcher
    judged: Stitcher
    judge: Judge
    tokens: dict[str, Int[Tensor, "sequences length"]]
    counts: dict[str, Bool[Tensor, "sequences length"]]
    made_from: dict[str, str]


def compare(config: CompareConfig) -> list[Cell]:
    """Measure every method at every size, print the table, and write report and picture.

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
        requests, asked = find_requests(config, out)
        base = replace(base_of(config), refit=RefitConfig(tokens=0))
        prune(base, until="database")
        note_questions(asked, out)
        bench, cells = _open(config, base), Cells(out)
        chosen, failures = _measure_all(bench, cells, [(m, share) for share in shares for m in methods], requests)
        write_text(out / TABLE, markdown(chosen, _protocol(bench), PICTURE, beside_dense.below(chosen)))
        save_figure(out / PICTURE, figure(chosen))
        with unless_it_fails(out / NAME):
            _write_page(out, bench, chosen)
    print_table(chosen)
    print(*beside_dense.leaders(chosen), out / TABLE, out / PICTURE, out / NAME, sep="\n")
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


def _measure_all(
    bench: _Bench, cells: Cells, wanted: Sequence[tuple[str, float]], requests: list[Request]
) -> tuple[list[Cell], list[str]]:
    """The dense model's cell and the wanted ones that there are, with their scores; and the failures of methods."""
    count = 1 + len(wanted)
    place = f"compare: 1/{count}, {DENSE}"
    dense = cells.of.get((DENSE, 1.0))
    if dense is None:
        say(place)
        dense = cells.keep(_measure(bench, DENSE, 1.0, bench.grid.dense(), 0.0))
    parts, failures = bench.judge.parts, list[str]()
    chosen = [_with_scores(bench, cells, replace(dense, parts=parts), requests, place)]
    for number, (method, kept) in enumerate(wanted, 2):
        name = f"{method} at params={kept:.4g}"
        place = f"compare: {number}/{count}, {name}"
        try:
            cell = cells.of.get((method, kept)) or _measure_method(bench, cells, method, kept, place)
        except DarwinError as error:
            failures.append(f"{name}: {error}")
            say(failures[-1])
            continue
        chosen.append(_with_scores(bench, cells, replace(cell, parts=parts), requests, place))
    return chosen, failures


def _measure_method(bench: _Bench, cells: Cells, method: str, kept: float, place: str) -> Cell:
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
    bos = bos_of(bench.judge.tokenizer)
    wanted, dense_parameters = replace(bench.run, target=f"params={kept!r}"), parameter_count(bench.searched.dense)
    uniform_genome, budget = uniform(bench.grid, bench.costs, wanted, dense_parameters)
    state = Path(config.out) / "state" / f"{method.name}-{kept:g}"
    problem = Problem(
        stitcher=bench.searched,
        budget=budget,
        uniform=uniform_genome,
        fitness=Fitness(bench.searched, text, bench.tokens["training"], scored_by, bos, counts=bench.counts),
        token_ids=text,
        calibration=bench.tokens["calibration"],
        config=settings,
        seed=config.seed,
        state=state,
    )
    used = state.with_name(f"{state.name}.stages.json")
    if not state.exists():  # what an earlier process spent has left nothing
        used.unlink(missing_ok=True)
    stages = Stages(used, resolve_device(config.device))
    with stages.measured("search"):
        genome = method.allocate(problem)
    assert budget.fits(genome)
    return genome, stages.used["search"].seconds


def _write_page(out: Path, bench: _Bench, cells: Sequence[Cell]) -> None:
    config, run = bench.config, Run(bench.run.out)
    facts = CellsFacts(
        title=f"{short_name(config.model)} pruned by {len({cell.method for cell in cells[1:]})} methods",
        cells=cells,
        protocol=_protocol(bench),
        settings={"Model": config.model, "Text": config.data, "Seed": str(config.seed), "Versions": versions_text()},
        provenance=bench.made_from,
        recipe=run.recipe,
        stages=Stages(run.stages_path, resolve_device(config.device)).used,
    )
    write_page(out / NAME, facts.title, comparison_lead(cells), comparison_sections(facts))


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
    length = config.calibration.sequence_length
    data = own_text(run, checkpoint, path, device)
    corpus = read_corpus(data, checkpoint.tokenizer, length, config.seed, config.loss_tokens)
    drawn, parts = draw_counted(corpus, run), corpus.draw_parts(config.evaluation.tokens)
    texts = parts | draw_texts(corpus, run)
    manifest = read_record(path / "database" / MANIFEST, "provenance")
    database = Database(path / "database", grid, manifest["provenance"])
    precisions = (resolve_dtype(config.dtype, device), checkpoint.dtype)
    models = {dtype: checkpoint.load(dtype, device) for dtype in dict.fromkeys(precisions)}
    searched = Stitcher(models[precisions[0]], checkpoint.family, database)
    judged = Stitcher(models[precisions[1]], checkpoint.family, database, kept_bytes=0)
    costs = parameter_costs(grid, parameter_count(searched.dense))
    of_text = drawn["evaluation"], texts
    judge = Judge(judged.dense, *of_text, checkpoint.tokenizer, config.evaluation, config, tuple(parts))
    made = made_from(checkpoint, manifest["provenance"])
    tokens, counts = apart(drawn)
    return _Bench(config, run, grid, costs, searched, judged, judge, tokens, counts, made)


def _measure(bench: _Bench, method: str, kept: float, genome: Genome, seconds: float) -> Cell:
    """The cell of a genome, with perplexity, KL and speed measured beside the dense model's."""
    cell = Cell(method, kept, levels=genome.levels, parameters=bench.costs.of(genome), seconds=seconds)
    return bench.judge.measure(cell, bench.judged.stitch(genome))


def _with_scores(bench: _Bench, cells: Cells, cell: Cell, requests: list[Request], place: str) -> Cell:
    return bench.judge.with_scores(cells, cell, lambda: bench.searched.stitch(Genome(cell.levels)), requests, place)
