"""The HTML report of a run: what it found, and all that it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from darwinlm.evaluation.answering import Answers
from darwinlm.evaluation.paired import NOTE
from darwinlm.evaluation.rows import Row
from darwinlm.genome import Grid
from darwinlm.report import answering, tables
from darwinlm.report.charts import Point, levels_chart, points_chart, search_chart
from darwinlm.report.comparison import HELD_OUT
from darwinlm.report.figures import note_on_uniform
from darwinlm.report.html import Block, Listing, Note, Section, Table, Writings
from darwinlm.report.html import Grid as ChartGrid
from darwinlm.report.run_report import answers_of, models_cells, note_on_models, note_on_stages, stages_cells
from darwinlm.runtime.stages import StageUse
from darwinlm.runtime.timing import Ratio
from darwinlm.types import Curve, Generation, Genome


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that the report of a run tells.

    Attributes:
        title: the model and what was asked of it.
        rows: the models' figures, the dense model's first and the result's last.
        genomes: by name, the result's last.
        metric: the name of what the search minimised.
        curves: KL of the search's parents on other texts, by text.
        uniform: KL of the uniform genome on these texts, as untrained as the parents.
        sensitivities, errors: by unit and level, or empty.
        stages: what each stage took, or empty.
        settings: the settings that made the result, for people.
        provenance: what it was made from, with hashes, by name.
        recipe: all settings as YAML.
    """

    title: str
    rows: Sequence[Row]
    grid: Grid
    genomes: Mapping[str, Genome]
    history: Sequence[Generation]
    metric: str
    curves: Mapping[str, Curve]
    uniform: Mapping[str, float]
    sensitivities: Sequence[Sequence[float]]
    errors: Sequence[Sequence[float]]
    stages: Mapping[str, StageUse]
    settings: Mapping[str, str]
    provenance: Mapping[str, str]
    recipe: str


def lead(facts: RunFacts) -> str:
    """Return what was found, in two sentences."""
    dense, *others = facts.rows
    found = others[-1]
    share = found.parameters / dense.parameters
    beside = "".join(f", where the {row.model} model of that size has {row.kl:.3f}" for row in others[:-1])
    decode, prefill = found.decode_ratio, found.prefill_ratio
    unsure = " (other work disturbed the timing)" if decode.wide or prefill.wide else ""
    return (
        f"The {found.model} model has {tables.parameters(found.parameters)} of the dense model's "
        f"{tables.parameters(dense.parameters)} parameters ({100 * share:.0f} %), and its KL from the dense model on "
        f"held-out text is {found.kl:.3f} nats a token{beside}. Its perplexity is {found.perplexity:.2f} (dense: "
        f"{dense.perplexity:.2f}). It decodes {decode.median:.2f} times as fast as the dense model, and reads prompts "
        f"{prefill.median:.2f} times as fast{unsure}."
    )


def sections(facts: RunFacts) -> list[Section]:
    """Return the sections of the page."""
    note = note_on_uniform(facts.grid, facts.genomes["uniform"]) if "uniform" in facts.genomes else ""
    units: list[Block] = [levels_chart(facts.grid, facts.genomes, facts.sensitivities, facts.errors)]
    return [
        Section("Models", _models(facts.rows)),
        answers_section(answers_of(facts.rows)),
        Section("Sizes of units", [*units, *([Note(_sentence(note))] if note else []), Note(ON_UNITS)]),
        Section("Search", _search(facts)),
        Section("What each model writes", writings({row.model: row.continuations for row in facts.rows})),
        Section("Time and memory", stages_blocks(facts.stages)),
        Section("Provenance", provenance_blocks(facts.settings, facts.provenance, facts.recipe)),
    ]


def answers_section(answers: Mapping[str, Answers]) -> Section:
    """Return how models answer chat prompts; the section is empty where they were asked none."""
    titles, rows = answering.cells_of(answers)
    if not titles:
        return Section(answering.TITLE, [])
    said = (answering.note(next(iter(answers.values()))), NOTE)
    return Section(answering.TITLE, [Table(titles, rows), *map(Note, map(_sentence, said))])


ON_UNITS = """\
Sensitivity is the rise of the search's measure when that unit alone is at its level; levels between those that were
measured are interpolated. The output error is the squared error of the unit's output on the calibration text, after
what is left was solved again. A cross marks a unit that was removed whole."""


ON_SEARCH = """\
The search chose by its own tokens; the other curves are on text that it never saw. A dashed line is the uniform model
on the same tokens, stitched and trained in the same way as what the line is compared with."""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _models(rows: Sequence[Row]) -> list[Block]:
    titles, cells = models_cells(rows)
    table = Table(titles, cells)
    texts = [HELD_OUT, *rows[0].texts]

    def on(measure: str) -> dict[str, dict[str, Point]]:
        return {
            row.model: {
                Path(text).name: Point.exact(getattr(row if text == HELD_OUT else row.texts[text], measure))
                for text in texts
            }
            for row in rows
        }

    def speed(row: Row) -> dict[str, Point]:
        return {"prefill": _of_ratio(row.prefill_ratio), "decoding": _of_ratio(row.decode_ratio)}

    charts = [
        points_chart("kl", "KL from the dense model", "nats a token; less is better", on("kl")),
        points_chart("perplexity", "Perplexity", "less is better", on("perplexity")),
        points_chart(
            "speed", "Speed beside the dense model", "times as fast; with the range over runs",
            {row.model: speed(row) for row in rows},
        ),
    ]  # fmt: skip
    return [table, ChartGrid(charts), Note(note_on_models(rows))]


def _of_ratio(ratio: Ratio) -> Point:
    return Point(ratio.median, ratio.least, ratio.most)


def _search(facts: RunFacts) -> list[Block]:
    if not facts.history:
        return []
    return [search_chart(facts.history, facts.metric, facts.curves, facts.uniform), Note(ON_SEARCH)]


def writings(continuations: Mapping[str, Sequence[str]]) -> list[Block]:
    """Return what models write after each prompt, side by side.

    Args:
        continuations: by model, the prompts with their continuations.
    """
    by_prompt = zip_longest(*continuations.values(), fillvalue="")
    blocks: list[Block] = [Writings(dict(zip(continuations, texts, strict=True))) for texts in by_prompt]
    return [Note("Greedy, each from the same prompt."), *blocks] if blocks else []


def stages_blocks(stages: Mapping[str, StageUse]) -> list[Block]:
    """Return what each stage took, as a table."""
    return [Table(*stages_cells(stages)), Note(note_on_stages(stages))] if stages else []


def provenance_blocks(settings: Mapping[str, str], provenance: Mapping[str, str], recipe: str) -> list[Block]:
    """Return what made a result: settings for people, hashes, and all settings as YAML."""
    return [
        Table(["setting", "value"], list(settings.items())),
        Table(["setting", "value"], list(provenance.items()), "Made from"),
        *([Listing("All settings", recipe)] if recipe else []),
    ]
