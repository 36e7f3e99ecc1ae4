"""Tables of figures, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WORDS = frozenset({"model", "method", "setting", "value"})  # titles of columns that hold no figures


GAP = 2  # columns of the screen between two of the table


Cells = Sequence[str]


def show(titles: Sequence[str], sections: Sequence[Sequence[Cells]]) -> None:
    """Print a table on standard output, a rule between its sections. Titles are broken into words, figures never are.

    Only a terminal that is too narrow breaks figures too.
    """
    rows = [row for section in sections for row in section]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    whole = [max(width, *map(len, title.split() or [""])) for width, title in zip(widths, titles, strict=True)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for title, width in zip(titles, whole, strict=True):
        table.add_column(Text(title), justify="left" if title in WORDS else "right", width=width)
    for section in sections:
        table.add_section()
        for row in section:
            table.add_row(*map(Text, row))
    screen(sum(whole) + GAP * (len(whole) - 1)).print(table)


def screen(width: int) -> Console:
    """Standard output, as wide as asked unless a terminal is narrower. Elsewhere rich would take 80 columns."""
    console = Console(highlight=False)
    return Console(highlight=False, width=min(console.width, width) if console.is_terminal else width)


def markdown(titles: Sequence[str], rows: Sequence[Cells]) -> str:
    """The same in Markdown, without a line end."""
    rules = ["---" if title in WORDS else "---:" for title in titles]
    return "\n".join(map(_line, [titles, rules, *rows]))


def parameters(number: float | int) -> str:
    """A number of parameters for people."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def size(number: float | int) -> str:
    """A number of bytes for people."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _line(cells: Cells) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
