"""The result of a comparison of methods: its cells, the table for the screen and in Markdown, and the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from darwinlm.evaluation.answering import Answers
from darwinlm.evaluation.quality import Quality
from darwinlm.evaluation.tasks import LIKELIHOOD, Score
from darwinlm.report import tables
from darwinlm.report.left_behind import left_behind
from darwinlm.runtime.files import read_lines, write_lines

DENSE = "dense"
UNIFORM = "uniform"
HELD_OUT = "held-out documents"
CELLS = "cells.jsonl"


# One for each method. The colour-blind can tell the first seven apart (Okabe and Ito), and the rest by their markers.
COLOURS = (
    "#333333", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#882255", "#999933", "#44aa99",
)  # fmt: skip


MARKERS = "osv^Dx*P+h"


@dataclass(frozen=True)
class InFormat:
    """A model in a type of GGUF file: the bytes of its weights there, and its quality with what is left of them.

    Attributes:
        refused: why there is no such file; the figures are then missing.
    """

    bytes: int = 0
    perplexity: float = math.nan
    kl: float = math.nan
    refused: str | None = None


@dataclass(frozen=True)
class Cell:
    """The figures of one method at one size.

    Attributes:
        kept: the share of the dense model's parameters that the model may have; 1 for the dense model.
        refused: if the method gives no model of this size, the reason; the figures are then missing.
        bytes: the size of the weights.
        perplexity, kl: the perplexity, and KL(dense || model) in nats a token, on held-out documents.
        speedup: the speeds of prefill and of decoding, as multiples of the dense model's in the same run.
        uncertain_speed: whether its multiples differed much from turn to turn.
        seconds: the time that the method took to find the genome, without that for the database.
        texts: perplexity and KL on further texts, by name.
        parts: those of the texts that are parts of the mixture that the model was made from.
        scores: the scores in tasks.
        continuations: each prompt, followed by what the model writes.
        answers: its answers to chat prompts, if they were asked for.
        formats: what it is in types of GGUF files, by the type's name.
    """

    method: str
    kept: float
    refused: str | None = None
    levels: tuple[int, ...] = ()
    parameters: int = 0
    bytes: int = 0
    perplexity: float = math.nan
    kl: float = math.nan
    prefill_tokens_per_s: float = math.nan
    decode_tokens_per_s: float = math.nan
    speedup: tuple[float, float] = (1.0, 1.0)
    uncertain_speed: bool = False
    seconds: float = 0.0
    texts: dict[str, Quality] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    continuations: tuple[str, ...] = ()
    answers: Answers | None = None
    formats: dict[str, InFormat] = field(default_factory=dict)

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Cell:
        """Return the cell that an object of JSON describes."""
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in line.items()}
        missing = {"perplexity": math.nan, "kl": math.nan}
        fields["texts"] = {text: Quality(**(missing | quality)) for text, quality in line.get("texts", {}).items()}
        fields["scores"] = tuple(map(_score, line.get("scores", ())))
        fields["answers"] = _answers(line.get("answers"))
        fields["formats"] = {name: InFormat(**figures) for name, figures in line.get("formats", {}).items()}
        return cls(**fields)

    @property
    def line(self) -> dict[str, Any]:
        """The cell as an object of JSON, without figures that are not finite."""
        fields = asdict(self)
        nested = {
            name: {key: _finite(figures) for key, figures in fields[name].items()} for name in ("texts", "formats")
        }
        return {**_finite(fields), **nested}

    @property
    def size(self) -> str:
        """The size as `--targets` takes it: `params=0.8`."""
        return f"params={self.kept:.4g}"

    @property
    def name(self) -> str:
        """The method, with the size where the method does not say it."""
        return self.method if self.method == DENSE or "=" in self.method else f"{self.method}, {self.size}"

    def perplexity_on(self, text: str) -> float:
        """Return the perplexity on a text, which may be `HELD_OUT`."""
        return self.perplexity if text == HELD_OUT else self.texts[text].perplexity


def _score(fields: Mapping[str, Any]) -> Score:
    answers = fields.get("by_question")
    return Score(**{**fields, "by_question": None if answers is None else tuple(answers)})


def _answers(fields: Mapping[str, Any] | None) -> Answers | None:
    if fields is None:
        return None
    limit = fields["limit"]
    return Answers(limit, **{name: tuple(value) for name, value in fields.items() if name != "limit"})


def answers_of(cells: Sequence[Cell]) -> dict[str, Answers]:
    """Return the answers of models to chat prompts, by method and size."""
    return {cell.name: cell.answers for cell in cells if cell.answers is not None}


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not isinstance(value, float) or math.isfinite(value)}


def read_cells(directory: Path) -> list[Cell]:
    """Return the cells that `darwinlm compare --out DIRECTORY` has finished so far, including the dense model's.

    Raises:
        DarwinError: if they are damaged.
    """
    file = directory / CELLS
    return [Cell.of(line) for line in read_lines(file, "method", "kept")[1]] if file.exists() else []


def write_cells(directory: Path, cells: Iterable[Cell]) -> None:
    """Write all cells that are finished."""
    write_lines(directory / CELLS, [cell.line for cell in cells], {})


def cells_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the cells of the table; the first model is the dense one."""
    titles = _titles(cells[0])
    return titles, [_columns(cell, titles) for cell in cells]


