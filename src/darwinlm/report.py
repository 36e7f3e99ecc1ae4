"""A run's figures and pictures: on the terminal, in `table.json`, and in `report.md` with what it shows."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from rich.table import Table
from rich.text import Text

from darwinlm import tables
from darwinlm.artifact import write_json, write_text
from darwinlm.evaluation.rows import Row
from darwinlm.genome import Grid, prunable_parameters
from darwinlm.types import KINDS, Curve, Generation, Genome, Kind

WIDTH = 100  # columns of what models write
DOTS_PER_INCH = 200
# Colours that remain apart in print and for the colour-blind (Okabe and Ito).
KIND_COLOURS: dict[Kind, str] = {"attention": "#56b4e9", "mlp": "#e69f00"}
UNIT_LABELS: dict[Kind, str] = {"attention": "attention heads left (%)", "mlp": "MLP channels left (%)"}
TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
SEARCH_COLOUR = "#0072b2"
TEXT_COLOURS = ("#e69f00", "#009e73", "#cc79a7", "#d55e00")
LINE_COLOURS = ("#333333", "#009e73", "#cc79a7", "#0072b2", "#d55e00")
INK = "#333333"


@dataclass(frozen=True)
class _Column:
    title: str
    value: Callable[[Row], float]
    text: Callable[[Row], str]
    ratio: str = ""
    """How the ratio to the dense model is written, if at all."""


COLUMNS = (
    _Column("parameters", lambda row: row.parameters, lambda row: tables.parameters(row.parameters), "{:.0%}"),
    _Column("perplexity", lambda row: row.perplexity, lambda row: f"{row.perplexity:.2f}"),
    _Column("KL", lambda row: row.kl, lambda row: f"{row.kl:.4f}"),
    _Column(
        "prefill tok/s", lambda row: row.prefill_tokens_per_s, lambda row: _rate(row.prefill_tokens_per_s), "{:.2f}x"
    ),
    _Column("decode tok/s", lambda row: row.decode_tokens_per_s, lambda row: _rate(row.decode_tokens_per_s), "{:.2f}x"),
    _Column("size", lambda row: row.bytes, lambda row: tables.size(row.bytes)),
)


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """All columns: those of further texts stand after the figures on held-out documents."""
    columns, place = list(COLUMNS), [column.title for column in COLUMNS].index("KL") + 1
    for text in reversed(rows[0].texts):
        columns[place:place] = _of_text(text)
    return columns


def _titles(columns: Sequence[_Column]) -> list[str]:
    return ["model", *(column.title for column in columns)]


def _of_text(text: str) -> tuple[_Column, _Column]:
    name = Path(text).name
    return (
        _Column(
            f"perplexity {name}",
            lambda row: row.texts[text].perplexity,
            lambda row: f"{row.texts[text].perplexity:.2f}",
        ),
        _Column(f"KL {name}", lambda row: row.texts[text].kl, lambda row: f"{row.texts[text].kl:.4f}"),
    )


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _cells(row: Row, dense: Row, columns: Sequence[_Column]) -> list[str]:
    cells = []
    for column in columns:
        cell = column.text(row)
        if column.ratio:
            share = column.value(row) / column.value(dense) if column.value(dense) else 1.0
            # Padded to one width, so that the numbers of a right-aligned column stand below each other.
            cell += f"{'(' + column.ratio.format(share).replace('%', ' %') + ')':>8}"
        cells.append(cell)
    return cells


def print_table(rows: Sequence[Row]) -> None:
    """Print the table on standard output, and below it what each model makes of each prompt.

    The first row is the dense model; what follows a figure in brackets is its ratio to that model's.
    """
    columns = _columns(rows)
    tables.show(_titles(columns), [[[row.model, *_cells(row, rows[0], columns)] for row in rows]])
    console = tables.screen(WIDTH)
    for texts in _by_prompt(rows):
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        for row, text in zip(rows, texts, strict=True):
            grid.add_row(Text(row.model), Text(text))
        console.print(grid)
        console.print()


def _by_prompt(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """For each prompt, what each model made of it, on one line."""
    return [
        tuple(" ".join(text.split()) for text in texts) for texts in zip(*(r.continuations for r in rows), strict=True)
    ]


def write_report(
    out: Path,
    title: str,
    rows: Sequence[Row],
    grid: Grid,
    genomes: Mapping[str, Genome],
    history: Sequence[Generation],
    settings: Mapping[str, str],
    metric: str,
    curves: Mapping[str, Curve],
) -> list[Path]:
    """Write a run's report to the directory `out`, and return the files: `report.md` and what it refers to.

    Args:
        rows: one a model, the dense one first.
        genomes: by name; the last is the result, those before it are drawn as lines to compare it with.
        history: the search, or nothing. A picture of which there is nothing to show is not written.
        settings: what made this run, as it should be read.
        metric: what the search minimised, for people.
        curves: KL of its parents on other texts, by text.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, str] = {}
    if genomes:
        save_figure(out / "levels.png", _levels_figure(grid, genomes))
        pictures["levels.png"] = "Share of each attention and each MLP that is left, block by block"
    if history:
        save_figure(out / "search.png", _search_figure(history, metric, curves))
        pictures["search.png"] = f"{metric} of the best genome, generation by generation, and KL on text it never saw"
    write_json(out / "table.json", [_record(row) for row in rows])
    write_text(out / "report.md", _markdown(title, rows, settings, pictures))
    return [out / name for name in ("report.md", "table.json", *pictures)]


