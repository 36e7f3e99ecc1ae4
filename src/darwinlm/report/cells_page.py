"""The HTML reports of a frontier and of a comparison: models at several sizes, beside the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from darwinlm.evaluation.tasks import is_share
from darwinlm.genome import Grid
from darwinlm.report import beside_dense, comparison, formats, frontier, tables
from darwinlm.report.charts import Line, Point, axis, layout, lines_chart
from darwinlm.report.comparison import DENSE, HELD_OUT, Cell, answers_of, notes_on, refusals
from darwinlm.report.html import Block, Chart, Note, Section, Table, safe
from darwinlm.report.html import Grid as ChartGrid
from darwinlm.report.run_page import answers_section, provenance_blocks, stages_blocks, writings
from darwinlm.runtime.stages import StageUse
from darwinlm.types import Generation, Genome, Kind


@dataclass(frozen=True, kw_only=True)
class CellsFacts:
    """What the reports of a frontier and of a comparison tell.

    Attributes:
        cells: the dense model's, then the others.
        protocol: how models were made and measured, as sentences.
        settings, provenance, recipe, stages: as in `RunFacts`.
    """

    title: str
    cells: Sequence[Cell]
    protocol: Sequence[str]
    settings: Mapping[str, str]
    provenance: Mapping[str, str]
    recipe: str
    stages: Mapping[str, StageUse]


SHADES = ((0, "#dbe9f6"), (1, "#08306b"))  # of one hue, so that a print in grey tells as much
ON_UNITS = "Darker means that more is left; a cross marks a unit that was removed whole."


@dataclass(frozen=True)
class _Measure:
    """What is drawn over sizes: a title, and the figure of a cell."""

    name: str
    title: str
    of: Callable[[Cell], Point]
    logarithmic: bool = False


def frontier_lead(cells: Sequence[Cell]) -> str:
    """Return what a frontier found, in two sentences."""
    ordered = sorted(cells[1:], key=lambda cell: -cell.parameters)
    largest, smallest, knee = ordered[0], ordered[-1], frontier.find_knee(cells[1:])
    sizes = [tables.parameters(cell.parameters) for cell in (largest, smallest)]
    found = (
        f"Over {len(ordered)} sizes from {sizes[0]} to {sizes[1]} parameters (dense: "
        f"{tables.parameters(cells[0].parameters)}), KL from the dense model on held-out text goes from "
        f"{largest.kl:.3f} to {smallest.kl:.3f} nats a token, and perplexity from {largest.perplexity:.2f} to "
        f"{smallest.perplexity:.2f} (dense: {cells[0].perplexity:.2f})."
    )
    if knee is None:
        return f"{found} The curve has no knee."
    return (
        f"{found} The knee is {knee.method} ({tables.parameters(knee.parameters)}, KL {knee.kl:.3f}): below it, each "
        "parameter that leaves costs more than the average."
    )


def comparison_lead(cells: Sequence[Cell]) -> str:
    """Return which method came closest to the dense model at how many sizes, and by how much at the smallest."""
    by_size: dict[float, list[Cell]] = {}
    for cell in cells[1:]:
        if cell.refused is None and math.isfinite(cell.kl):
            by_size.setdefault(cell.kept, []).append(cell)
    if not by_size:
        return "No method gave a model of any size."
    ranked = {kept: sorted(of, key=lambda cell: cell.kl) for kept, of in by_size.items()}
    wins = [of[0].method for of in ranked.values()]
    best = max(dict.fromkeys(wins), key=wins.count)
    first, *others = ranked[min(ranked)]
    second = f", the next, {others[0].method}, {others[0].kl:.3f}" if others else ""
    return (
        f"Of the methods, {best} has the least KL from the dense model on held-out text at {wins.count(best)} of "
        f"{len(wins)} sizes. At "
        f"{100 * min(ranked):.0f} % of the parameters {first.method} has {first.kl:.3f} nats a token{second}."
    )


def frontier_sections(
    facts: CellsFacts, grid: Grid, histories: Mapping[str, Sequence[Generation]], metric: str
) -> list[Section]:
    """Return the sections of a frontier's page.

    Args:
        grid: says what the levels of the cells mean.
        histories: the generations of the search at every size.
        metric: the name of what the searches minimised.
    """
    cells = facts.cells
    notes = [frontier.NOTE, *([frontier.KNEE_NOTE] if frontier.find_knee(cells[1:]) else [])]
    table = Table(*frontier.cells_of(cells))
    curves = [ChartGrid([_over(size, measure, cells) for size in frontier.SIZES]) for measure in _measures(cells[0])]
    return [
        Section("Sizes", [table, *map(Note, [*notes, *facts.protocol, *notes_on(cells)])]),
        Section("Quality over size", [*curves, *_task_note(cells[0])]),
        Section(formats.TITLE, formats.blocks(cells)),
        _answers(cells),
        answers_section(answers_of(cells)),
        Section("Sizes of units", [*(_units_chart(grid, kind, cells[1:]) for kind in grid.kinds()), Note(ON_UNITS)]),
        Section("Searches", [_histories_chart(histories, metric)] if any(histories.values()) else []),
        *_endings(facts),
    ]


def comparison_sections(facts: CellsFacts) -> list[Section]:
    """Return the sections of a comparison's page."""
    cells = facts.cells
    charts = [_by_method(measure, cells) for measure in (*_measures(cells[0], True), _SPEED)]
    said = [*facts.protocol, *notes_on(cells), *refusals(cells)]
    return [
        Section("Quality over size", [*charts, *_task_note(cells[0])]),
        _answers(cells),
        answers_section(answers_of(cells)),
        Section("All figures", [Table(*comparison.cells_of(cells)), *map(Note, said)]),
        *_endings(facts),
    ]


