"""The report of a run: a table on the terminal, and `report.md` with its pictures and `table.json`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from darwinlm.evaluation.answering import Answers
from darwinlm.evaluation.rows import Row
from darwinlm.genome import Grid
from darwinlm.report import answering, tables
from darwinlm.report.figures import levels_figure, save_figure, search_figure
from darwinlm.report.left_behind import left_behind
from darwinlm.runtime.files import write_record, write_text
from darwinlm.runtime.stages import StageUse
from darwinlm.runtime.timing import Ratio
from darwinlm.types import Curve, Generation, Genome

WIDTH = 100  # columns that the continuations of models take


@dataclass(frozen=True)
class _Column:
    """One column of the table.

    Attributes:
        text: its figure in a row, as it is written.
        ratio: the figure's ratio to the dense model's, given both rows: a share, or a ratio with its range. None if it
            is not written.
    """

    title: str
    text: Callable[[Row], str]
    ratio: Callable[[Row, Row], float | Ratio] | None = None


COLUMNS = (
    _Column(
        "parameters",
        lambda row: tables.parameters(row.parameters),
        lambda row, dense: row.parameters / dense.parameters,
    ),
    _Column("perplexity", lambda row: f"{row.perplexity:.2f}"),
    _Column("KL", lambda row: f"{row.kl:.4f}"),
    _Column("prefill tok/s", lambda row: _rate(row.prefill_tokens_per_s), lambda row, _: row.prefill_ratio),
    _Column("decode tok/s", lambda row: _rate(row.decode_tokens_per_s), lambda row, _: row.decode_ratio),
    _Column("size", lambda row: tables.size(row.bytes)),
)


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """Return all columns; those of further texts follow the figures on held-out documents."""
    columns, place = list(COLUMNS), [column.title for column in COLUMNS].index("KL") + 1
    for text in reversed(rows[0].texts):
        columns[place:place] = _of_text(text)
    return columns


def _titles(columns: Sequence[_Column]) -> list[str]:
    return ["model", *(column.title for column in columns)]


def _of_text(text: str) -> tuple[_Column, _Column]:
    name = Path(text).name
    return (
        _Column(
            f"perplexity {name}",
            lambda row: f"{row.texts[text].perplexity:.2f}",
        ),
        _Column(f"KL {name}", lambda row: f"{row.texts[text].kl:.4f}"),
    )


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _cells(rows: Sequence[Row], columns: Sequence[_Column], ranges: bool = True) -> list[list[str]]:
    """Return the cells of every row, the model's name first. Ratios have one width, so that figures line up.

    Args:
        ranges: whether the ranges of ratios are in them.
    """
    written = [[row.model for row in rows]]
    for column in columns:
        cells = [column.text(row) for row in rows]
        if column.ratio is not None:
            ratios = [f"({_ratio(column.ratio(row, rows[0]), ranges)})" for row in rows]
            width = max(map(len, ratios))
            cells = [f"{cell} {ratio:>{width}}" for cell, ratio in zip(cells, ratios, strict=True)]
        written.append(cells)
    return [list(row) for row in zip(*written, strict=True)]


def _ratio(ratio: float | Ratio, ranges: bool) -> str:
    if isinstance(ratio, Ratio):
        return str(ratio) if ranges else ratio.brief
    return f"{100 * ratio:.0f} %"


def print_table(rows: Sequence[Row]) -> None:
    """Print the table on standard output, and below it each model's continuation of each prompt.

    The first row is the dense model's. A figure's ratio to the dense model's follows it in brackets.
    """
    columns = _columns(rows)
    tables.show(_titles(columns), [_cells(rows, columns, ranges=False)])
    titles, cells = answering.cells_of(answers_of(rows))
    if titles:
        tables.show(titles, [cells])
    if any(ratio.wide for row in rows for ratio in (row.prefill_ratio, row.decode_ratio)):
        print("? other work kept this machine busy while speeds were measured: report.md has their range")
    console = tables.screen(WIDTH)
    for texts in _by_prompt(rows):
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        for row, text in zip(rows, texts, strict=True):
            grid.add_row(Text(row.model), Text(text))
        console.print(grid)
        console.print()


def _by_prompt(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return, for each prompt, each model's continuation on one line."""
    return [
        tuple(" ".join(text.split()) for text in texts) for texts in zip(*(r.continuations for r in rows), strict=True)
    ]


