"""Tables of figures, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WORDS = frozenset(
    {"model", "method", "setting", "value", "stage", "unit", "origin", "task"}
)  # titles of the columns that hold words, not figures


GAP = 2  # characters between two columns


Cells = Sequence[str]


def show(titles: Sequence[str], sections: Sequence[Sequence[Cells]]) -> None:
    """Print a table on standard output, with a rule between sections.

    Titles may be wrapped between words. Cells are not, unless the terminal is too narrow for them.
    """
    rows = [row for section in sections for row in section]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    full_widths = [max(width, *map(len, title.split() or [""])) for width, title in zip(widths, titles, strict=True)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for title, width in zip(titles, full_widths, strict=True):
        table.add_column(Text(title), justify="left" if title in WORDS else "right", width=width)
    for section in sections:
        table.add_section()
        for row in section:
            table.add_row(*map(Text, row))
    screen(sum(full_widths) + GAP * (len(full_widths) - 1)).print(table)


def screen(width: int) -> Console:
    """Return a console for standard output of this width, or narrower if the terminal is."""
    console = Console(highlight=False)
    return Console(highlight=False, width=min(console.width, width) if console.is_terminal else width)


def markdown(titles: Sequence[str], rows: Sequence[Cells]) -> str:
    """Return a table in Markdown, without a final newline."""
    rules = ["---" if title in WORDS else "---:" for title in titles]
    return "\n".join(map(_line, [titles, rules, *rows]))


def parameters(number: float | int) -> str:
    """Return a number of parameters as text, in millions or billions."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def size(number: float | int) -> str:
    """Return a number of bytes as text, in MB or GB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _line(cells: Cells) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