_SPEED = _Measure("decode", "decoding (times as fast as dense)", lambda cell: Point.exact(cell.speedup[1]))


def _endings(facts: CellsFacts) -> list[Section]:
    written = {cell.name: cell.continuations for cell in facts.cells if cell.continuations}
    return [
        Section("What each model writes", writings(written)),
        Section("Time and memory", stages_blocks(facts.stages)),
        Section("Provenance", provenance_blocks(facts.settings, facts.provenance, facts.recipe)),
    ]


def _measures(dense: Cell, logarithmic: bool = False) -> list[_Measure]:
    """What is drawn over sizes; perplexities of rivals differ so much that their axis is logarithmic."""

    def on(text: str, measure: str) -> Callable[[Cell], Point]:
        return lambda cell: Point.exact(getattr(cell if text == HELD_OUT else cell.texts[text], measure))

    result = []
    for number, text in enumerate((HELD_OUT, *dense.texts)):
        name = Path(text).name
        result.append(_Measure(f"kl-{number}", f"KL, {name} (nats a token)", on(text, "kl"), logarithmic))
        result.append(_Measure(f"perplexity-{number}", f"perplexity, {name}", on(text, "perplexity"), logarithmic))
    if beside_dense.mean(dense, dense) is not None:
        result.append(_Measure("answers", f"{beside_dense.MEAN} (nats above dense)", partial(_above, dense)))
    return [*result, _Measure("tasks", "tasks, mean (%)", _mean_score)] if _shares(dense) else result


def _above(dense: Cell, cell: Cell) -> Point:
    found = beside_dense.mean(cell, dense)
    return Point.exact(math.nan) if found is None else Point(found.value, found.low, found.high)


def _answers(cells: Sequence[Cell]) -> Section:
    """The answers beside the dense model's; the section is empty where no task was asked."""
    titles, rows = beside_dense.cells_of(cells)
    return Section(beside_dense.TITLE, [Table(titles, rows), *map(Note, beside_dense.notes(cells))] if titles else [])


def _shares(cell: Cell) -> list[tuple[float, float]]:
    """The scores that are shares, and their standard errors."""
    found = [(s.value, s.stderr or 0.0) for s in cell.scores if s.value is not None and is_share(s.metric)]
    return [(100 * value, 100 * error) for value, error in found]


def _mean_score(cell: Cell) -> Point:
    shares = _shares(cell)
    if not shares:
        return Point.exact(math.nan)
    mean = math.fsum(value for value, _ in shares) / len(shares)
    error = math.sqrt(math.fsum(error**2 for _, error in shares)) / len(shares)
    return Point(mean, mean - error, mean + error)


def _task_note(dense: Cell) -> list[Block]:
    shares = _shares(dense)
    return [Note(f"Bars at the mean of {len(shares)} tasks are its standard error.")] if shares else []


def _over(size: frontier.Axis, measure: _Measure, cells: Sequence[Cell]) -> Chart:
    """The curve of one measure over one size, with the dense model and the knee."""
    dense, *pruned = cells
    line = Line([size.of(c) for c in pruned], [measure.of(c) for c in pruned], [_said(c, measure) for c in pruned])
    marks = {DENSE: (size.of(dense), measure.of(dense).value)}
    knee = frontier.find_knee(pruned)
    if knee is not None:
        marks[frontier.KNEE] = (size.of(knee), measure.of(knee).value)
    marks = {name: place for name, place in marks.items() if all(map(math.isfinite, place))}
    name = f"{measure.name}-{frontier.SIZES.index(size)}"
    axes = axis(size.label, nticks=6), axis()
    caption = f"{measure.title} over {size.label.partition(' (')[0]}"
    return lines_chart(name, caption, axes, {measure.title: line}, marked=marks, height=300)


