"""A printed table keeps every figure in one piece, whatever its titles are."""

from __future__ import annotations

import contextlib
import io

from hypothesis import given
from hypothesis import strategies as st

from darwinlm.report import tables

WORD = st.text("abcxyz/%0189", min_size=1, max_size=12)
PHRASE = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


@given(st.data(), st.integers(1, 9))
def test_no_figure_is_broken_or_cut(data: st.DataObject, columns: int) -> None:
    titles = data.draw(st.lists(PHRASE, min_size=columns, max_size=columns))
    row = st.lists(PHRASE, min_size=columns, max_size=columns)
    sections = data.draw(st.lists(st.lists(row, min_size=1, max_size=3), min_size=1, max_size=3))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tables.show(titles, sections)
    head, _, body = out.getvalue().partition("─")
    assert sorted(head.split()) == sorted(" ".join(titles).split())
    printed = [line.split() for line in body.splitlines() if line.strip(" ─")]
    assert printed == [" ".join(cells).split() for section in sections for cells in section]


def test_markdown_says_the_same() -> None:
    assert tables.markdown(["model", "KL | nats"], [["dense", "0.0"]]).splitlines() == [
        "| model | KL \\| nats |",
        "| --- | ---: |",
        "| dense | 0.0 |",
    ]
