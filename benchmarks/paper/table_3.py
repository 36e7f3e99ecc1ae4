"""Table 3 of the paper on SmolLM2-135M: the uniform model against the searched one, before any training.

python benchmarks/paper/table_3.py COMPARISON OUT      # COMPARISON: the directory of `darwinlm compare`

Tasks are those of the comparison, by the paper's choice of metric; KL to the dense model in nats a token.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from of_comparison import opened

from darwinlm.report import tables
from darwinlm.report.comparison import DENSE, Cell, in_table
from darwinlm.report.figures import save_figure

SEARCHED = {"uniform": "uniform", "evolution": "searched"}


def average(cell: Cell) -> float:
    """Of all tasks, in per cent."""
    values = [score.value for score in in_table(cell) if score.value is not None]
    return 100 * mean(values) if values else math.nan


def aligned(cells: list[Cell]) -> list[Cell]:
    """Every cell with the dense model's tasks in its order. Raises `KeyError` if one has not been asked them all."""
    asked = [(score.task, score.metric) for score in in_table(cells[0])]
    found = []
    for cell in cells:
        by_task = {(score.task, score.metric): score for score in cell.scores}
        found.append(replace(cell, scores=tuple(by_task[task] for task in asked)))
    return found


def table(cells: list[Cell]) -> str:
    """A row a model, in Markdown."""
    first = cells[0]
    texts, tasks = [Path(text).name for text in first.texts], [f"{score.task} {score.metric}" for score in first.scores]
    titles = ["kept", "model", "KL", *(f"KL {text}" for text in texts), "perplexity", *tasks, "average"]
    rows = []
    for cell in cells:
        kl = [f"{quality.kl:.4f}" for quality in cell.texts.values()]
        found = [
            f"{cell.kl:.4f}",
            *kl,
            f"{cell.perplexity:.2f}",
            *map(str, cell.scores),
            f"{average(cell):.1f}" if cell.scores else "-",
        ]
        rows.append([cell.size, SEARCHED.get(cell.method, cell.method), *found])
    return tables.markdown(titles, rows)


def draw(cells: list[Cell]) -> Figure:
    """KL and the average of the tasks, over the share of the parameters that is kept."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(1, 2))
    for method, label in SEARCHED.items():
        chosen = [cell for cell in cells if cell.method == method]
        kept = [100 * cell.kept for cell in chosen]
        panels[0].plot(kept, [cell.kl for cell in chosen], marker="o", label=label)
        panels[1].plot(kept, [average(cell) for cell in chosen], marker="o", label=label)
    panels[1].axhline(average(cells[0]), color="#333333", linestyle=":", label=DENSE)
    for axis, name in zip(panels, ("KL to the dense model (nats a token)", "average of the tasks (%)"), strict=True):
        axis.set(xlabel="parameters of the dense model that are kept (%)", ylabel=name)
        axis.invert_xaxis()
        axis.legend(frameon=False)
    return figure


def main() -> None:
    every, out = opened(__doc__)
    cells = aligned([cell for cell in every if cell.method in (DENSE, *SEARCHED)])
    print(table(cells))
    save_figure(out / "table_3.png", draw(cells))


if __name__ == "__main__":
    main()
