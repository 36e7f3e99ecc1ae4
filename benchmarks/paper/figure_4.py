"""Figure 4 of the paper on SmolLM2-135M: perplexity of every method at every size, on every text.

python benchmarks/paper/figure_4.py COMPARISON OUT      # COMPARISON: the directory of `darwinlm compare`
"""

from __future__ import annotations

from of_comparison import opened

from darwinlm.report.comparison import save_picture


def main() -> None:
    cells, out = opened(__doc__)
    save_picture(out / "figure_4.png", cells)


if __name__ == "__main__":
    main()
