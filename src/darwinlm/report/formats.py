"""Pruning beside quantisation: KL over bytes of every model in every type of GGUF file, and which of them pay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from darwinlm.report import tables
from darwinlm.report.charts import Line, Point, axis, lines_chart
from darwinlm.report.comparison import COLOURS, MARKERS, Cell, InFormat
from darwinlm.report.html import Block, Note, Table

TITLE = "File size: fewer weights or fewer bits"
NOTE = (
    "Bytes are those of the weights in a GGUF file. KL is in nats a token on held-out documents, with those weights "
    "in the dense model's precision; importance is measured on the search's text."
)
LEAST = 1e-4  # nats a token: KL below this is drawn here, for the axis is logarithmic


class File(NamedTuple):
    """A model in a type of file."""

    cell: Cell
    kind: str
    held: InFormat

    @property
    def name(self) -> str:
        """Model and type."""
        return f"{self.cell.name} in {self.kind}"


def files(cells: Sequence[Cell]) -> list[File]:
    """Return every model in every type of file that it can have, with a finite KL."""
    every = (File(cell, kind, held) for cell in cells for kind, held in cell.formats.items())
    return [file for file in every if file.held.refused is None and math.isfinite(file.held.kl)]


def best(cells: Sequence[Cell]) -> list[File]:
    """Return the files that no other file is both smaller and closer to the dense model than, the largest first."""
    chosen: list[File] = []
    for file in sorted(files(cells), key=lambda each: (each.held.bytes, each.held.kl)):
        if not chosen or file.held.kl < chosen[-1].held.kl:
            chosen.append(file)
    return chosen[::-1]


def cells_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table: bytes and KL of each model in each type."""
    kinds = list(dict.fromkeys(kind for cell in cells for kind in cell.formats))
    paying = {(file.cell.name, file.kind) for file in best(cells)}

    def text(cell: Cell, kind: str) -> str:
        held = cell.formats.get(kind)
        mark = "*" if (cell.name, kind) in paying else ""
        if held is not None and held.refused is not None:
            return "-"
        return "" if held is None else f"{tables.size(held.bytes)}, {held.kl:.4f}{mark}"

    return ["model", *kinds], [[cell.name, *(text(cell, kind) for kind in kinds)] for cell in cells if cell.formats]


def notes(cells: Sequence[Cell]) -> list[str]:
    """Return what explains the table, and which files pay."""
    chosen = best(cells)
    listed = ", ".join(f"{file.name} ({tables.size(file.held.bytes)}, {file.held.kl:.3f})" for file in chosen)
    refused = (
        f"{cell.name} in {kind}: {held.refused}"
        for cell in cells
        for kind, held in cell.formats.items()
        if held.refused is not None
    )
    found = (
        f"Of {len(files(cells))} files, {len(chosen)} (*) are such that no other is both smaller and closer: {listed}"
    )
    return [NOTE, found, *refused]


def markdown(cells: Sequence[Cell], picture: str) -> list[str]:
    """Return the table, what explains it and the picture as lines of Markdown; none where no file was judged."""
    if not files(cells):
        return []
    explained = (f"- {note}" for note in notes(cells))
    return [f"## {TITLE}", "", tables.markdown(*cells_of(cells)), "", *explained, "", f"![{TITLE}]({picture})", ""]


def blocks(cells: Sequence[Cell]) -> list[Block]:
    """Return chart, table and notes of a page; none where no file was judged."""
    if not files(cells):
        return []
    lines = {}
    for kind, of in _by_kind(cells):
        said = [f"{each.name}: {tables.size(each.held.bytes)}, KL {each.held.kl:.4g}" for each in of]
        lines[kind] = Line([each.held.bytes / 1e6 for each in of], [Point.exact(_drawn(each)) for each in of], said)
    axes = axis("weights (MB)"), axis("KL (nats a token)", type="log", dtick="D2")
    chart = lines_chart("formats", "KL over bytes, by type of file", axes, lines, height=440)
    return [chart, Table(*cells_of(cells)), *map(Note, notes(cells))]


def figure(cells: Sequence[Cell]) -> Figure:
    """Return the picture of KL over bytes: a line over the sizes for each type, and rings around the files that pay."""
    result = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    FigureCanvasAgg(result)
    panel = result.subplots()
    for number, (kind, of) in enumerate(_by_kind(cells)):
        places = [each.held.bytes / 1e6 for each in of], [_drawn(each) for each in of]
        colour, marker = COLOURS[(number + 1) % len(COLOURS)], MARKERS[number % len(MARKERS)]
        panel.plot(*places, label=kind, color=colour, marker=marker, markersize=5)
    rings = best(cells)
    places = [each.held.bytes / 1e6 for each in rings], [_drawn(each) for each in rings]
    panel.scatter(
        *places, s=110, facecolors="none", edgecolors="#333333", label="no other is smaller and closer", zorder=3
    )
    panel.set_yscale("log")
    panel.set_xlabel("weights (MB)")
    panel.set_ylabel("KL (nats a token)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize="small")
    return result


def _by_kind(cells: Sequence[Cell]) -> Iterator[tuple[str, list[File]]]:
    """The files of each type, the largest model first."""
    for kind in dict.fromkeys(file.kind for file in files(cells)):
        yield kind, sorted((file for file in files(cells) if file.kind == kind), key=lambda each: -each.held.bytes)


def _drawn(file: File) -> float:
    return max(file.held.kl, LEAST)
