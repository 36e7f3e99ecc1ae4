"""`darwinlm compare`: every method at every size over one database, a line of JSON each, a table and a picture."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from darwinlm import pipeline
from darwinlm.allocate.methods import ALLOCATORS
from darwinlm.allocate.problem import Problem
from darwinlm.allocate.uniform import uniform
from darwinlm.artifact import locked_directory, read_json, read_json_lines, write_text
from darwinlm.budget import Budget, Costs, parameter_costs
from darwinlm.checkpoint import find_checkpoint
from darwinlm.config import RefitConfig, RunConfig
from darwinlm.data import read_corpus
from darwinlm.database import MANIFEST, Database
from darwinlm.device import resolve_device, resolve_dtype
from darwinlm.evaluate import parameter_count, perplexity_and_kl, speed
from darwinlm.evaluation_config import CompareConfig
from darwinlm.families import find_grid
from darwinlm.fitness import Fitness
from darwinlm.genome import Grid
from darwinlm.progress import say
from darwinlm.surgery import Stitcher
from darwinlm.types import Genome, UsageError

CELLS, TABLE, PICTURE = "cells.jsonl", "comparison.md", "comparison.png"
DENSE = "dense"
TITLES = ("removed", "method", "parameters", "perplexity", "KL", "prefill tok/s", "decode tok/s", "seconds to find")
# Colours that remain apart for the colour-blind (Okabe and Ito), and markers for the rest.
COLOURS = ("#333333", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00")
MARKERS = "osv^Dx*P+"


@dataclass(frozen=True)
class Cell:
    """One method at one size.

    Attributes:
        target: share of the prunable parameters that the model had to lose; 0 for the dense model.
        refused: why the method has no model of this size, instead of figures.
        kl: KL(dense || model) in nats a token, on held-out text like the perplexity.
        speedup: of prefill and of decoding, over the dense model in the same run.
        seconds: that it took to find the genome, the database not counted.
    """

    method: str
    target: float
    refused: str | None = None
    levels: tuple[int, ...] = ()
    parameters: int = 0
    perplexity: float = math.nan
    kl: float = math.nan
    prefill_tokens_per_s: float = math.nan
    decode_tokens_per_s: float = math.nan
    speedup: tuple[float, float] = (1.0, 1.0)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Bench:
    """What every cell is found and measured with.

    Attributes:
        stitcher: in the precision of the search.
        judged: in the checkpoint's, in which models are measured.
    """

    config: CompareConfig
    grid: Grid
    costs: Costs
    stitcher: Stitcher
    judged: Stitcher
    tokens: dict[str, Int[Tensor, "sequences length"]]


def compare(config: CompareConfig) -> list[Cell]:
    """Measure every method at every size, print the table, and write `comparison.md` and `comparison.png`.

    A cell that is in `cells.jsonl` is not measured again.

    Raises:
        UsageError: if a setting, model or text cannot be used, or a target is out of reach.
        DarwinError: if a stage fails. The same call goes on from there.
    """
    out = Path(config.out)
    run = RunConfig(
        config.model, config.data, str(out / "base"), config.database.levels / 2, config.seed, config.device,
        config.dtype, calibration=config.calibration, database=config.database, search=config.search,
        refit=RefitConfig(tokens=0), evaluation=config.evaluation,
    )  # fmt: skip
    with locked_directory(out):
        pipeline.run(run, until="database")
        bench = _open(config, run)
        problems = {target: _budget(bench, target, run) for target in config.targets}
        cells = (
            [_cell(line) for line in read_json_lines(out / CELLS, "method", "target")] if (out / CELLS).exists() else []
        )
        wanted = [(DENSE, 0.0), *((method, target) for target in config.targets for method in config.methods)]
        for number, (method, target) in enumerate(wanted, 1):
            if any((cell.method, cell.target) == (method, target) for cell in cells):
                continue
            say(f"compare: {number}/{len(wanted)}, {method} at {target:g}")
            if method == DENSE:
                cell = _measure(bench, method, target, bench.grid.dense(), 0.0)
            else:
                cell = _find(bench, method, target, *problems[target])
            cells.append(cell)
            write_text(out / CELLS, "".join(_line(cell) for cell in cells))
        chosen = [next(cell for cell in cells if (cell.method, cell.target) == key) for key in wanted]
        write_text(out / TABLE, markdown(chosen))
        _save_picture(out / PICTURE, chosen)
    _print(chosen)
    print(out / TABLE, out / PICTURE, sep="\n")
    return chosen


def _open(config: CompareConfig, run: RunConfig) -> _Bench:
    path, device = Path(run.out), resolve_device(config.device)
    checkpoint = find_checkpoint(config.model, path)
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, config.seed)
    tokens = pipeline.draw_tokens(corpus, run)
    manifest = read_json(path / "database" / MANIFEST, "made_from")
    database = Database(path / "database", grid, manifest["made_from"])
    precisions = (resolve_dtype(config.dtype, device), checkpoint.dtype)
    models = {dtype: checkpoint.load(dtype, device) for dtype in dict.fromkeys(precisions)}
    searched, judged = (Stitcher(models[dtype], checkpoint.family, database) for dtype in precisions)
    return _Bench(config, grid, parameter_costs(grid, parameter_count(searched.dense)), searched, judged, tokens)


def _budget(bench: _Bench, target: float, run: RunConfig) -> tuple[Genome, Budget]:
    """The uniform genome at a size, and the budget that it sets all methods."""
    prunable = sum(levels[0] for levels in bench.costs.units)
    limit = bench.costs.of(bench.grid.dense()) - target * prunable
    settings = {**vars(run), "target": f"params={math.ceil(limit)}"}
    return uniform(bench.grid, bench.costs, RunConfig(**settings))


def _find(bench: _Bench, method: str, target: float, even: Genome, budget: Budget) -> Cell:
    """Let a method choose a genome, and measure what it chose."""
    config = bench.config
    began = time.monotonic()
    # Each method pays for its own scores: nothing of another's is reused.
    fitness = Fitness(bench.stitcher, bench.tokens["search"], bench.tokens["training"], config.search)
    state = Path(config.out) / "state" / f"{method}-{target:g}"
    text = bench.tokens["search"]
    problem = Problem(bench.stitcher, budget, even, fitness, text, config.search, config.seed, state)
    try:
        genome = ALLOCATORS[method](problem)
    except UsageError as error:
        return Cell(method, target, refused=str(error))
    assert budget.fits(genome)
    return _measure(bench, method, target, genome, time.monotonic() - began)


def _measure(bench: _Bench, method: str, target: float, genome: Genome, seconds: float) -> Cell:
    models = {DENSE: bench.judged.dense, method: bench.judged.stitch(genome)}
    quality = perplexity_and_kl(models, bench.tokens["evaluation"])[method]
    speeds = speed(models, bench.tokens["evaluation"], bench.config.evaluation)
    dense, found = speeds[DENSE], speeds[method]
    return Cell(
        method,
        target,
        levels=genome.levels,
        parameters=bench.costs.of(genome),
        perplexity=quality.perplexity,
        kl=quality.kl,
        prefill_tokens_per_s=found.prefill_tokens_per_s,
        decode_tokens_per_s=found.decode_tokens_per_s,
        speedup=(
            found.prefill_tokens_per_s / dense.prefill_tokens_per_s,
            found.decode_tokens_per_s / dense.decode_tokens_per_s,
        ),
        seconds=seconds,
    )


def _line(cell: Cell) -> str:
    """A line of JSON, without the figures that a refused cell has not."""
    return json.dumps({name: value for name, value in asdict(cell).items() if value == value}) + "\n"


def _cell(line: dict[str, object]) -> Cell:
    return Cell(**{key: tuple(value) if isinstance(value, list) else value for key, value in line.items()})  # type: ignore


def _columns(cell: Cell) -> list[str]:
    start = ["" if cell.method == DENSE else f"{cell.target:.0%}", cell.method]
    if cell.refused is not None:
        return [*start, *["-"] * (len(TITLES) - 2)]
    prefill, decode = cell.speedup
    return [
        *start,
        f"{cell.parameters:,}",
        f"{cell.perplexity:.2f}",
        f"{cell.kl:.4f}",
        f"{cell.prefill_tokens_per_s:.1f} ({prefill:.2f}x)",
        f"{cell.decode_tokens_per_s:.1f} ({decode:.2f}x)",
        f"{cell.seconds:.0f}",
    ]


def _print(cells: Sequence[Cell]) -> None:
    console = Console(highlight=False)
    console = Console(highlight=False, width=console.width if console.is_terminal else 120)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in TITLES:
        table.add_column(title, justify="left" if title == "method" else "right")
    for before, cell in zip([None, *cells], cells, strict=False):
        if before is not None and before.target != cell.target:
            table.add_section()
        table.add_row(*_columns(cell))
    console.print(table)
    for cell in cells:
        if cell.refused is not None:
            console.print(f"{cell.method} at {cell.target:.0%}: {cell.refused}", markup=False)


def markdown(cells: Sequence[Cell]) -> str:
    """The table, with what methods refused below it."""
    lines = [list(TITLES), ["---" if title == "method" else "---:" for title in TITLES], *map(_columns, cells)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    refusals = [f"- {cell.method} at {cell.target:.0%}: {cell.refused}" for cell in cells if cell.refused is not None]
    return "\n".join([*table, "", *refusals, f"![Perplexity at every size]({PICTURE})"]) + "\n"


def _save_picture(path: Path, cells: Sequence[Cell]) -> None:
    """Perplexity over the share removed, a line a method (Figure 4 of the paper)."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.add_subplot()
    dense = next(cell for cell in cells if cell.method == DENSE)
    for number, method in enumerate(dict.fromkeys(cell.method for cell in cells if cell.method != DENSE)):
        found = sorted((c for c in cells if c.method == method and c.refused is None), key=lambda cell: cell.target)
        axis.plot(
            [100 * cell.target for cell in found],
            [cell.perplexity for cell in found],
            label=method,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
        )
    axis.axhline(dense.perplexity, color=COLOURS[0], linestyle=":", label=DENSE)
    axis.set_yscale("log")
    axis.set_xlabel("prunable parameters removed (%)")
    axis.set_ylabel("perplexity")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small")
    FigureCanvasAgg(figure)
    temporary = path.with_suffix(".partial")
    figure.savefig(temporary, format="png", dpi=200, metadata={"Software": None})
    temporary.rename(path)
