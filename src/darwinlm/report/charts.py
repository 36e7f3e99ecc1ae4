"""Charts of the HTML report, as plotly's JSON: sizes of units, the search, and figures of models with their intervals.

Every trace has a marker, a dash or a pattern of its own, so that colour is not needed, and each colour stands out from
a white page and from a black one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import Any

from darwinlm.genome import Grid
from darwinlm.report.html import Chart, Table, safe
from darwinlm.report.scales import LEFT, elapsed, percent_left, short, spans
from darwinlm.types import Curve, Generation, Genome, Kind

COLOURS = (
    "#1c7ec0", "#d55e00", "#009e73", "#c0629a", "#a97f00", "#6f6fd0", "#7a7a7a", "#b04a4a", "#3f8fa8", "#5b8c3a",
)  # fmt: skip
GREY = "#7a7a7a"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagram")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PATTERNS = ("", "/", "x", ".", "+", "-")


STRUCTURES: dict[Kind, str] = {"attention": "heads", "mlp": "channels", "mixer": "mixers"}

SEARCHED = "the search's tokens"


Trace = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A measured figure, and the interval around it; both ends are the figure itself where there is none."""

    value: float | int
    low: float | int
    high: float | int

    @classmethod
    def exact(cls, value: float | int) -> Point:
        """A figure without an interval."""
        return cls(value, value, value)


def layout(height: int, **changes: Any) -> dict[str, Any]:
    """Return the layout that all charts share; colours of texts and lines are the page's.

    Args:
        height: in CSS pixels; the width is the page's.
    """
    shared: dict[str, Any] = {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#30363d", "font": {"color": "#ffffff"}, "align": "left"},
    }
    return shared | changes


def axis(title: str = "", **changes: Any) -> dict[str, Any]:
    """Return an axis with a title; numbers of its ticks are as short as they can be."""
    shared = {"title": {"text": safe(title)}, "automargin": True, "gridcolor": "#d0d7de", "zeroline": False}
    return shared | {"exponentformat": "e", "nticks": 8} | changes


def levels_chart(
    grid: Grid,
    genomes: Mapping[str, Genome],
    sensitivities: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
) -> Chart:
    """Return a chart of how much is left of each unit, with attention above MLP, and mixers below where there are any.

    Args:
        genomes: by name; the last one is drawn as bars, the others as lines.
        sensitivities: the rise of the fitness with one unit at one level, by unit and level; may be empty.
        errors: the squared output error, by unit and level; may be empty.
    """
    data: list[Trace] = []
    rows: list[list[str]] = []
    *others, result = genomes
    kinds = grid.kinds()
    for panel, (kind, members) in enumerate(kinds.items()):
        facts = [_unit_facts(grid, i, genomes, sensitivities, errors) for i in members]
        rows += [list(fact.values()) for fact in facts]
        place = {"xaxis": "x", "yaxis": f"y{len(kinds) - panel}"}
        blocks = [grid.units[i].block for i in members]
        left = {name: [round(share, 2) for share in percent_left(grid, genomes[name], members)] for name in genomes}
        bars = left[result]
        hover = ["<br>".join(f"{safe(what)}: {safe(value)}" for what, value in fact.items()) for fact in facts]
        marker = {"color": COLOURS[panel], "pattern": {"shape": PATTERNS[panel]}}
        shared = {"hovertext": hover, "hoverinfo": "text", **place}
        data.append({"type": "bar", "x": blocks, "y": bars, "name": f"{result}: {kind}", "marker": marker, **shared})
        gone = [i for i, share in enumerate(bars) if not share]
        if gone:
            marks = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": COLOURS[panel]}}
            named = {"name": f"{kind} removed", "marker": marks, "mode": "markers", "type": "scatter"}
            at = {"x": [blocks[i] for i in gone], "y": [4] * len(gone)}
            data.append({**named, **at, **shared, "hovertext": [hover[i] for i in gone]})
        for number, name in enumerate(others):
            style = {"color": GREY, "dash": DASHES[number], "shape": "hvh", "width": 2}
            line = {"x": blocks, "y": left[name], "line": style}
            named = {"name": safe(name), "legendgroup": name, "showlegend": not panel, "hoverinfo": "skip"}
            data.append({"type": "scatter", "mode": "lines", **line, **named, **place})
    shared = {"range": [0, 105], "tickvals": [0, 25, 50, 75, 100]}
    axes = {"xaxis": axis("decoder block", anchor="y", nticks=12)}
    for place, kind in enumerate(reversed(kinds), start=1):  # from below
        domain = [round((place - 1) * 1.08 / len(kinds), 2), round(place * 1.08 / len(kinds) - 0.08, 2)]
        axes[f"yaxis{place}" if place > 1 else "yaxis"] = axis(LEFT[kind], domain=domain, **shared)
    titles = list(_unit_facts(grid, 0, genomes, sensitivities, errors))
    table = Table(titles, rows, "The figures of every unit", folded=True)
    return Chart("levels", f"What is left of each unit: {result}", data, layout(480, bargap=0.2, **axes), table)


