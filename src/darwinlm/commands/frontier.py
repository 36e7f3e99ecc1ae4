"""`darwinlm frontier`: one database, and over it a pruned model at each of several sizes, to choose one of them.

Every size is a run of its own in a directory of the frontier's, whose search begins at its neighbours' genomes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from random import Random

from transformers import PreTrainedModel

from darwinlm.commands.compress import allocate, build_database, finish, make_fitness, refitted_weights
from darwinlm.commands.formats import check_formats, in_formats
from darwinlm.commands.judging import Cells, Judge, find_requests, note_questions
from darwinlm.commands.run_directory import (
    FRONTIER_SETTINGS,
    SETTINGS,
    THRIFT,
    Run,
    base_of,
    claim,
    explain_failures,
    versions_text,
)
from darwinlm.commands.work import Work, made_from, open_work
from darwinlm.config.evaluation import TasksConfig
from darwinlm.config.files import read_settings
from darwinlm.config.frontier import FrontierConfig
from darwinlm.data.corpus import Drawn
from darwinlm.database.store import Database
from darwinlm.evaluation.tasks import Request
from darwinlm.losses.metrics import label
from darwinlm.report import beside_dense, formats
from darwinlm.report.cells_page import CellsFacts, frontier_lead, frontier_sections
from darwinlm.report.comparison import DENSE, Cell
from darwinlm.report.figures import save_figure
from darwinlm.report.frontier import figure, markdown, print_table
from darwinlm.report.html import NAME, unless_it_fails, write_page
from darwinlm.runtime import parallel
from darwinlm.runtime.files import replaced, write_text
from darwinlm.runtime.names import short_name
from darwinlm.runtime.progress import say
from darwinlm.runtime.stages import Stages
from darwinlm.search.budget import TIMED, Target
from darwinlm.search.costs import parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.mutation import adapt, spread
from darwinlm.search.sensitivity import SENSITIVITIES, find_starts, sensitivities
from darwinlm.types import DarwinError, Genome, SearchResult, SelectionStage, UsageError

TABLE, PICTURE, FORMATS = "frontier.md", "frontier.png", "formats.png"


# Settings that may change later: more sizes, formats and tasks, and how tasks are asked.
OPEN = ("targets", "sizes", "largest", "smallest", "formats", *(each.name for each in fields(TasksConfig)))


def frontier(config: FrontierConfig) -> list[Cell]:
    """Search, refit and measure a model at every size, print the table, and write report and picture.

    What is finished is not done again, so that sizes and tasks can be added.

    Returns:
        The dense model's cell, then those of the sizes, the largest first; none on processes but the first.

    Raises:
        UsageError: if a setting, model, size or text cannot be used.
        DarwinError: if a stage or a task fails. The same call goes on from there.
    """
    out = Path(config.out)
    told = explain_failures(f"the frontier in {out}", THRIFT)
    with told, parallel.together(), parallel.shared_directory(out, lambda: _claim(out, config)):
        requests, asked = find_requests(config, out)
        work, sizes = _open(config, out)
        database = build_database(work)
        results = _search(work, sizes, database)
        for target, at in sizes.items():
            refitted_weights(at, database, "searched", results[target].best)
        if not parallel.first():
            return []
        note_questions(asked, out)
        work, sizes = _with_room(work, sizes)
        cells = _measure(work, sizes, results, database, config, requests)
        below = [*formats.markdown(cells, FORMATS), *beside_dense.below(cells)]
        write_text(out / TABLE, markdown(cells, _protocol(config), PICTURE, below))
        save_figure(out / PICTURE, figure(cells))
        if formats.files(cells):
            save_figure(out / FORMATS, formats.figure(cells))
        with unless_it_fails(out / NAME):
            _write_page(out, config, work, results, cells)
    print_table(cells)
    written = [TABLE, PICTURE, *([FORMATS] if formats.files(cells) else []), NAME]
    print(*(out / name for name in written), sep="\n")
    return cells


def find_size(path: Path, target: str | None) -> Run:
    """The run of a size of a frontier; a size that it lacks is searched first, from its neighbours.

    Raises:
        UsageError: if no size is named, or it cannot be reached.
        DarwinError: as `frontier`.
    """
    config = replace(read_settings(path / FRONTIER_SETTINGS, FrontierConfig), out=str(path), formats=())
    found = [target for target in config.wanted if _run_of(path, target).searched]
    if target is None:
        raise UsageError(
            f"{path} has models of several sizes: expected --target, one of {', '.join(found) or 'none yet'} or a size "
            "between them; name one"
        )
    this = _run_of(path, target)
    if not this.searched:
        told = explain_failures(f"the search in {this.path}", "give it less --memory")
        with told, parallel.shared_directory(path, lambda: None):
            work, sizes = _open(replace(config, targets=(*found, target)), path)
            _search(work, sizes, build_database(work))
    return this


def _run_of(out: Path, target: str) -> Run:
    """The run of a size, in a directory of its name; the slash of a rate is written out."""
    return Run(out / target.replace("/", "-per-"))


def _claim(out: Path, config: FrontierConfig) -> None:
    claim(out, FRONTIER_SETTINGS, config, ("base",), OPEN)
    base = base_of(config)
    Path(base.out).mkdir(exist_ok=True)
    claim(Path(base.out), SETTINGS, base)


def _open(config: FrontierConfig, out: Path) -> tuple[Work, dict[str, Work]]:
    """Open what all sizes share, and each size. What could not even begin leaves its directory to another."""
    base = Run(out / "base")
    try:
        work = open_work(base, base_of(config), "report")
        check_formats(work, config.formats)
        return work, _at_all_sizes(work, config)
    except DarwinError:
        if parallel.first() and not (base.path / "database").exists():
            shutil.rmtree(base.path, ignore_errors=True)
            (out / FRONTIER_SETTINGS).unlink(missing_ok=True)
        raise


def _at_all_sizes(work: Work, config: FrontierConfig) -> dict[str, Work]:
    """The work at every size by its target, the largest first, so that one that cannot be reached is found early."""
    costs = parameter_costs(work.grid, work.dense_parameters)
    sizes = {target: _at(work, config, target) for target in config.wanted}
    return dict(sorted(sizes.items(), key=lambda size: -costs.of(size[1].uniform)))


def _at(work: Work, config: FrontierConfig, target: str) -> Work:
    this = _run_of(Path(config.out), target)
    settings = replace(work.config, out=str(this.path), target=target, reuse=work.config.out)
    if config.latency.table is None and any(each.measure in TIMED for each in Target.parse_all(target)):
        work.at(work.run, replace(work.config, target=target), "search")  # which measures the tables
        settings = replace(settings, latency=replace(config.latency, table=str(work.run.search)))
    return work.at(this, settings, "export")


def _search(work: Work, sizes: Mapping[str, Work], database: Database) -> dict[str, SearchResult]:
    """The best genome of every size; each search starts from sensitivities and from the sizes that are finished."""
    results: dict[str, SearchResult] = {}
    largest = next(iter(sizes.values()))
    if parallel.first():
        work.run.note_precision(work.dtype)  # of the sensitivities, which are kept there
    with work.within_memory():
        fitness = make_fitness(largest, database)
        for number, (target, at) in enumerate(sizes.items(), 1):
            say(f"frontier: {number}/{len(sizes)}, search at {target}")
            if parallel.first():
                at.run.path.mkdir(exist_ok=True)
                claim(at.run.path, SETTINGS, at.config)
            known = {name: size.run.genome for name, size in sizes.items() if name != target and size.run.searched}
            begun = at.run.history_path.exists()  # then it needs no start
            results[target] = allocate(at, fitness, dict if begun else partial(_starts, work, at, fitness, known))
            if parallel.first():
                _keep_sensitivities(work, at)
            parallel.wait_for_all()  # for what the first process writes in the end
    return results


def _keep_sensitivities(work: Work, at: Work) -> None:
    """Let the run of a size have the sensitivities that it started from, as any run has them."""
    kept, own = work.run.search / SENSITIVITIES, at.run.search / SENSITIVITIES
    if kept.exists() and not own.exists():
        with replaced(own) as file:
            shutil.copyfile(kept, file)


def _starts(work: Work, at: Work, fitness: Fitness, known: Mapping[str, Genome]) -> dict[str, Genome]:
    """Starts of the search at a size: those of any search, and genomes of the sizes next to it, made to fit."""
    config, seed, directory = at.config.search, at.config.seed, work.run.search
    starts = find_starts(at.uniform, at.budget, fitness, config, seed, directory)
    stage = SelectionStage(1, config.stages[0].fitness_tokens)
    for name, genome in _neighbours(known, at).items():
        if config.start == "sensitivity":
            table = sensitivities(at.grid, fitness, stage, directory / SENSITIVITIES)
            starts[name] = adapt(genome, at.budget, table)
        else:
            starts[name] = spread(genome, at.budget, Random(seed))
    admitted = {name: genome for name, genome in starts.items() if at.budget.admits(genome)}
    return admitted or starts


def _neighbours(known: Mapping[str, Genome], at: Work) -> dict[str, Genome]:
    """The next larger and the next smaller genome of those that are known, by name."""
    cost = at.budget.cost
    larger = [name for name in known if cost(known[name]) > at.budget.main.limit]
    smaller = [name for name in known if name not in larger]
    next_ones = [min(larger, key=lambda name: cost(known[name]))] if larger else []
    next_ones += [max(smaller, key=lambda name: cost(known[name]))] if smaller else []
    return {name: known[name] for name in next_ones}


def _with_room(work: Work, sizes: Mapping[str, Work]) -> tuple[Work, dict[str, Work]]:
    """The same work, with the dense model outside where the device has no room to judge the largest size beside it."""
    resident = next(iter(sizes.values())).after_search(uniform=False).allowance.resident

    def placed(each: Work) -> Work:
        return replace(each, allowance=replace(each.allowance, resident=resident))

    return placed(work), {target: placed(at) for target, at in sizes.items()}


def _measure(
    work: Work,
    sizes: Mapping[str, Work],
    results: Mapping[str, SearchResult],
    database: Database,
    config: FrontierConfig,
    requests: list[Request],
) -> list[Cell]:
    """The cells of the dense model and of all sizes, with their scores."""
    cells, chosen = Cells(Path(config.out)), []
    held_out, tokenizer = Drawn(work.tokens["evaluation"], work.counts.get("evaluation")), work.checkpoint.tokenizer
    dense = work.dense(work.checkpoint.dtype)
    texts, parts = work.parts | work.texts, tuple(work.parts)
    judge = Judge(dense, held_out, texts, tokenizer, config.evaluation, config, parts)
    for number, target in enumerate((DENSE, *sizes)):
        place = f"frontier: {number}/{len(sizes)}, {target}"
        wanted = _cell(work, target, results.get(target))
        # Stitched when it is first asked for.
        make = partial(_model, sizes[target], database, results[target].best) if number else lambda: dense
        model = cache(make)
        cell = cells.of.get((wanted.method, wanted.kept))
        if cell is None or cell.levels != wanted.levels:
            say(f"{place}: measured")
            cell = cells.keep(judge.measure(wanted, model()))
        cell = in_formats(work, judge, cells, replace(cell, parts=parts), model, config.formats)
        chosen.append(judge.with_scores(cells, cell, model, requests, place))
    return chosen


def _model(work: Work, database: Database, genome: Genome) -> PreTrainedModel:
    """A size's refitted model."""
    return finish(work, database, genome, refitted_weights(work, database, "searched", genome))


