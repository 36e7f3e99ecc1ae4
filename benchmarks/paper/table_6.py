"""Table 6 of the paper on SmolLM2-135M: what finding the model costs, and what it gives.

python benchmarks/paper/table_6.py COMPARISON OUT      # COMPARISON: the directory of `darwinlm compare`

Seconds are those to the genome on the machine of the comparison; every method pays for its own scores. Methods that
remove whole blocks or modules need nothing else. The others need the database too, for all sizes once, which
benchmarks/database.py measures and which these seconds leave out.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from of_comparison import opened

from darwinlm.report import tables
from darwinlm.report.comparison import COLOURS, DENSE, MARKERS, Cell
from darwinlm.report.figures import save_figure

WHOLE = ("shortgpt", "cosine", "shortened-llama", "shortened-llama-taylor", "evopress")
LEAST = 0.1  # seconds: what costs nothing, on a logarithmic axis


def table(cells: list[Cell], sizes: list[str]) -> str:
    """Seconds and KL, a row a method."""
    of_size = {(cell.method, cell.size): cell for cell in cells}
    titles = ["method", "database", *(f"{figure} at {size}" for size in sizes for figure in ("seconds", "KL"))]
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        row = [method, "no" if method in WHOLE else "yes"]
        for size in sizes:
            cell = of_size.get((method, size))
            row += ["-", "-"] if cell is None or cell.refused else [f"{cell.seconds:.0f}", f"{cell.kl:.4f}"]
        rows.append(row)
    return tables.markdown(titles, rows)


def draw(cells: list[Cell]) -> Figure:
    """KL over seconds, a line a method through its sizes."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis: Axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(cell.method for cell in cells)):
        chosen = [cell for cell in cells if cell.method == method and cell.refused is None]
        axis.plot(
            [max(cell.seconds, LEAST) for cell in chosen],
            [cell.kl for cell in chosen],
            label=method,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
        )
    axis.set(xscale="log", xlabel="seconds to find the genome", ylabel="KL to the dense model (nats a token)")
    axis.legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    every, out = opened(__doc__)
    cells = [cell for cell in every if cell.method != DENSE]
    print(table(cells, list(dict.fromkeys(cell.size for cell in cells))))
    save_figure(out / "table_6.png", draw(cells))


if __name__ == "__main__":
    main()