def write_report(
    out: Path,
    title: str,
    rows: Sequence[Row],
    grid: Grid,
    genomes: Mapping[str, Genome],
    history: Sequence[Generation],
    settings: Mapping[str, str],
    metric: str,
    curves: Mapping[str, Curve],
    uniform: Mapping[str, float],
    stages: Mapping[str, StageUse],
) -> list[Path]:
    """Write a run's report to the directory `out`, and return its files: `report.md`, `table.json` and the pictures.

    A picture for which there is no data is not written.

    Args:
        rows: one for each model, the dense model first.
        genomes: by name; the last one is the result, and the others are drawn for comparison.
        history: the generations of the search, if there was one.
        settings: the settings of the run, as the report shows them.
        metric: the name of what the search minimised.
        curves: the KL divergence of the search's parents on other texts, by text.
        uniform: the KL divergence of the uniform genome on these texts.
        stages: what each stage took, by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, str] = {}
    if genomes:
        save_figure(out / "levels.png", levels_figure(grid, genomes))
        pictures["levels.png"] = "Share of each attention and each MLP that is left, block by block"
    if history:
        save_figure(out / "search.png", search_figure(history, metric, curves, uniform))
        pictures["search.png"] = f"{metric} of the best genome, generation by generation, and KL on text it never saw"
    used = {name: asdict(use) for name, use in stages.items()}
    write_record(out / "table.json", {"rows": [_record(row, rows[0]) for row in rows], "stages": used}, settings)
    write_text(out / "report.md", _markdown(title, rows, settings, pictures, stages))
    return [out / name for name in ("report.md", "table.json", *pictures)]


def answers_of(rows: Sequence[Row]) -> dict[str, Answers]:
    """Return the answers of models to chat prompts, by name."""
    return {row.model: row.answers for row in rows if row.answers is not None}


def _record(row: Row, dense: Row) -> dict[str, Any]:
    answers: dict[str, Any] = {} if row.answers is None else {"answers": answering.record(row.answers, dense.answers)}
    return answers | {
        "model": row.model,
        "parameters": row.parameters,
        "perplexity": row.perplexity,
        "kl": row.kl,
        "prefill_tokens_per_s": row.prefill_tokens_per_s,
        "decode_tokens_per_s": row.decode_tokens_per_s,
        "prefill_ratio": row.prefill_ratio,
        "decode_ratio": row.decode_ratio,
        "bytes": row.bytes,
        "texts": {text: asdict(quality) for text, quality in row.texts.items()},
    }


NOTE = """\
KL is KL(dense ‖ model) in nats a token; perplexity and KL are over the same held-out tokens{texts}.
Speeds are medians of alternating runs of the models on one machine, one sequence at a time. In brackets: the ratio to
{dense}, and its range over the runs. A question mark is where that is wide, as on a machine with other work to do."""


NOTE_ON_TEXTS = ", and over as many from the beginning of each named text, which no stage has seen"
LOADING = """\
## Loading the model

From this directory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)
```

With `trust_remote_code`, transformers reads `modeling_pruned_*.py` beside the weights, which gives each block its own
sizes. It needs torch and transformers, but not `darwinlm`. If all blocks have the same sizes, there is no such file.
"""


def _markdown(
    title: str,
    rows: Sequence[Row],
    settings: Mapping[str, str],
    pictures: Mapping[str, str],
    stages: Mapping[str, StageUse],
) -> str:
    lines = [f"# {title}", ""]
    if settings:
        lines += [tables.markdown(["setting", "value"], list(settings.items())), ""]
    lines += ["## Models", "", models_table(rows), ""]
    lines += answering.markdown(answers_of(rows))
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", ""]
    if stages:
        lines += ["## Time and memory", "", tables.markdown(*stages_cells(stages)), "", note_on_stages(stages), ""]
    continuations = _by_prompt(rows)
    if continuations:
        lines += ["## Continuations", "", "Greedy, each from the same prompt.", ""]
    indent = max(len(row.model) for row in rows) + 2
    for texts in continuations:
        lines.append("```text")
        for row, text in zip(rows, texts, strict=True):
            first = row.model.ljust(indent)
            # A run of backticks in a text must not end the block.
            text = text.replace("```", "'''")
            lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * indent) or [row.model]
        lines += ["```", ""]
    return "\n".join(lines) + "\n" + LOADING


NOTE_ON_STAGES = """\
Seconds are summed over all processes that went on with a stage after an interruption. Memory is the most that the first
process held while the stage ran, with the interpreter and its libraries{device}."""


def stages_cells(stages: Mapping[str, StageUse]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the cells of the stages' table; all of them together come last."""
    on_gpu = any(use.device for use in stages.values())
    titles = ["stage", "seconds", "memory", *(["memory of the GPU"] if on_gpu else [])]
    together = StageUse(
        sum(use.seconds for use in stages.values()),
        max(use.host for use in stages.values()),
        max(use.device for use in stages.values()),
    )
    rows = [
        [name, f"{use.seconds:,.1f}", tables.size(use.host), *([tables.size(use.device)] if on_gpu else [])]
        for name, use in (*stages.items(), ("all", together))
    ]
    return titles, rows


def note_on_stages(stages: Mapping[str, StageUse]) -> str:
    """Return the note that explains the stages' table."""
    on_gpu = any(use.device for use in stages.values())
    return NOTE_ON_STAGES.format(device=", and on the GPU of tensors" if on_gpu else "")


def models_table(rows: Sequence[Row]) -> str:
    """Return the models' figures as a Markdown table, followed by a note that explains them."""
    return "\n".join([tables.markdown(*models_cells(rows)), "", note_on_models(rows)])


def models_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the cells of the models' table."""
    columns = _columns(rows)
    return _titles(columns), _cells(rows, columns)


def note_on_models(rows: Sequence[Row]) -> str:
    """Return the note that explains the models' table, and says which parts of a mixture are left behind."""
    note = NOTE.format(dense=rows[0].model, texts=NOTE_ON_TEXTS if rows[0].texts else "")
    return "\n".join([note, *(f"{sentence}." for sentence in warnings(rows))])


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each part of a mixture on which the last model is worse than elsewhere, or than uniform."""
    *others, last = rows
    if not last.parts:
        return []
    uniform = {part: others[-1].texts[part].kl for part in last.parts} if len(others) > 1 else {}
    own = {part: last.texts[part].kl for part in last.parts}
    return left_behind(own, uniform or own, "the uniform model")