def _cell(work: Work, target: str, result: SearchResult | None) -> Cell:
    """The cell of a search's result, or of the dense model, before anything is measured."""
    genome = work.grid.dense() if result is None else result.best
    parameters = parameter_costs(work.grid, work.dense_parameters).of(genome)
    kept = round(parameters / work.dense_parameters, 6)
    seconds = sum(line.seconds for line in result.history) if result else 0.0
    return Cell(target, kept, levels=genome.levels, parameters=parameters, seconds=seconds)


def _write_page(
    out: Path, config: FrontierConfig, work: Work, results: Mapping[str, SearchResult], cells: list[Cell]
) -> None:
    facts = CellsFacts(
        title=f"{short_name(config.model)} at {len(results)} sizes",
        cells=cells,
        protocol=[note.replace("`", "") for note in _protocol(config)],
        settings={"Model": config.model, "Text": config.data, "Seed": str(config.seed), "Versions": versions_text()},
        provenance=made_from(work.checkpoint, work.provenance),
        recipe=(out / FRONTIER_SETTINGS).read_text(encoding="utf-8"),
        stages=Stages(work.run.stages_path, work.device).used,
    )
    histories = {target: result.history for target, result in results.items()}
    sections = frontier_sections(facts, work.grid, histories, label(config.search.metric))
    write_page(out / NAME, facts.title, frontier_lead(cells), sections)


def _protocol(config: FrontierConfig) -> list[str]:
    search = config.search
    return [
        f"{config.model} on {config.data}: {config.calibration.tokens:,} calibration tokens; {search.generations} "
        f"generations of {search.offspring} offspring at each size; refit on {config.refit.tokens:,} tokens; seed "
        f"{config.seed}",
        f"`darwinlm export {config.out} --target SIZE --out DIRECTORY` writes one of them, or a size between them",
    ]