def print_table(cells: Sequence[Cell]) -> None:
    """Print the table, with the dense model first, and below it what methods refused."""
    titles = _titles(cells[0])
    tables.show(
        titles, [[_columns(cell, titles) for cell in group] for _, group in groupby(cells, lambda cell: cell.kept)]
    )
    for refusal in refusals(cells):
        print(refusal)


def markdown(cells: Sequence[Cell], protocol: Sequence[str], picture: str, answers: Sequence[str] = ()) -> str:
    """Return Markdown with the table, with the dense model first, notes on how it was measured, and the picture.

    Args:
        protocol: notes on how the figures were measured.
        picture: the path of the picture, as the Markdown refers to it.
        answers: Markdown on the answers beside the dense model's; may be empty.
    """
    titles = _titles(cells[0])
    table = tables.markdown(titles, [_columns(cell, titles) for cell in cells])
    notes = [f"- {note}" for note in [*protocol, *notes_on(cells), *refusals(cells)]]
    return "\n".join([table, "", *notes, "", *answers, f"![Perplexity at every size]({picture})"]) + "\n"


def notes_on(cells: Sequence[Cell]) -> list[str]:
    """Notes for below a table: on each task of the dense model's, and on parts of a mixture that are left behind."""
    tasks = (
        f"{s.task}: {s.questions:,} questions from {s.source}, {s.shots}-shot; shares in per cent"
        for s in cells[0].scores
    )
    return [*dict.fromkeys(tasks), *(note for cell in cells[1:] for note in _left_behind(cell, cells))]


def _left_behind(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    """A sentence for each part on which a model is worse than the uniform one of its size, or than elsewhere."""
    of_uniform = [other for other in cells if (other.method, other.kept) == (UNIFORM, cell.kept) and other.texts]
    own, reference = (
        {part: other.texts[part].kl for part in cell.parts if part in other.texts}
        for other in (cell, of_uniform[0] if of_uniform else cell)
    )
    return [f"{cell.name}: {sentence}" for sentence in left_behind(own, own | reference, "the uniform model")]


def in_table(cell: Cell) -> list[Score]:
    """The scores that the table of all figures has: the tasks' own metrics."""
    return [score for score in cell.scores if score.metric != LIKELIHOOD]


def refusals(cells: Sequence[Cell]) -> list[str]:
    return [f"{cell.method} at {cell.size}: {cell.refused}" for cell in cells if cell.refused is not None]


def _titles(dense: Cell) -> list[str]:
    texts = [f"{measure} {Path(text).name}" for text in dense.texts for measure in ("perplexity", "KL")]
    tasks = [f"{score.task} {score.metric}" for score in in_table(dense)]
    speeds = ["prefill tok/s", "decode tok/s", "seconds to find"]
    return ["kept", "method", "parameters", "perplexity", "KL", *texts, *tasks, *speeds]


def _columns(cell: Cell, titles: Sequence[str]) -> list[str]:
    start = ["" if cell.method == DENSE else cell.size, cell.method]
    if cell.refused is not None:
        return [*start, *["-"] * (len(titles) - 2)]
    prefill, decode = (f"{ratio:.2f}x{'?' if cell.uncertain_speed else ''}" for ratio in cell.speedup)
    qualities = [Quality(cell.perplexity, cell.kl), *cell.texts.values()]
    return [
        *start,
        f"{cell.parameters:,}",
        *(figure for quality in qualities for figure in (f"{quality.perplexity:.2f}", f"{quality.kl:.4f}")),
        *map(str, in_table(cell)),
        f"{cell.prefill_tokens_per_s:.1f} ({prefill})",
        f"{cell.decode_tokens_per_s:.1f} ({decode})",
        f"{cell.seconds:.0f}",
    ]


def figure(cells: Sequence[Cell]) -> Figure:
    """Return a figure of the perplexity over the share kept (compare Figure 4 of the paper).

    It has a panel for each text, and in it a line for each method; the first cell is the dense model's.
    """
    texts = [HELD_OUT, *cells[0].texts]
    result = Figure(figsize=(1 + 6 * len(texts), 4.5), layout="constrained")
    FigureCanvasAgg(result)
    panels: list[Axes] = list(result.subplots(1, len(texts), squeeze=False)[0])
    for axis, text in zip(panels, texts, strict=True):
        _draw(axis, cells, text)
        if len(texts) > 1:
            axis.set_title(Path(text).name, fontsize=10)
    panels[0].set_ylabel("perplexity")
    panels[0].legend(frameon=False, fontsize="small")
    return result


def _draw(axis: Axes, cells: Sequence[Cell], text: str) -> None:
    for number, method in enumerate(dict.fromkeys(cell.method for cell in cells if cell.method != DENSE)):
        plotted = sorted((c for c in cells if c.method == method and c.refused is None), key=lambda cell: -cell.kept)
        axis.plot(
            [100 * cell.kept for cell in plotted],
            [cell.perplexity_on(text) for cell in plotted],
            label=method,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
        )
    axis.axhline(cells[0].perplexity_on(text), color=COLOURS[0], linestyle=":", label=DENSE)
    axis.set_yscale("log")
    axis.set_xlabel("parameters of the dense model that are kept (%)")
    axis.invert_xaxis()
    axis.spines[["top", "right"]].set_visible(False)
