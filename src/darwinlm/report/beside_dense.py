"""Answers of models beside the dense one's, question by question: a table, the mean over tasks, and who leads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from darwinlm.evaluation.paired import NOTE, Difference, difference, mean_difference
from darwinlm.evaluation.tasks import LIKELIHOOD, Score, is_share
from darwinlm.report import answering, tables
from darwinlm.report.comparison import DENSE, Cell, answers_of

TITLE = "Answers beside the dense model's"
MEAN = f"{LIKELIHOOD}, mean of tasks"


def cells_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table, in which the dense model has its own figures; none without tasks."""
    dense = cells[0]
    scores = [score for score in dense.scores if score.by_question]
    if not scores:
        return [], []
    by_task = [f"{score.task} {score.metric}" for score in scores]
    rows = [["", DENSE, *map(str, scores), ""]]
    for cell in (cell for cell in cells[1:] if cell.refused is None):
        found = [_text(difference(_of(cell, score).by_question, score.by_question), score.metric) for score in scores]
        rows.append([cell.size, cell.method, *found, _text(mean(cell, dense), LIKELIHOOD)])
    return ["kept", "method", *by_task, MEAN], rows


def markdown(cells: Sequence[Cell]) -> list[str]:
    """Return the table and what explains it as lines of Markdown; none without tasks."""
    titles, rows = cells_of(cells)
    if not titles:
        return []
    return [f"## {TITLE}", "", tables.markdown(titles, rows), "", *(f"- {note}" for note in notes(cells)), ""]


def below(cells: Sequence[Cell]) -> list[str]:
    """Return what stands below the table of all figures, as Markdown: answers to tasks and to chat prompts."""
    return [*markdown(cells), *answering.markdown(answers_of(cells))]


def mean(cell: Cell, other: Cell) -> Difference | None:
    """Return by how much a model's log-likelihood of correct answers exceeds another's, the mean over tasks, in nats.

    None if they have not answered the same tasks.
    """
    scores = [score for score in other.scores if score.metric == LIKELIHOOD]
    return mean_difference([(_of(cell, score).by_question or (), score.by_question or ()) for score in scores])


def notes(cells: Sequence[Cell]) -> list[str]:
    """Return what explains the table, and who leads; nothing without tasks."""
    what = f"{LIKELIHOOD}: of the correct answer, in nats a question; it moves where accuracy does not yet"
    return [what, NOTE, *leaders(cells)] if cells_of(cells)[0] else []


def leaders(cells: Sequence[Cell]) -> list[str]:
    """Return for each size which of several methods has the likeliest answers; nothing without tasks."""
    answered = (cell for cell in cells[1:] if mean(cell, cells[0]) is not None)
    return [_led(group, cells[0]) for _, of in groupby(answered, lambda cell: cell.kept) if len(group := list(of)) > 1]


def _led(cells: Sequence[Cell], dense: Cell) -> str:
    """Which method of a size has the likeliest answers, and which others the questions cannot tell from it."""

    def above_dense(cell: Cell) -> float:
        found = mean(cell, dense)
        assert found is not None
        return found.value

    first, *others = sorted(cells, key=above_dense, reverse=True)
    found = {other.method: mean(other, first) for other in others}
    unsure = [method for method, gap in found.items() if gap is None or not gap.real]
    which = f"not told from it: {', '.join(unsure)}" if unsure else "every other method is told from it"
    return f"{first.size}: {first.method} has the likeliest correct answers; {which}"


def _of(cell: Cell, asked: Score) -> Score:
    """The score of a model in the same task by the same metric; without questions if it has none."""
    found = (score for score in cell.scores if (score.task, score.metric) == (asked.task, asked.metric))
    return next(found, Score(asked.task, asked.metric, asked.shots, None, None, 0, "", ()))


def _text(found: Difference | None, metric: str) -> str:
    return "-" if found is None else found.text(is_share(metric))
