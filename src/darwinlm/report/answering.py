"""How models answer chat prompts, as a table: whether their answers end, and what they repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from darwinlm.evaluation.answering import Answers
from darwinlm.evaluation.paired import NOTE, Difference, difference
from darwinlm.report import tables

TITLE = "Answers to chat prompts"


def cells_of(answers: Mapping[str, Answers]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table, the dense model first; none without answers."""
    if not answers:
        return [], []
    measures = rows_of(list(answers.values()), next(iter(answers.values())))
    return ["model", *measures], [list(row) for row in zip(answers, *measures.values(), strict=True)]


def rows_of(answers: Sequence[Answers | None], dense: Answers | None) -> dict[str, list[str]]:
    """Return, by measure, its figure for every model; shares are in per cent.

    Args:
        dense: the dense model's answers, which the others stand beside.
    """
    found = [one for one in answers if one is not None]
    if not found:
        return {}
    beside = [(None, None) if one is None else _beside(one, dense) for one in answers]
    cut_off, repetition = zip(*beside, strict=True)
    return {
        "answer, median tokens": ["" if one is None else f"{one.median_length:g}" for one in answers],
        f"cut off at {found[0].limit} tokens, %": _shares(answers, "share_cut_off"),
        "cut off, beside dense": _differences(cut_off),
        "repeated 4-grams in answers, %": _shares(answers, "repetition"),
        "repeated, beside dense": _differences(repetition),
    }


def _shares(answers: Sequence[Answers | None], measure: str) -> list[str]:
    return ["" if one is None else f"{100 * getattr(one, measure):.1f}" for one in answers]


def _differences(found: Sequence[Difference | None]) -> list[str]:
    return ["" if one is None else one.text(share=True) for one in found]


def _beside(own: Answers, dense: Answers | None) -> tuple[Difference | None, Difference | None]:
    """By how much more of the answers are cut off than the dense model's, and by how much more they repeat."""
    if dense is None or own is dense:
        return None, None
    return difference(own.cut_off, dense.cut_off), difference(own.repetitions, dense.repetitions)


def record(answers: Answers, dense: Answers | None) -> dict[str, Any]:
    """The answers as JSON has them."""
    return {
        "limit": answers.limit,
        "median_tokens": answers.median_length,
        "share_cut_off": answers.share_cut_off,
        "repetition": answers.repetition,
        "beside_dense": {
            name: None if found is None else {**vars(found), "real": found.real}
            for name, found in zip(("share_cut_off", "repetition"), _beside(answers, dense), strict=True)
        },
        "tokens": answers.lengths,
        "texts": answers.texts,
    }


def note(answers: Answers) -> str:
    """Return how the answers were made and what the measures are."""
    return (
        f"{len(answers.lengths)} prompts through the chat template, answered greedily in at most {answers.limit} "
        "tokens; an answer that has not ended there is cut off; repeated is a 4-gram of tokens that the answer had "
        "before, the mean share over answers"
    )


def markdown(answers: Mapping[str, Answers]) -> list[str]:
    """Return the table and its notes as lines of Markdown; none without answers."""
    titles, rows = cells_of(answers)
    if not titles:
        return []
    said = [note(next(iter(answers.values()))), NOTE]
    return [f"## {TITLE}", "", tables.markdown(titles, rows), "", *(f"- {each}" for each in said), ""]
