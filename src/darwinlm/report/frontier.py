"""The result of a frontier: its table for the screen and in Markdown, the knee of its curve, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from darwinlm.evaluation.quality import Quality
from darwinlm.evaluation.tasks import is_share
from darwinlm.report import tables
from darwinlm.report.comparison import COLOURS, DENSE, HELD_OUT, MARKERS, Cell, in_table, notes_on

KNEE = "knee"
NOTE = """\
KL is KL(dense ‖ model) in nats a token; perplexity and KL are over held-out tokens. Speeds are medians of alternating
runs beside the dense model, one sequence at a time; a question mark is where other work kept the machine busy."""


KNEE_NOTE = """\
The knee is the size that lies farthest below the straight line, over parameters, between the KL of the largest and that
of the smallest model: below it, each parameter that leaves costs more than the average."""


@dataclass(frozen=True)
class Axis:
    """What a picture shows along one of its axes."""

    label: str
    of: Callable[[Cell], float]


SIZES = (
    Axis("parameters (millions)", lambda cell: cell.parameters / 1e6),
    Axis("weights (MB)", lambda cell: cell.bytes / 1e6),
    Axis("prefill (tokens/s)", lambda cell: cell.prefill_tokens_per_s),
    Axis("decoding (tokens/s)", lambda cell: cell.decode_tokens_per_s),
)


def find_knee(cells: Sequence[Cell]) -> Cell | None:
    """Return the model whose KL lies farthest below the line between the largest and the smallest, if any does.

    Args:
        cells: of pruned models.
    """
    ordered = sorted(cells, key=lambda cell: cell.parameters)
    if len(ordered) < 3:
        return None
    (least, most), (low, high) = (
        (of(ordered[0]), of(ordered[-1])) for of in (lambda cell: cell.parameters, lambda cell: cell.kl)
    )

    def below(cell: Cell) -> float:
        line = low + (high - low) * (cell.parameters - least) / (most - least)
        return line - cell.kl

    knee = max(ordered[1:-1], key=below)
    return knee if below(knee) > 0 else None


def cells_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the cells of the table; the first model is the dense one."""
    return _titles(cells[0]), [_columns(cell, cells) for cell in cells]


def print_table(cells: Sequence[Cell]) -> None:
    """Print the table; the first cell is the dense model's, the others are sorted by size."""
    dense, *others = [_columns(cell, cells) for cell in cells]
    tables.show(_titles(cells[0]), [[dense], others])


def markdown(cells: Sequence[Cell], protocol: Sequence[str], picture: str, answers: Sequence[str] = ()) -> str:
    """Return Markdown with the table, notes on how it was measured, and the picture.

    Args:
        cells: the dense model's, then those of the sizes.
        protocol: notes on how models were made.
        picture: the path of the picture, as the Markdown refers to it.
        answers: Markdown on the answers beside the dense model's; may be empty.
    """
    table = tables.markdown(_titles(cells[0]), [_columns(cell, cells) for cell in cells])
    notes = [f"- {note}" for note in [*protocol, *notes_on(cells)]]
    explained = [NOTE, *([KNEE_NOTE] if find_knee(cells[1:]) else [])]
    return "\n".join([table, "", *explained, "", *notes, "", *answers, f"![Quality over size]({picture})"]) + "\n"


def _titles(dense: Cell) -> list[str]:
    texts = [f"{measure} {Path(text).name}" for text in dense.texts for measure in ("perplexity", "KL")]
    tasks = [f"{score.task} {score.metric}" for score in in_table(dense)]
    return ["model", "parameters", "weights", "perplexity", "KL", *texts, *tasks, "prefill tok/s", "decode tok/s", ""]


def _columns(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    dense = cells[0]
    mark = "?" if cell.uncertain_speed else ""
    prefill, decode = (f"{ratio:.2f}x{mark}" for ratio in cell.speedup)
    qualities = [Quality(cell.perplexity, cell.kl), *cell.texts.values()]
    return [
        cell.method,
        f"{tables.parameters(cell.parameters)} ({cell.parameters / dense.parameters:.0%})",
        tables.size(cell.bytes),
        *(figure for quality in qualities for figure in (f"{quality.perplexity:.2f}", f"{quality.kl:.4f}")),
        *map(str, in_table(cell)),
        f"{cell.prefill_tokens_per_s:.1f} ({prefill})",
        f"{cell.decode_tokens_per_s:.1f} ({decode})",
        KNEE if cell is find_knee(cells[1:]) else "",
    ]


def figure(cells: Sequence[Cell]) -> Figure:
    """Return the picture of KL, perplexity and tasks over parameters, bytes and speeds, with the knee marked.

    Args:
        cells: the dense model's, then those of the sizes.
    """
    rows = _measures(cells[0])
    result = Figure(figsize=(3.2 * len(SIZES), 0.6 + 2.7 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(result)
    panels = result.subplots(len(rows), len(SIZES), squeeze=False, sharey="row")
    knee = find_knee(cells[1:])
    for row, (title, lines) in zip(panels, rows.items(), strict=True):
        for axis, size in zip(row, SIZES, strict=True):
            _draw(axis, size, lines, cells, knee)
        row[0].set_ylabel(title)
        if len(lines) > 1:
            row[0].legend(frameon=False, fontsize="x-small")
    for axis, size in zip(panels[-1], SIZES, strict=True):
        axis.set_xlabel(size.label)
    return result


def _measures(dense: Cell) -> dict[str, dict[str, Callable[[Cell], float]]]:
    """What is drawn: for each row of panels, its title, and its lines by name."""

    def on(text: str, name: str) -> Callable[[Cell], float]:
        return lambda cell: getattr(cell if text == HELD_OUT else cell.texts[text], name)

    texts = {Path(text).name: text for text in (HELD_OUT, *dense.texts)}
    rows = {
        "KL (nats a token)": {name: on(text, "kl") for name, text in texts.items()},
        "perplexity": {name: on(text, "perplexity") for name, text in texts.items()},
    }
    if any(is_share(score.metric) for score in dense.scores):
        rows["tasks, mean (%)"] = {
            "tasks": lambda cell: fmean(100 * (s.value or 0.0) for s in cell.scores if is_share(s.metric))
        }
    return rows


def _draw(
    axis: Axes, size: Axis, lines: dict[str, Callable[[Cell], float]], cells: Sequence[Cell], knee: Cell | None
) -> None:
    dense, *pruned = cells
    for number, (name, of) in enumerate(lines.items()):
        colour = COLOURS[(number + 5) % len(COLOURS)]
        places = [size.of(cell) for cell in pruned], [of(cell) for cell in pruned]
        axis.plot(*places, marker=MARKERS[number % len(MARKERS)], markersize=4, color=colour, label=name)
        axis.scatter([size.of(dense)], [of(dense)], marker="*", s=50, color=COLOURS[0], zorder=3)
        axis.annotate(DENSE, (size.of(dense), of(dense)), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        if knee is not None:
            axis.scatter([size.of(knee)], [of(knee)], s=90, facecolors="none", edgecolors=COLOURS[6], zorder=3)
    if knee is not None:
        first = next(iter(lines.values()))
        axis.annotate(KNEE, (size.of(knee), first(knee)), (6, 6), textcoords="offset points", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