def _unit_facts(
    grid: Grid,
    index: int,
    genomes: Mapping[str, Genome],
    sensitivities: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
) -> dict[str, str]:
    """What is told of a unit, by title."""
    unit, highest = grid.units[index], grid.highest(index)
    facts = {"unit": f"block {unit.block}, {unit.kind}"}
    for name, genome in genomes.items():
        left = grid.left(genome)[index]
        facts[f"left in {name}"] = f"{left:,} of {unit.structures:,} {STRUCTURES[unit.kind]}"
    level = list(genomes.values())[-1].levels[index]
    facts["level"] = f"{level} of {highest}"
    if sensitivities:
        facts["sensitivity (nats a token)"] = short(sensitivities[index][level])
    if errors:
        most = errors[index][highest]
        facts["output error (% of the unit's removal)"] = f"{100 * errors[index][level] / most:.1f}" if most else "0.0"
    return facts


def search_chart(
    history: Sequence[Generation], metric: str, curves: Mapping[str, Curve], uniform: Mapping[str, float]
) -> Chart:
    """Return a chart of every generation, with the uniform genome as level lines. Arguments are as `search_figure`'s.

    Where the uniform genome lies far above, its lines have a strip of their own.
    """
    names = {SEARCHED: f"{metric}, {SEARCHED}"} | {text: f"KL, {Path(text).name}" for text in curves}
    drawn: dict[str, Curve] = {SEARCHED: tuple((line.generation, line.fitness) for line in history), **curves}
    beside = {SEARCHED: history[0].starts["uniform"]} if "uniform" in history[0].starts else {}
    beside |= {text: value for text, value in uniform.items() if isfinite(value)}
    ranges = spans((value for curve in drawn.values() for _, value in curve), beside.values())
    ends = [history[0].generation, history[-1].generation]
    data: list[Trace] = []
    for number, (text, curve) in enumerate(drawn.items()):
        colour, (numbers, values) = COLOURS[number], zip(*curve, strict=True)
        trace: Trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "x": numbers,
            "y": values,
            "name": safe(names[text]),
        }
        trace |= {"marker": {"symbol": SYMBOLS[number], "color": colour, "size": 7}, "line": {"color": colour}}
        if text == SEARCHED:
            trace["line"]["shape"] = "hv"
            trace |= {"hovertext": [_generation_text(line, metric) for line in history], "hoverinfo": "text"}
        data.append(trace)
        if text in beside:
            far = len(ranges) > 1 and beside[text] >= ranges[1][0]
            line = {"color": colour, "dash": "dash", "width": 2}
            label = f"uniform: {names[text]}, {short(beside[text])}"
            level = {"x": ends, "y": [beside[text]] * 2, "mode": "lines", "line": line, "yaxis": "y2" if far else "y"}
            data.append(
                {"type": "scatter", "name": safe(label), "hovertext": safe(label), "hoverinfo": "text", **level}
            )
    top = 0.78 if len(ranges) > 1 else 1
    # The title would be cut in two by the strip above.
    axes = {"xaxis": axis("generation", anchor="y"), "yaxis": axis(f"{metric} (nats a token)", domain=[0, top])}
    axes["yaxis"]["range"] = ranges[0]
    if len(ranges) > 1:
        axes["yaxis2"] = axis("uniform", domain=[top + 0.05, 1], range=ranges[1], nticks=3)
    table = _search_table(history, metric, drawn, beside, names)
    return Chart("search", f"Search: {metric} of the best genome", data, layout(460, **axes), table)


def _generation_text(line: Generation, metric: str) -> str:
    facts = [
        f"generation {line.generation}: {metric} {line.fitness:.4g}",
        f"{line.scored} genomes scored in {line.seconds:.1f} s",
        f"best: {line.origin}" if line.origin else "",
        "after each stage: " + ", ".join(map(short, line.stage_fitness)) if line.stage_fitness else "",
    ]
    return "<br>".join(safe(fact) for fact in facts if fact)


def _search_table(
    history: Sequence[Generation],
    metric: str,
    curves: Mapping[str, Curve],
    uniform: Mapping[str, float],
    names: Mapping[str, str],
) -> Table:
    times, unit = elapsed(history)
    others = {text: dict(curve) for text, curve in curves.items() if text != SEARCHED}
    stages = max(len(line.stage_fitness) for line in history)
    titles = ["generation", metric, "origin", "genomes", f"time ({unit})"]
    titles += [f"after stage {number}" for number in range(1, stages + 1)] + [names[text] for text in others]
    rows = [
        [
            str(line.generation), f"{line.fitness:.4g}", line.origin, str(line.scored), short(time),
            *(f"{score:.4g}" for score in line.stage_fitness), *[""] * (stages - len(line.stage_fitness)),
            *(f"{curve[line.generation]:.4g}" if line.generation in curve else "" for curve in others.values()),
        ]
        for line, time in zip(history, times, strict=True)
    ]  # fmt: skip
    if uniform:
        figures = [f"{uniform[text]:.4g}" if text in uniform else "" for text in (SEARCHED, *others)]
        rows.insert(0, ["uniform", figures[0], "", "", "", *[""] * stages, *figures[1:]])
    return Table(titles, rows, "The figures of every generation", folded=True)


