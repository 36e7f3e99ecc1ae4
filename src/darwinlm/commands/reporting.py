"""The report of a run, as a table on the screen, Markdown, pictures and HTML, and the model card of its export."""

from __future__ import annotations

from collections.abc import Mapping

from darwinlm.commands.run_directory import versions_text
from darwinlm.commands.work import Work, made_from
from darwinlm.config.run import RunConfig
from darwinlm.database.store import Database
from darwinlm.evaluation.rows import Row
from darwinlm.export.card import model_card
from darwinlm.losses.metrics import label
from darwinlm.model.licence import licence_of
from darwinlm.report import run_report
from darwinlm.report.html import unless_it_fails, write_page
from darwinlm.report.run_page import RunFacts, lead, sections
from darwinlm.runtime.files import write_text
from darwinlm.runtime.names import short_name
from darwinlm.runtime.progress import say
from darwinlm.runtime.stages import StageUse
from darwinlm.search.costs import parameter_costs, shared_parameter_costs
from darwinlm.search.sensitivity import SENSITIVITIES, measured_sensitivities
from darwinlm.types import Curve, Genome, SearchResult


def report(
    work: Work,
    database: Database,
    result: SearchResult,
    rows: list[Row],
    elsewhere: dict[str, Curve],
    uniform: dict[str, float],
    stages: Mapping[str, StageUse],
) -> None:
    """Write tables, pictures and pages to the run directory, and print the table. What ends the run comes last.

    Args:
        rows: the figures of the dense, the uniform and the searched model.
        elsewhere: KL of the search's parents on texts that it never saw, by text.
        uniform: KL of the uniform genome on these texts.
        stages: what each stage took.
    """
    genomes, settings = {"uniform": work.uniform, "searched": result.best}, _settings(work, result)
    title, metric = f"{short_name(work.config.model)} at {_target(work.config)}", label(work.config.search.metric)
    card = card_of(work, result, (rows[0].parameters, rows[-1].parameters), run_report.models_table(rows))
    write_text(work.run.exported / "README.md", card)
    page = work.run.page_path
    with unless_it_fails(page):
        sealed = {f"SHA-256 of {name}": digest for name, digest in work.run.sealed.items() if "safetensors" in name}
        facts = RunFacts(
            title=title,
            rows=rows,
            grid=work.grid,
            genomes=genomes,
            history=result.history,
            metric=metric,
            curves=elsewhere,
            uniform=uniform,
            sensitivities=measured_sensitivities(work.run.search / SENSITIVITIES),
            errors=[database.errors(index) for index in range(len(work.grid.units))],
            stages=stages,
            settings=settings,
            provenance=made_from(work.checkpoint, work.provenance) | sealed,
            recipe=work.run.recipe,
        )
        write_page(page, title, lead(facts), sections(facts))
    paths = run_report.write_report(
        work.run.path, title, rows, work.grid, genomes, result.history, settings, metric, elsewhere, uniform, stages
    )
    run_report.print_table(rows)
    for sentence in run_report.warnings(rows):
        say(sentence)
    for path in [work.run.exported, *paths, page]:
        print(path)


def card_of(work: Work, result: SearchResult, parameters: tuple[int, int], table: str = "") -> str:
    """The export's model card, with the parameters of the dense and of the pruned model, and what was measured."""
    return model_card(work.config.model, licence_of(work.checkpoint.path), _settings(work, result), *parameters, table)


def _settings(work: Work, result: SearchResult) -> dict[str, str]:
    """What made the result, for people."""
    config = work.config
    search = {"Genome": f"{config.genome}, without a budget", "Compared with": f"uniform at {_target(config)}"}
    if result.history:
        search = {
            "Target": f"at most {work.budget.text}: {_target(config)}",
            "Search": f"{len(result.history) - 1} generations of {config.search.offspring} offspring",
            f"Search {label(config.search.metric)}": (
                f"{result.history[0].fitness:.4f} (start) to {result.fitness:.4f} nats a token"
            ),
        }
    return {
        "Model": config.model,
        "Text": config.data,
        "Calibration": f"{config.calibration.tokens:,} tokens",
        **search,
        **_sizes(work, result.best),
        "Refit": f"{config.refit.tokens:,} tokens" if config.refit.tokens else "none",
        "Seed": str(config.seed),
        "Versions": versions_text(),
    }


def _sizes(work: Work, genome: Genome) -> dict[str, str]:
    """The size of the export beside the paper's count, where the two may differ."""
    if not any(unit.uneven for unit in work.grid.units):
        return {}
    both = (parameter_costs, shared_parameter_costs)
    exported, counted = (costs(work.grid, work.dense_parameters).of(genome) for costs in both)
    return {"Size": f"{exported:,} parameters; {counted:,} as the paper counts, with K and V shared by what is left"}


def _target(config: RunConfig) -> str:
    """What the user asked for."""
    return config.target or f"level {config.level:g} of {config.database.levels}"
