"""Figure 4 of the paper on SmolLM2-135M: perplexity of every method at every size, on every text.

python benchmarks/paper/figure_4.py COMPARISON OUT      # COMPARISON: the directory of `darwinlm compare`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from darwinlm.comparison import read_cells, save_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("out", type=Path, help="directory of the picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_picture(arguments.out / "figure_4.png", read_cells(arguments.comparison))


if __name__ == "__main__":
    main()
