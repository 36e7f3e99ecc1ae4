"""What a comparison finds: its cells, the table on the screen and in Markdown, and the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from darwinlm.evaluation.quality import Quality
from darwinlm.evaluation.tasks import Score
from darwinlm.report import tables
from darwinlm.report.figures import save_figure
from darwinlm.runtime.files import read_json_lines

DENSE = "dense"


HELD_OUT = "held-out documents"


CELLS = "cells.jsonl"


# As many as there are methods. The first seven remain apart for the colour-blind (Okabe and Ito), the rest by markers.
COLOURS = (
    "#333333", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#882255", "#999933", "#44aa99",
)  # fmt: skip


MARKERS = "osv^Dx*P+h"


@dataclass(frozen=True)
class Cell:
    """One method at one size.

    Attributes:
        target: share of the prunable parameters that the model had to lose; 0 for the dense model.
        refused: why the method has no model of this size, instead of figures.
        kl: KL(dense || model) in nats a token, on held-out documents like the perplexity.
        speedup: of prefill and of decoding, over the dense model in the same run.
        seconds: that it took to find the genome, the database not counted.
        texts: the same qualities on further texts, by name.
        scores: in tasks.
    """

    method: str
    target: float
    refused: str | None = None
    levels: tuple[int, ...] = ()
    parameters: int = 0
    perplexity: float = math.nan
    kl: float = math.nan
    prefill_tokens_per_s: float = math.nan
    decode_tokens_per_s: float = math.nan
    speedup: tuple[float, float] = (1.0, 1.0)
    seconds: float = 0.0
    texts: dict[str, Quality] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Cell:
        """A cell from its line of JSON."""
        found: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in line.items()}
        found["texts"] = {text: Quality(**quality) for text, quality in line.get("texts", {}).items()}
        found["scores"] = tuple(Score(**score) for score in line.get("scores", ()))
        return cls(**found)

    @property
    def line(self) -> str:
        """A line of JSON, without the figures that a refused cell has not."""
        return json.dumps({name: value for name, value in asdict(self).items() if value == value}) + "\n"

    def perplexity_on(self, text: str) -> float:
        """On the held-out documents or on a further text."""
        return self.perplexity if text == HELD_OUT else self.texts[text].perplexity


def read_cells(directory: Path) -> list[Cell]:
    """The cells that `darwinlm compare --out DIRECTORY` has finished so far, the dense model among them."""
    file = directory / CELLS
    return [Cell.of(line) for line in read_json_lines(file, "method", "target")] if file.exists() else []


def print_table(cells: Sequence[Cell]) -> None:
    """Print the table, the dense model first, and what methods refused below it."""
    titles = _titles(cells[0])
    tables.show(titles, [[_columns(cell, titles) for cell in of] for _, of in groupby(cells, lambda cell: cell.target)])
    for refusal in _refusals(cells):
        print(refusal)


def markdown(cells: Sequence[Cell], protocol: Sequence[str], picture: str) -> str:
    """The table, the dense model first, below it how it was measured and what methods refused, and the picture."""
    titles = _titles(cells[0])
    asked = [f"{s.task}: {s.questions:,} questions from {s.source}, {s.shots}-shot; per cent" for s in cells[0].scores]
    table = tables.markdown(titles, [_columns(cell, titles) for cell in cells])
    notes = [f"- {note}" for note in [*protocol, *asked, *_refusals(cells)]]
    return "\n".join([table, "", *notes, "", f"![Perplexity at every size]({picture})"]) + "\n"


def _refusals(cells: Sequence[Cell]) -> list[str]:
    return [f"{cell.method} at {cell.target:.0%}: {cell.refused}" for cell in cells if cell.refused is not None]


def _titles(dense: Cell) -> list[str]:
    texts = [f"{measure} {Path(text).name}" for text in dense.texts for measure in ("perplexity", "KL")]
    tasks = [f"{score.task} {score.metric}" for score in dense.scores]
    speeds = ["prefill tok/s", "decode tok/s", "seconds to find"]
    return ["removed", "method", "parameters", "perplexity", "KL", *texts, *tasks, *speeds]


def _columns(cell: Cell, titles: Sequence[str]) -> list[str]:
    start = ["" if cell.method == DENSE else f"{cell.target:.0%}", cell.method]
    if cell.refused is not None:
        return [*start, *["-"] * (len(titles) - 2)]
    prefill, decode = cell.speedup
    qualities = [Quality(cell.perplexity, cell.kl), *cell.texts.values()]
    return [
        *start,
        f"{cell.parameters:,}",
        *(figure for quality in qualities for figure in (f"{quality.perplexity:.2f}", f"{quality.kl:.4f}")),
        *map(str, cell.scores),
        f"{cell.prefill_tokens_per_s:.1f} ({prefill:.2f}x)",
        f"{cell.decode_tokens_per_s:.1f} ({decode:.2f}x)",
        f"{cell.seconds:.0f}",
    ]


def save_picture(path: Path, cells: Sequence[Cell]) -> None:
    """Perplexity over the share removed, a panel a text and in it a line a method (Figure 4 of the paper)."""
    save_figure(path, figure(cells))


def figure(cells: Sequence[Cell]) -> Figure:
    """The picture, the dense model being the first cell."""
    texts = [HELD_OUT, *cells[0].texts]
    drawn = Figure(figsize=(1 + 6 * len(texts), 4.5), layout="constrained")
    FigureCanvasAgg(drawn)
    panels: list[Axes] = list(drawn.subplots(1, len(texts), squeeze=False)[0])
    for axis, text in zip(panels, texts, strict=True):
        _draw(axis, cells, text)
        if len(texts) > 1:
            axis.set_title(Path(text).name, fontsize=10)
    panels[0].set_ylabel("perplexity")
    panels[0].legend(frameon=False, fontsize="small")
    return drawn


def _draw(axis: Axes, cells: Sequence[Cell], text: str) -> None:
    for number, method in enumerate(dict.fromkeys(cell.method for cell in cells if cell.method != DENSE)):
        found = sorted((c for c in cells if c.method == method and c.refused is None), key=lambda cell: cell.target)
        axis.plot(
            [100 * cell.target for cell in found],
            [cell.perplexity_on(text) for cell in found],
            label=method,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
        )
    axis.axhline(cells[0].perplexity_on(text), color=COLOURS[0], linestyle=":", label=DENSE)
    axis.set_yscale("log")
    axis.set_xlabel("prunable parameters removed (%)")
    axis.spines[["top", "right"]].set_visible(False)
