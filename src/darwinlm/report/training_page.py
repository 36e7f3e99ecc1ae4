"""The HTML report of a training: held-out figures before and after it, and its course."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darwinlm.report.charts import Line, Point, axis, lines_chart
from darwinlm.report.html import Chart, Grid, Note, Section, Table
from darwinlm.report.left_behind import left_behind
from darwinlm.report.run_page import provenance_blocks, writings

# What lines of the log hold, with how it is called.
HELD_OUT = {"eval_perplexity": "perplexity, held out", "eval_kl": "KL, held out (nats a token)"}
ON = "kl on "  # begins the name of a figure of one part of a mixture
TRAINED = {
    "loss": "loss",
    "cross_entropy": "cross-entropy (nats a token)",
    "kl": "KL from the teacher (nats a token)",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
}


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """All that the report of a training tells.

    Attributes:
        log: lines with a step and what was measured there.
        before, after: held-out figures, by name.
        written: what the model wrote before and after, by these words; may be empty.
        settings, provenance, recipe: as in `RunFacts`.
    """

    title: str
    log: Sequence[Mapping[str, Any]]
    before: Mapping[str, float]
    after: Mapping[str, float]
    written: Mapping[str, Sequence[str]]
    settings: Mapping[str, str]
    provenance: Mapping[str, str]
    recipe: str


def lead(facts: TrainingFacts) -> str:
    """Return what the training changed, in a sentence."""
    names = {"perplexity": "perplexity", "kl": "KL from the teacher (nats a token)"}
    changes = [
        f"{names.get(name, name)} on held-out text went from {facts.before[name]:.4g} to {after:.4g}"
        for name, after in facts.after.items()
        if name in facts.before and " on " not in name
    ]
    steps = max((line["step"] for line in facts.log), default=0)
    return f"In {steps:,} steps, {', and '.join(changes)}."


def changed_parts(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return a sentence for each part of a mixture that a training left behind, from its held-out figures."""
    own, old = ({name[len(ON) :]: of[name] for name in after if name.startswith(ON)} for of in (after, before))
    return left_behind(own, old, "the model before it")


def sections(facts: TrainingFacts) -> list[Section]:
    """Return the sections of the page."""
    names = list(facts.after)
    rows = [[when, *(f"{of[name]:.4g}" for name in names)] for when, of in _both(facts)]
    behind = [Note(f"{sentence}.") for sentence in changed_parts(facts.before, facts.after)]
    courses = {**HELD_OUT, **TRAINED}
    charts = [chart for name, title in courses.items() if (chart := _course(name, title, facts.log)) is not None]
    return [
        Section("Before and after", [Table(["model", *names], rows), *behind]),
        Section("Course", [Grid(charts), _table(facts.log, courses)] if charts else []),
        Section("What the model writes", writings(facts.written)),
        Section("Provenance", provenance_blocks(facts.settings, facts.provenance, facts.recipe)),
    ]


def _both(facts: TrainingFacts) -> Iterable[tuple[str, Mapping[str, float]]]:
    return ("before", facts.before), ("after", facts.after)


def _course(name: str, title: str, log: Sequence[Mapping[str, Any]]) -> Chart | None:
    """One figure over steps, or None if it was not logged."""
    logged = [(line["step"], float(line[name])) for line in log if isinstance(line.get(name), int | float)]
    if not logged:
        return None
    said = [f"step {step:,}: {title} {value:.4g}" for step, value in logged]
    line = Line([step for step, _ in logged], [Point.exact(value) for _, value in logged], said)
    return lines_chart(name, title[0].upper() + title[1:], (axis("step", nticks=6), axis()), {title: line}, height=280)


def _table(log: Sequence[Mapping[str, Any]], courses: Mapping[str, str]) -> Table:
    columns = [name for name in courses if any(name in line for line in log)]
    by_step: dict[int, dict[str, Any]] = {}
    for line in log:
        by_step.setdefault(line["step"], {}).update(line)
    rows = [
        [f"{step:,}", *(f"{line[name]:.4g}" if isinstance(line.get(name), int | float) else "" for name in columns)]
        for step, line in by_step.items()
    ]
    return Table(["step", *(courses[name] for name in columns)], rows, "The figures of every step", folded=True)
