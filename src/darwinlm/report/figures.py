"""Pictures of a run: how much is left of each unit, and the course of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import MaxNLocator

from darwinlm.genome import Grid, prunable_parameters
from darwinlm.report.scales import LEFT, elapsed, percent_left, short, spans
from darwinlm.runtime.files import replaced
from darwinlm.types import Curve, Generation, Genome, Kind

DOTS_PER_INCH = 200


# Colours that can be told apart in print and by the colour-blind (Okabe and Ito).
KIND_COLOURS: dict[Kind, str] = {"attention": "#56b4e9", "mlp": "#e69f00", "mixer": "#009e73"}


SEARCHED = ""  # stands for the search's own tokens among texts
SEARCH_COLOUR = "#0072b2"
TEXT_COLOURS = ("#e69f00", "#009e73", "#cc79a7", "#d55e00")
LINE_COLOURS = ("#333333", "#009e73", "#cc79a7", "#0072b2", "#d55e00")
INK = "#333333"


def levels_figure(grid: Grid, genomes: Mapping[str, Genome]) -> Figure:
    """Return a figure of how much is left of each unit, with attention above MLP, and mixers below where there are any.

    Args:
        genomes: by name; the last one is drawn as bars, the others as lines.
    """
    figure = _figure(4.6)
    kinds = grid.kinds()
    axes: list[Axes] = list(figure.subplots(len(kinds), 1, sharex=True, squeeze=False).flat)
    *others, result = genomes
    bars: list[BarContainer] = []
    lines: dict[str, Artist] = {}
    crosses: dict[str, Artist] = {}
    for axis, (kind, members) in zip(axes, kinds.items(), strict=True):
        blocks = [grid.units[i].block for i in members]
        shares = {name: percent_left(grid, genome, members) for name, genome in genomes.items()}
        bars.append(axis.bar(blocks, shares[result], width=0.8, color=KIND_COLOURS[kind], zorder=2))
        removed = [block for block, percent in zip(blocks, shares[result], strict=True) if percent == 0]
        if removed:
            crosses["removed"] = axis.scatter(
                removed, [4] * len(removed), marker="x", s=20, linewidths=1.3, color=INK, zorder=4
            )
        for number, name in enumerate(others):
            # The line is flat over each block, and has a gap where a block has no unit of the kind.
            edges = [block - 0.5 for block in range(blocks[-1] + 2)]
            left = dict(zip(blocks, shares[name], strict=True))
            values = [left.get(block, float("nan")) for block in range(blocks[-1] + 1)]
            colour = LINE_COLOURS[number % len(LINE_COLOURS)]
            lines[name] = axis.stairs(values, edges, baseline=None, color=colour, linewidth=1.5, zorder=3)
        axis.set_ylabel(LEFT[kind], fontsize=9)
        axis.set_ylim(0, 104)
        axis.set_yticks([0, 25, 50, 75, 100])
        _style(axis)
    axes[-1].set_xlabel("decoder block", fontsize=9)
    axes[-1].set_xlim(-0.7, max((unit.block for unit in grid.units), default=0) + 0.7)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    figure.suptitle(f"What is left of each unit: {' and '.join((result, *others))}", fontsize=10.5)
    if "uniform" in others and (note := note_on_uniform(grid, genomes["uniform"])):
        axes[-1].set_xlabel(f"decoder block\n{note}", fontsize=8)
    entries: dict[str, Any] = {_with_size(grid, name, genomes[name]): line for name, line in lines.items()}
    entries[_with_size(grid, result, genomes[result])] = tuple(bar.patches[0] for bar in bars if bar.patches)
    entries |= crosses
    figure.legend(
        list(entries.values()),
        list(entries),
        handler_map={tuple: HandlerTuple(ndivide=None)},
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


def note_on_uniform(grid: Grid, uniform: Genome) -> str:
    """Return why the uniform genome does not leave the same of all units of a kind; empty where it does."""
    if all(len(set(percent_left(grid, uniform, members))) < 2 for members in grid.kinds().values()):
        return ""
    return "uniform lies between two levels: some units, drawn at random, keep one step more, until its size is used up"


def _with_size(grid: Grid, name: str, genome: Genome) -> str:
    """Return a genome's name, with the share of the units' parameters that it leaves."""
    share = prunable_parameters(grid, genome) / prunable_parameters(grid, grid.dense())
    return f"{name} ({100 * share:.1f} % left overall)"


def search_figure(
    history: Sequence[Generation],
    metric: str,
    curves: Mapping[str, Curve],
    uniform: Mapping[str, float],
) -> Figure:
    """Return a figure of the parent's fitness after each generation, with the time that the search had taken.

    Level lines are of the uniform genome. Where they lie far above, they have a strip of their own, so that the search
    fills its axis.

    Args:
        metric: the name of what the search minimised.
        curves: the parent's KL divergence on other texts, by text.
        uniform: the uniform genome's KL divergence on these texts.
    """
    names = {SEARCHED: f"{metric}, the search's tokens"} | {text: f"KL, {Path(text).name}" for text in curves}
    fitness = tuple((line.generation, line.fitness) for line in history)
    drawn: dict[str, Curve] = {SEARCHED: fitness, **curves}
    beside = {SEARCHED: history[0].starts["uniform"]} if "uniform" in history[0].starts else {}
    beside |= {text: value for text, value in uniform.items() if isfinite(value)}
    ranges = spans((value for curve in drawn.values() for _, value in curve), beside.values())
    figure = _figure(3.6 + 0.2 * len(drawn) + 0.6 * (len(ranges) - 1))
    ratios = [1, 4] if len(ranges) > 1 else [1]
    panels: list[Axes] = list(figure.subplots(len(ranges), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0])
    for panel, limits in zip(panels, reversed(ranges), strict=True):
        panel.set_ylim(*limits)
        _draw_search(panel, history, drawn, beside, names)
        _style(panel)
    axis = panels[-1]
    for i, side in {0: "left", len(history) - 1: "right"}.items():  # below the line, which falls
        label = axis.annotate(short(fitness[i][1]), fitness[i], (0, -14), textcoords="offset points", zorder=4)
        label.set(ha=side, fontsize=8, color=INK)
    axis.set_xlabel("generation (a dot where a better genome was found)", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    beyond = max(0.5, 0.03 * history[-1].generation)
    axis.set_xlim(-beyond, history[-1].generation + beyond)
    figure.supylabel(f"{metric} (nats a token)", fontsize=9)
    figure.suptitle(f"Search: {metric} of the best genome", fontsize=10.5)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    if len(panels) > 1:
        _break(*panels)
    _add_time(panels[0], history)
    return figure


def _draw_search(
    axis: Axes,
    history: Sequence[Generation],
    curves: Mapping[str, Curve],
    uniform: Mapping[str, float],
    names: Mapping[str, str],
) -> None:
    """Draw all curves, and the uniform genome's lines in the same colours; the axis's limits choose what is seen."""
    limits = axis.get_ylim()
    for colour, marker, (text, curve) in zip((SEARCH_COLOUR, *TEXT_COLOURS), " s^Dv", curves.items(), strict=False):
        style: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 1.5} if text == SEARCHED else {"linewidth": 1}
        points = zip(*curve, strict=True)
        axis.plot(*points, color=colour, marker=marker, markersize=4, label=names[text], zorder=2, **style)
    for colour, text in zip((SEARCH_COLOUR, *TEXT_COLOURS), curves, strict=False):
        if text in uniform:
            axis.axhline(uniform[text], color=colour, linestyle="--", linewidth=1.2, label=f"uniform: {names[text]}")
    better = [line for i, line in enumerate(history) if i == 0 or line.genome != history[i - 1].genome]
    places = [line.generation for line in better], [line.fitness for line in better]
    axis.scatter(*places, s=18, color=SEARCH_COLOUR, zorder=3)
    axis.set_ylim(*limits)
    # No tick shares a factor with the others: it would be written where the time is.
    axis.yaxis.set_major_formatter(lambda number, _: f"{number:.4g}")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _break(upper: Axes, lower: Axes) -> None:
    """Mark that the axis goes on in another range."""
    upper.spines["bottom"].set_visible(False)
    upper.tick_params(axis="x", bottom=False)
    upper.yaxis.set_major_locator(MaxNLocator(nbins=2))
    slashes: dict[str, Any] = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 8, "linestyle": "none", "color": INK}
    upper.plot([0], [0], transform=upper.transAxes, clip_on=False, **slashes)
    lower.plot([0], [1], transform=lower.transAxes, clip_on=False, **slashes)


def _add_time(axis: Axes, history: Sequence[Generation]) -> None:
    """Add an axis above with the time that the search had taken after a generation."""
    times, unit = elapsed(history)
    at: dict[float, float] = dict(zip((line.generation for line in history), times, strict=True))
    top = axis.secondary_xaxis("top")
    top.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    top.xaxis.set_major_formatter(lambda number, _: f"{at[number]:.2g}" if number in at else "")
    top.set_xlabel(f"time searched ({unit})", fontsize=9)
    top.tick_params(labelsize=8)
    top.spines["top"].set_visible(False)


def _figure(height: float) -> Figure:
    """Return an empty figure as wide as two columns of a paper, without a change to pyplot's global state."""
    figure = Figure(figsize=(7.0, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axis.set_axisbelow(True)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG file, whole or not at all."""
    with replaced(path) as temporary:
        # The version of matplotlib, which it would note, is no part of the picture.
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
