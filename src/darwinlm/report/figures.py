"""Pictures of a run: how much is left of each unit, and the course of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
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
from darwinlm.runtime.files import replaced
from darwinlm.types import Curve, Generation, Genome, Kind

DOTS_PER_INCH = 200


# Colours that can be told apart in print and by the colour-blind (Okabe and Ito).
KIND_COLOURS: dict[Kind, str] = {"attention": "#56b4e9", "mlp": "#e69f00", "mixer": "#009e73"}


UNIT_LABELS: dict[Kind, str] = {
    "attention": "attention heads left (%)",
    "mlp": "MLP channels left (%)",
    "mixer": "mixers left (%)",
}


TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


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
        shares = {name: _percent_left(grid, genome, members) for name, genome in genomes.items()}
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
        axis.set_ylabel(UNIT_LABELS[kind], fontsize=9)
        axis.set_ylim(0, 104)
        axis.set_yticks([0, 25, 50, 75, 100])
        _style(axis)
    axes[-1].set_xlabel("decoder block", fontsize=9)
    axes[-1].set_xlim(-0.7, max((unit.block for unit in grid.units), default=0) + 0.7)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    figure.suptitle(f"What is left of each unit: {' and '.join((result, *others))}", fontsize=10.5)
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


def _with_size(grid: Grid, name: str, genome: Genome) -> str:
    """Return a genome's name, with the share of the units' parameters that it leaves."""
    share = prunable_parameters(grid, genome) / prunable_parameters(grid, grid.dense())
    return f"{name} ({100 * share:.1f} % left overall)"


def _percent_left(grid: Grid, genome: Genome, members: Sequence[int]) -> list[float]:
    """Return the share of structures that is left of each of these units, in per cent."""
    return [100 * (1 - grid.removed[i][genome.levels[i]] / grid.units[i].structures) for i in members]


def search_figure(history: Sequence[Generation], metric: str, curves: Mapping[str, Curve]) -> Figure:
    """Return a figure of the parent's fitness after each generation, with the time that the search had taken.

    Args:
        metric: the name of what the search minimised.
        curves: the parent's KL divergence on other texts, by text.
    """
    figure = _figure(3.3)
    axis: Axes = figure.subplots()
    numbers = [line.generation for line in history]
    fitness = [line.fitness for line in history]
    axis.step(numbers, fitness, where="post", color=SEARCH_COLOUR, linewidth=1.5, zorder=2)
    improved = [i for i in range(len(history)) if i == 0 or history[i].genome != history[i - 1].genome]
    axis.scatter([numbers[i] for i in improved], [fitness[i] for i in improved], s=18, color=SEARCH_COLOUR, zorder=3)
    for i in {0, len(history) - 1}:
        place = (0, -16) if curves else (0, 8)  # below the line where there are curves, which are above it
        label = axis.annotate(f"{fitness[i]:.3f}", (numbers[i], fitness[i]), place, textcoords="offset points")
        label.set(ha="center", fontsize=8, color=INK)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    for colour, (text, curve) in zip(cycle(TEXT_COLOURS), curves.items()):
        axis.plot(*zip(*curve, strict=True), marker=".", linewidth=1, color=colour, label=f"KL, {Path(text).name}")
    if curves:
        axis.lines[0].set_label(f"{metric}, the search's tokens")
        axis.legend(fontsize=8, frameon=False, loc="lower left")
    axis.set_xlabel("generation (a dot where a better genome was found)", fontsize=9)
    axis.set_ylabel(f"{metric} (nats a token)", fontsize=9)
    axis.set_title(f"Search: {metric} of the best genome", fontsize=10.5, pad=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    highest = max(*fitness, *(value for curve in curves.values() for _, value in curve), 0.0)
    axis.set_ylim(0, 1.15 * highest or 1)
    axis.margins(x=0.03)
    _style(axis)
    elapsed: dict[float, float] = dict(zip(numbers, accumulate(line.seconds for line in history), strict=True))
    size, unit = next((pair for pair in TIME_UNITS if max(elapsed.values()) >= 2 * pair[0]), TIME_UNITS[-1])
    top = axis.secondary_xaxis("top")
    top.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    top.xaxis.set_major_formatter(lambda number, _: f"{elapsed[number] / size:.3g}" if number in elapsed else "")
    top.set_xlabel(f"time searched ({unit})", fontsize=9)
    top.tick_params(labelsize=8)
    top.spines["top"].set_visible(False)
    return figure


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