def _said(cell: Cell, measure: _Measure) -> str:
    point = measure.of(cell)
    interval = f" ({point.low:.4g} to {point.high:.4g})" if point.high > point.low else ""
    return f"{cell.name} ({tables.parameters(cell.parameters)}): {measure.title} {point.value:.4g}{interval}"


def _by_method(measure: _Measure, cells: Sequence[Cell]) -> Chart:
    """One measure of all methods over the share kept, the larger models to the left."""
    dense, lines = cells[0], {}
    for method in dict.fromkeys(cell.method for cell in cells[1:]):
        of = sorted((c for c in cells if c.method == method and c.refused is None), key=lambda cell: -cell.kept)
        said = [_said(cell, measure) for cell in of]
        lines[method] = Line([100 * cell.kept for cell in of], [measure.of(cell) for cell in of], said)
    scale = {"type": "log", "dtick": "D2"} if measure.logarithmic else {}
    axes = axis("parameters kept (%)", autorange="reversed"), axis(**scale)
    level = measure.of(dense).value
    shown = (DENSE, level) if level > 0 or not measure.logarithmic else None
    return lines_chart(measure.name, measure.title, axes, lines, shown, height=440)


def _units_chart(grid: Grid, kind: Kind, cells: Sequence[Cell]) -> Chart:
    """What each size leaves of the units of a kind: a row for each size, darker where more is left."""
    members = [i for i, unit in enumerate(grid.units) if unit.kind == kind]
    blocks, most = ([getattr(grid.units[i], what) for i in members] for what in ("block", "structures"))
    names = [cell.method for cell in cells]
    left = [[grid.left(Genome(cell.levels))[i] for i in members] for cell in cells]
    shares = [[round(100 * n / of, 1) for n, of in zip(row, most, strict=True)] for row in left]
    rows = [[str(block), str(of), *map(str, row)] for block, of, *row in zip(blocks, most, *left, strict=True)]
    table = Table(["block", DENSE, *names], rows, "The figures of every unit", folded=True)
    what = {"attention": "attention heads", "mlp": "MLP channels", "mixer": "mixers"}[kind]
    hover = [
        [f"{safe(name)}, block {block}: {n:,} of {of:,}" for block, n, of in zip(blocks, row, most, strict=True)]
        for name, row in zip(names, left, strict=True)
    ]
    heat = {"type": "heatmap", "x": blocks, "y": list(map(safe, names)), "z": shares, "zmin": 0, "zmax": 100}
    heat |= {"xgap": 1, "ygap": 1, "colorscale": SHADES, "colorbar": {"thickness": 10, "title": {"text": "% left"}}}
    heat |= {"hovertext": hover, "hoverinfo": "text", "text": [["" if n else "x" for n in row] for row in left]}
    heat |= {"texttemplate": "%{text}", "textfont": {"color": "#08306b"}}
    axes = {"xaxis": axis("decoder block", nticks=12), "yaxis": axis(type="category", autorange="reversed", nticks=0)}
    drawn = layout(110 + 32 * len(cells), **axes)
    return Chart(f"units-{kind}", f"{what[0].upper()}{what[1:]} left at each size", [heat], drawn, table)


def _histories_chart(histories: Mapping[str, Sequence[Generation]], metric: str) -> Chart:
    """The search at every size, generation by generation."""
    lines = {
        target: Line(
            [line.generation for line in history],
            [Point.exact(line.fitness) for line in history],
            [f"{target}, generation {line.generation}: {metric} {line.fitness:.4g}" for line in history],
        )
        for target, history in histories.items()
    }
    uniform = {target: history[0].starts.get("uniform") for target, history in histories.items() if history}
    most = max(map(len, histories.values()))
    rows = [["uniform", *("" if value is None else f"{value:.4g}" for value in uniform.values())]] if uniform else []
    for number in range(most):
        reached = [f"{h[number].fitness:.4g}" if number < len(h) else "" for h in histories.values()]
        rows.append([str(number), *reached])
    table = Table(["generation", *histories], rows, "The figures of every generation", folded=True)
    positive = all(point.value > 0 for line in lines.values() for point in line.points)
    axes = axis("generation"), axis(f"{metric} (nats a token)", **({"type": "log", "dtick": "D2"} if positive else {}))
    return lines_chart("searches", f"Search at each size: {metric} of the best genome", axes, lines, table=table)