def _record(row: Row) -> dict[str, object]:
    return {
        "model": row.model,
        "parameters": row.parameters,
        "perplexity": row.perplexity,
        "kl": row.kl,
        "prefill_tokens_per_s": row.prefill_tokens_per_s,
        "decode_tokens_per_s": row.decode_tokens_per_s,
        "bytes": row.bytes,
        "texts": {text: asdict(quality) for text, quality in row.texts.items()},
    }


NOTE = """\
KL is KL(dense ‖ model) in nats a token; perplexity and KL are over the same held-out tokens{texts}.
Speeds are medians of alternating runs of the models on one machine, one sequence at a time. In brackets: the ratio to
{dense}."""
NOTE_ON_TEXTS = ", and over as many from the beginning of each text that is named, which no stage has seen"

LOADING = """\
## Loading the model

From this directory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("model")
```

`trust_remote_code` reads `modeling_pruned_*.py` beside the weights, which gives each block its own sizes. It needs
torch and transformers, not `darwinlm`. Where all blocks have one size there is no such file, and no need of it.
"""


def _markdown(title: str, rows: Sequence[Row], settings: Mapping[str, str], pictures: Mapping[str, str]) -> str:
    lines = [f"# {title}", ""]
    if settings:
        lines += [tables.markdown(["setting", "value"], list(settings.items())), ""]
    lines += ["## Models", "", models_table(rows), ""]
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", ""]
    written = _by_prompt(rows)
    if written:
        lines += ["## Continuations", "", "Greedy, each from the same prompt.", ""]
    indent = max(len(row.model) for row in rows) + 2
    for texts in written:
        lines.append("```text")
        for row, text in zip(rows, texts, strict=True):
            first = row.model.ljust(indent)
            # A run of backticks in a text must not end the block.
            text = text.replace("```", "'''")
            lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * indent) or [row.model]
        lines += ["```", ""]
    return "\n".join(lines) + "\n" + LOADING


def models_table(rows: Sequence[Row]) -> str:
    """The models' figures as a Markdown table, and what they are."""
    columns = _columns(rows)
    table = tables.markdown(_titles(columns), [[row.model, *_cells(row, rows[0], columns)] for row in rows])
    note = NOTE.format(dense=rows[0].model, texts=NOTE_ON_TEXTS if rows[0].texts else "")
    return "\n".join([table, "", note])


def _levels_figure(grid: Grid, genomes: Mapping[str, Genome]) -> Figure:
    """What is left of each unit, attention above MLP: the last genome as bars, the others as lines."""
    figure = _figure(4.6)
    axes: list[Axes] = list(figure.subplots(2, 1, sharex=True))
    *others, result = genomes
    bars: list[BarContainer] = []
    lines: dict[str, Artist] = {}
    crosses: dict[str, Artist] = {}
    for axis, kind in zip(axes, KINDS, strict=True):
        members = [i for i, unit in enumerate(grid.units) if unit.kind == kind]
        blocks = [grid.units[i].block for i in members]
        left = {name: _percent_left(grid, genome, members) for name, genome in genomes.items()}
        bars.append(axis.bar(blocks, left[result], width=0.8, color=KIND_COLOURS[kind], zorder=2))
        gone = [block for block, percent in zip(blocks, left[result], strict=True) if percent == 0]
        if gone:
            crosses["removed"] = axis.scatter(
                gone, [4] * len(gone), marker="x", s=20, linewidths=1.3, color=INK, zorder=4
            )
        for number, name in enumerate(others):
            # Every unit has a flat piece of its own, as wide as its block.
            edges = [block - 0.5 for block in blocks] + [block + 0.5 for block in blocks[-1:]]
            colour = LINE_COLOURS[number % len(LINE_COLOURS)]
            lines[name] = axis.stairs(left[name], edges, baseline=None, color=colour, linewidth=1.5, zorder=3)
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
    """A genome's name, and what it leaves of the parameters of all units."""
    share = prunable_parameters(grid, genome) / prunable_parameters(grid, grid.dense())
    return f"{name} ({100 * share:.1f} % left overall)"


def _percent_left(grid: Grid, genome: Genome, members: Sequence[int]) -> list[float]:
    """Structures that are left of each of these units, in per cent."""
    return [100 * (1 - grid.removed[i][genome.levels[i]] / grid.units[i].structures) for i in members]


def _search_figure(history: Sequence[Generation], metric: str, curves: Mapping[str, Curve]) -> Figure:
    """The parent's fitness after each generation, its KL on other texts, and the time that the search had taken."""
    figure = _figure(3.3)
    axis: Axes = figure.subplots()
    numbers = [line.generation for line in history]
    fitness = [line.fitness for line in history]
    axis.step(numbers, fitness, where="post", color=SEARCH_COLOUR, linewidth=1.5, zorder=2)
    better = [i for i in range(len(history)) if i == 0 or history[i].genome != history[i - 1].genome]
    axis.scatter([numbers[i] for i in better], [fitness[i] for i in better], s=18, color=SEARCH_COLOUR, zorder=3)
    for i in {0, len(history) - 1}:
        place = (0, -16) if curves else (0, 8)  # where no curve runs: those of other texts are higher
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
    """A figure as wide as two columns of a paper, with a canvas of its own: pyplot's global state is not touched."""
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
    temporary = path.with_name(path.name + ".partial")
    # The version of matplotlib, which it would note, is no part of the picture.
    figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    os.replace(temporary, path)
