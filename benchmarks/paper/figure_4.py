"""Figure 4 of the paper on SmolLM2-135M: perplexity of every method at every size, on every text.

python benchmarks/paper/figure_4.py COMPARISON OUT      # COMPARISON: the directory of `darwinlm compare`
"""

from __future__ import annotations

from of_comparison import opened

from darwinlm.report.comparison import figure
from darwinlm.report.figures import save_figure


def main() -> None:
    cells, out = opened(__doc__)
    save_figure(out / "figure_4.png", figure(cells))


if __name__ == "__main__":
    main()