def points_chart(name: str, caption: str, title: str, points: Mapping[str, Mapping[str, Point]]) -> Chart:
    """Return a chart of one figure of several models on several texts, tasks or works, as dots with intervals.

    Args:
        title: of the figure's axis.
        points: by model, then by what it was measured on.
    """
    data: list[Trace] = []
    for number, (model, values) in enumerate(points.items()):
        known = {what: point for what, point in values.items() if isfinite(point.value)}
        error = {
            "type": "data",
            "symmetric": False,
            "array": [point.high - point.value for point in known.values()],
            "arrayminus": [point.value - point.low for point in known.values()],
            "visible": any(point.high > point.low for point in known.values()),
        }
        marker = {"symbol": SYMBOLS[number % len(SYMBOLS)], "color": COLOURS[number % len(COLOURS)], "size": 10}
        label = [f"{safe(model)}, {safe(what)}: {_with_interval(point)}" for what, point in known.items()]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "orientation": "h",
                "name": safe(model),
                "x": [point.value for point in known.values()],
                "y": [safe(what) for what in known],
                "error_x": error,
                "marker": marker,
                "hovertext": label,
                "hoverinfo": "text",
            }
        )
    rows = len({what for values in points.values() for what in values})
    ends = [end for values in points.values() for point in values.values() for end in (point.low, point.high)]
    ((low, high),) = spans([end for end in ends if isfinite(end)] or [0.0], [])
    names = axis(autorange="reversed", type="category", nticks=0, ticklabelposition="outside top", ticklen=0)
    axes = {"xaxis": axis(title, nticks=6, range=[low, high]), "yaxis": names}
    height = 130 + (20 + 14 * len(points)) * rows
    return Chart(name, caption, data, layout(height, scattermode="group", scattergap=0.3, **axes))


def _with_interval(point: Point) -> str:
    interval = f" ({point.low:.4g} to {point.high:.4g})" if point.high > point.low else ""
    return f"{point.value:.4g}{interval}"


@dataclass(frozen=True)
class Line:
    """A line of a chart: places along the horizontal axis, the figures there, and what is said of each."""

    places: Sequence[float | int]
    points: Sequence[Point]
    said: Sequence[str]


def lines_chart(
    name: str,
    caption: str,
    axes: tuple[Mapping[str, Any], Mapping[str, Any]],
    lines: Mapping[str, Line],
    level: tuple[str, float] | None = None,
    marked: Mapping[str, tuple[float | int, float | int]] | None = None,
    table: Table | None = None,
    height: int = 340,
) -> Chart:
    """Return a chart of lines over sizes or steps.

    Args:
        axes: the horizontal and the vertical one.
        lines: by name.
        level: the name and the height of a dotted level line.
        marked: places that have a ring around them, by what is written there.
    """
    data: list[Trace] = []
    styles = zip(cycle(COLOURS), cycle(SYMBOLS), cycle(DASHES), strict=False)
    for (label, line), (colour, symbol, dash) in zip(lines.items(), styles, strict=False):
        finite = [i for i, point in enumerate(line.points) if isfinite(point.value)]
        points = [line.points[i] for i in finite]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [point.high - point.value for point in points],
            "arrayminus": [point.value - point.low for point in points],
            "visible": any(point.high > point.low for point in points),
            "thickness": 1,
        }
        trace: Trace = {
            "type": "scatter",
            "mode": "lines+markers" if len(finite) < 60 else "lines",
            "name": safe(label),
        }
        trace |= {"x": [line.places[i] for i in finite], "y": [point.value for point in points], "error_y": error}
        trace |= {"line": {"color": colour, "dash": dash}, "marker": {"color": colour, "symbol": symbol, "size": 8}}
        data.append(trace | {"hovertext": [safe(line.said[i]) for i in finite], "hoverinfo": "text"})
    places = [place for line in lines.values() for place in line.places]
    if level is not None and places:
        style = {"mode": "lines", "line": {"color": GREY, "dash": "dot", "width": 2}, "hoverinfo": "skip"}
        ends = {"x": [min(places), max(places)], "y": [level[1]] * 2}
        data.append({"type": "scatter", "name": safe(level[0]), **ends, **style})
    for label, (x, y) in (marked or {}).items():
        ring = {"symbol": "circle-open", "size": 18, "color": GREY, "line": {"width": 2}}
        said = {"mode": "markers+text", "text": [safe(label)], "textposition": "top center", "cliponaxis": False}
        data.append(
            {"type": "scatter", "x": [x], "y": [y], "marker": ring, "hoverinfo": "skip", "showlegend": False, **said}
        )
    horizontal, vertical = axes
    shown = {"xaxis": dict(horizontal), "yaxis": dict(vertical), "showlegend": len(lines) > 1 or level is not None}
    return Chart(name, caption, data, layout(height, **shown), table)
