"""The HTML report: one file that holds all it needs, asks for nothing else, and can be read without its charts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from darwinlm.report.tables import WORDS
from darwinlm.runtime.files import write_text
from darwinlm.runtime.progress import say

NAME = "report.html"
FOLDER = Path(__file__).parent
LONG = 40  # characters, from which a cell may be broken into lines


@dataclass(frozen=True)
class Table:
    """A table of texts; if `folded`, one opens it by the title."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of plotly's, and a table with the same figures.

    Attributes:
        name: its id in the page.
        data, layout: as plotly's JSON has them. Texts in them are `safe`.
        table: its figures; None where the section has another table with all of them.
    """

    name: str
    caption: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    table: Table | None = None


@dataclass(frozen=True)
class Grid:
    """Charts side by side, where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Writings:
    """What models write, side by side: a text of each model, by its name."""

    texts: Mapping[str, str]


@dataclass(frozen=True)
class Listing:
    """A text as it is, which one opens by its title."""

    title: str
    text: str


Block = Table | Chart | Grid | Note | Writings | Listing


@dataclass(frozen=True)
class Section:
    """A part of the page, left out where it has no blocks."""

    title: str
    blocks: Sequence[Block]


def safe(text: str) -> str:
    """Return a text of others as plotly may show it, which reads some tags."""
    return escape(text, quote=False)


@contextmanager
def unless_it_fails(path: Path) -> Iterator[None]:
    """Let a report that cannot be made be missing, and say why: what it reports on is done."""
    try:
        yield
    except Exception as error:  # whatever it is, hours of work are not to end in it
        say(f"{path} was not written ({type(error).__name__}: {error}); nothing else is missing")


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page.

    Args:
        lead: the sentences that it begins with.
    """
    write_text(path, page(title, lead, sections))


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML. It may run its own two scripts and load nothing, whatever a text in it holds."""
    sections = [section for section in sections if section.blocks]
    charts = [chart for section in sections for chart in _charts(section.blocks)]
    scripts = [get_plotlyjs(), (FOLDER / "page.js").read_text(encoding="utf-8")] if charts else []
    data = {chart.name: {"data": chart.data, "layout": chart.layout} for chart in charts}
    # A "<" in a string could end the script that holds it.
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    body = "\n".join(
        f"<section><h2>{escape(s.title)}</h2>\n{''.join(map(_block, s.blocks))}</section>" for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{(FOLDER / "page.css").read_text(encoding="utf-8")}</style>
<noscript><style>.chart {{ display: none }}</style></noscript>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<noscript><p class="note">Charts need JavaScript. Their figures are in the tables.</p></noscript>
{body}
<script type="application/json" id="charts">{embedded}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def _policy(scripts: Sequence[str]) -> str:
    """The content security policy: these scripts, styles and pictures of the page's own, and nothing from elsewhere."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def _charts(blocks: Sequence[Block]) -> Iterator[Chart]:
    for block in blocks:
        if isinstance(block, Chart):
            yield block
        elif isinstance(block, Grid):
            yield from block.charts


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Chart():
            return _chart(block)
        case Grid():
            return f'<div class="charts">{"".join(map(_chart, block.charts))}</div>\n'
        case Note():
            return f'<p class="note">{escape(block.text)}</p>\n'
        case Writings():
            texts = (f'<div class="text"><b>{escape(k)}</b>{escape(text)}</div>' for k, text in block.texts.items())
            return f'<div class="texts">{"".join(texts)}</div>\n'
        case Listing():
            return f"<details><summary>{escape(block.title)}</summary><pre>{escape(block.text)}</pre></details>\n"


def _chart(chart: Chart) -> str:
    height = chart.layout["height"]
    drawn = f'<div class="chart" id="{escape(chart.name)}" style="height:{height}px"></div>'
    table = _table(chart.table) if chart.table else ""
    return f"<figure><figcaption>{escape(chart.caption)}</figcaption>{drawn}{table}</figure>\n"


def _table(table: Table) -> str:
    words = [title in WORDS for title in table.titles]
    head = "".join(
        f"<th{' class=words' * is_word}>{escape(t)}</th>" for t, is_word in zip(table.titles, words, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row, words))}</tr>\n" for row in table.rows)
    drawn = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{drawn}</details>\n"
    return (f"<h3>{escape(table.title)}</h3>" if table.title else "") + drawn + "\n"


def _cell(text: str, is_word: bool) -> str:
    kinds = ["words"] * is_word + ["long"] * (is_word and len(text) > LONG)
    return f"<td{f' class={chr(34)}{chr(32).join(kinds)}{chr(34)}' if kinds else ''}>{escape(text)}</td>"
