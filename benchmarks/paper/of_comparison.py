"""Read what the scripts about a comparison are given: its cells, from the largest model down, and a directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from darwinlm.report.comparison import CELLS, Cell, read_cells


def opened(description: str | None) -> tuple[list[Cell], Path]:
    """Return the cells of the comparison that the command line names, and the directory for the picture."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="directory of `darwinlm compare`")
    parser.add_argument("out", type=Path, help="directory of the picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells = sorted(read_cells(arguments.comparison), key=lambda cell: -cell.kept)
    if not cells:
        parser.error(f"no comparison in {arguments.comparison}: expected {CELLS} in it; name a directory of compare")
    return cells, arguments.out
