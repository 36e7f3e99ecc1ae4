"""The HTML report: every figure is in a table, no text can act, and plotly knows every setting of a chart."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from browser import Browser, browser
from darwinlm.evaluation.quality import Quality
from darwinlm.evaluation.rows import Row
from darwinlm.evaluation.tasks import Score
from darwinlm.genome import Grid, level_grid
from darwinlm.report import cells_page, charts, html, run_page, training_page
from darwinlm.report.comparison import Cell
from darwinlm.runtime.stages import StageUse
from darwinlm.runtime.timing import Ratio
from darwinlm.types import Generation, Genome, Unit

EVIL = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1"><!--&lt;'
SAME, FAST = Ratio(1.0, 1.0, 1.0), Ratio(1.125, 1.0625, 1.25)
TEXT = f"texts/{EVIL.replace('/', '')}.txt"
QUALITY = {TEXT: Quality(21.5, 0.25)}
PAGES = ("run", "frontier", "comparison", "training")


def grid() -> Grid:
    units = tuple(
        Unit(f"block-{block:02d}-{kind}", block, kind, "consumer", (), 1, 12, 10, 0)
        for block in range(30)
        for kind in ("attention", "mlp")
    )
    return level_grid(units, levels=4, granularity=1)


def history() -> list[Generation]:
    uniform, found = Genome((2,) * 60), Genome((1, 3) * 29 + (4, 0))
    starts = {"uniform": 7.5, "sensitivity": 1.5}
    first = Generation(0, 1.5, found, 2, 1.5, "sensitivity", (1.5,), starts=starts)
    rest = [
        Generation(n, 1.5 - 0.03125 * n, uniform if n % 2 else found, 16, 30.0, "priced mutation", (1.75, 1.25))
        for n in range(1, 21)
    ]
    return [first, *rest]


def run_facts() -> run_page.RunFacts:
    rows = [
        Row("dense", 200_000_000, 10.0, 0.0, 1000.0, 40.0, SAME, SAME, 400_000_000, (f"Rome {EVIL}",), QUALITY),
        Row(
            "searched",
            150_000_000,
            14.125,
            0.375,
            1120.0,
            44.0,
            Ratio(1.125, 1.0625, 1.25),
            SAME,
            300_000_000,
            ("Rome was",),
            QUALITY,
        ),
    ]
    line = history()
    return run_page.RunFacts(
        title=f"A model {EVIL}",
        rows=rows,
        grid=grid(),
        genomes={"uniform": Genome((2,) * 60), "searched": line[0].genome},
        history=line,
        metric="KL",
        curves={TEXT: ((0, 2.125), (20, 1.875))},
        uniform={TEXT: 8.25},
        sensitivities=[[0.0, 0.0625, 0.125, 0.25, 0.5]] * 60,
        errors=[[0.0, 1.0, 2.0, 5.0, 8.0]] * 60,
        stages={"search": StageUse(633.5, 2_100_000_000, 3_300_000_000)},
        settings={"Text": EVIL},
        provenance={"SHA-256 of the text": "ab" * 32},
        recipe=EVIL,
    )


def cells() -> list[Cell]:
    score = Score("piqa", "acc", 0, 0.625, 0.0625, 16, "file", (0.0,) * 6 + (1.0,) * 10)
    likely = Score("piqa", "log-likelihood", 0, -7.5, 1.0, 16, "file", tuple(-float(n) for n in range(16)))
    figures = (200_000_000, 400_000_000, 10.0, 0.0, 100.0, 40.0)
    dense = Cell("dense", 1.0, None, (0,) * 60, *figures, texts=QUALITY, scores=(score, likely), continuations=(EVIL,))
    pruned = replace(dense, levels=(1, 3) * 29 + (4, 0), speedup=(1.25, 1.5))
    sizes = {"params=0.9": (0.9, 0.125), "params=0.8": (0.8, 0.1875), "params=0.7": (0.7, 1.375)}
    return [
        dense,
        *(
            replace(
                pruned, method=name, kept=kept, kl=kl, perplexity=10 + 20 * kl, parameters=int(2e8 * kept),
                scores=(score, replace(likely, by_question=tuple(-kl - n**1.1 for n in range(16)))),
            )
            for name, (kept, kl) in sizes.items()
        ),
    ]  # fmt: skip


def cells_facts(found: list[Cell]) -> cells_page.CellsFacts:
    return cells_page.CellsFacts(
        title="Sizes", cells=found, protocol=[EVIL], settings={"Text": EVIL}, provenance={}, recipe=EVIL, stages={}
    )


def written(name: str) -> tuple[str, str, list[html.Section]]:
    """The title, the first sentences and the sections of a page."""
    if name == "run":
        facts = run_facts()
        return facts.title, run_page.lead(facts), run_page.sections(facts)
    if name == "frontier":
        histories = {cell.method: history() for cell in cells()[1:]}
        sections = cells_page.frontier_sections(cells_facts(cells()), grid(), histories, "KL")
        return EVIL, cells_page.frontier_lead(cells()), sections
    if name == "comparison":
        found = [replace(cell, method="ours" if cell.kept < 1 else "dense") for cell in cells()]
        found.append(replace(found[-1], method=EVIL, kl=2.5))
        found.append(Cell("refuses", 0.5, refused=EVIL))
        return EVIL, cells_page.comparison_lead(found), cells_page.comparison_sections(cells_facts(found))
    log = [{"step": 0, "eval_perplexity": 12.5}, {"step": 10, "loss": 2.375}, {"step": 10, "eval_perplexity": 11.25}]
    training = training_page.TrainingFacts(
        title=EVIL, log=log, before={"perplexity": 12.5}, after={"perplexity": 11.25},
        written={"before": [EVIL], "after": ["Rome"]}, settings={"Text": EVIL}, provenance={}, recipe=EVIL,
    )  # fmt: skip
    return EVIL, training_page.lead(training), training_page.sections(training)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name in PAGES:
        html.write_page(folder / f"{name}.html", *written(name))
    return {name: folder / f"{name}.html" for name in PAGES}


class Tags(HTMLParser):
    """The elements of a page, and the texts in its table cells."""

    def __init__(self, page: str):
        super().__init__()
        self.scripts: list[dict[str, str | None]] = []
        self.named: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.named.append(tag)
        self._in_cell = tag == "td"
        if tag == "script":
            self.scripts.append(dict(attrs))
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def embedded(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', page, flags=re.S)
    return json.loads(found)


@pytest.mark.parametrize("name", PAGES)
def test_plotly_knows_every_setting_of_a_chart(name: str, pages: dict[str, Path]) -> None:
    """And every chart has its place in the page."""
    page = pages[name].read_text()
    drawn = embedded(page)
    assert drawn
    for chart, figure in drawn.items():
        go.Figure(figure)  # raises on a name or a value that plotly does not have
        assert page.count(f'id="{chart}"') == 1


@pytest.mark.parametrize("name", PAGES)
def test_no_text_becomes_an_element(name: str, pages: dict[str, Path]) -> None:
    tags = Tags(pages[name].read_text())
    assert len(tags.scripts) == 3, "the charts' data, plotly and what draws"
    assert "img" not in tags.named
    assert EVIL in tags.cells, "but it is shown"


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_of_a_chart_is_in_a_table(name: str, pages: dict[str, Path]) -> None:
    page = pages[name].read_text()
    numbers = set(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", " ".join(Tags(page).cells).replace(",", "")))

    def is_told(value: float) -> bool:
        shapes = (".4g", ".3g", ".4f", ".3f", ".2f", ".1f", ".0f")
        return any(f"{abs(number):{shape}}" in numbers for number in (value, value / 1e6) for shape in shapes)

    for chart, figure in embedded(page).items():
        if chart.startswith(("levels", "units")):  # in per cent, where the table has counts
            continue
        for trace in figure["data"]:
            values = trace["x"] if trace.get("orientation") == "h" else trace["y"]
            missing = [value for value in values if not is_told(value)]
            # The mean over tasks is that of columns; a reciprocal of none.
            assert not missing or "tasks" in chart, (chart, missing)


def test_units_are_told_with_all_that_is_known_of_them(pages: dict[str, Path]) -> None:
    page = pages["run"].read_text()
    bars = [trace for trace in embedded(page)["levels"]["data"] if trace["type"] == "bar"]
    assert [len(trace["x"]) for trace in bars] == [30, 30]
    told = bars[1]["hovertext"][0].split("<br>")
    assert told == [
        "unit: block 0, mlp",
        "left in uniform: 6 of 12 channels",
        "left in searched: 3 of 12 channels",
        "level: 3 of 4",
        "sensitivity (nats a token): 0.25",
        "output error (% of the unit's removal): 62.5",
    ]
    assert bars[1]["y"][0] == 25
    tags = Tags(page).cells
    assert all(part.partition(": ")[2] in tags for part in told)


def test_uniform_far_above_the_search_has_a_strip_of_its_own(pages: dict[str, Path]) -> None:
    chart = embedded(pages["run"].read_text())["search"]
    levels = {trace["name"]: trace for trace in chart["data"] if trace["name"].startswith("uniform")}
    assert [trace["y"] for trace in levels.values()] == [[7.5, 7.5], [8.25, 8.25]]
    assert {trace["yaxis"] for trace in levels.values()} == {"y2"}
    low, high = chart["layout"]["yaxis"]["range"]
    assert 0.5 < low < 0.875 < 2.125 < high < 2.5


def test_a_first_sentence_says_what_was_found() -> None:
    assert run_page.lead(run_facts()).startswith(
        "The searched model has 150.0 M of the dense model's 200.0 M parameters (75 %), and its KL from the dense "
        "model on held-out text is 0.375 nats a token."
    )
    assert "The knee is params=0.8 (160.0 M, KL 0.188)" in cells_page.frontier_lead(cells())
    assert "perplexity on held-out text went from 12.5 to 11.25" in written("training")[1]
    assert written("comparison")[1].startswith("Of the methods, ours has the least KL from the dense model on held-out")


def test_colours_stand_out_from_white_and_black() -> None:
    """By 3 to 1, as the WCAG asks of pictures."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    papers = re.findall(r"--paper: (#\w{6})", (html.FOLDER / "page.css").read_text())
    assert len(papers) == 2
    for colour in (*charts.COLOURS, charts.GREY):
        for paper in papers:
            light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 3, (colour, paper)


def test_a_page_that_fails_is_only_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    with html.unless_it_fails(path):
        html.write_page(path, "A", "B", [html.Section("C", [html.Note(None)])])  # type: ignore[arg-type]
    assert not path.exists()
    assert f"{path} was not written (" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), html.unless_it_fails(path):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


MARKS = ".points path, .lines path, .bars path, .hm image"
FILLED = f"[...document.querySelectorAll('.chart')].filter(chart => chart.querySelector('{MARKS}')).length"


@pytest.mark.slow
def test_the_browser_notices_what_a_page_does(tmp_path: Path) -> None:
    """Or the next test would say nothing. In a browser of its own, for what it complains of may come late."""
    page = tmp_path / "page.html"
    loads = '<img src="http://example.com/a.png"><link rel=stylesheet href="https://example.com/a.css">'
    page.write_text(f"<!DOCTYPE html>{loads}<script>console.log('said'); fetch('//example.com/b'); missing()</script>")
    with browser(tmp_path / "profile") as tab:
        tab.open(page)
        asked = {address.rpartition("/")[2] for address in tab.requests}
        assert {"a.png", "a.css"} <= asked
        assert any("said" in said for said in tab.complaints)
        assert any("missing is not defined" in said for said in tab.complaints)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_draws_all_and_asks_for_nothing(name: str, pages: dict[str, Path], tab: Browser) -> None:
    tab.requests.clear()
    tab.complaints.clear()
    tab.open(pages[name])
    assert tab.value(FILLED) == len(embedded(pages[name].read_text()))
    assert tab.value("document.title") == written(name)[0], "no text has run"
    assert (tab.requests, tab.complaints) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_it_without_scrolling_sideways(name: str, pages: dict[str, Path], tab: Browser) -> None:
    tab.open(pages[name], width=360, height=740)
    assert tab.value("document.documentElement.scrollWidth") == 360
    widest = "Math.max(...[...document.querySelectorAll('.chart .main-svg')].map(c => c.getBoundingClientRect().right))"
    assert tab.value(widest) <= 360


@pytest.mark.slow
def test_the_dark_page_has_light_texts_also_in_charts(pages: dict[str, Path], tab: Browser) -> None:
    tick = "getComputedStyle(document.querySelector('.chart .xtick text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for dark in (False, True):
        tab.open(pages["run"], dark=dark)
        seen.append((tab.value(paper), tab.value(tick)))
    assert seen == [("rgb(255, 255, 255)", "rgb(27, 31, 35)"), ("rgb(20, 23, 26)", "rgb(230, 232, 234)")]
    tab.appear(dark=False)  # the system changes while the page is open
    assert (tab.value(paper), tab.value(tick)) == seen[0]
    tab.appear(dark=True, media="print")
    assert (tab.value(paper), tab.value(tick)) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")


@pytest.mark.slow
def test_charts_fit_on_paper_and_come_back(pages: dict[str, Path], tab: Browser, tmp_path: Path) -> None:
    widths = "[...document.querySelectorAll('.chart .main-svg')].map(c => c.getBoundingClientRect().width)"
    tab.open(pages["run"])
    before = tab.value(widths)
    tab.value("dispatchEvent(new Event('beforeprint'))")
    assert max(tab.value(widths)) <= 640
    tab.value("dispatchEvent(new Event('afterprint'))")
    assert tab.value(widths) == before
    tab.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_without_scripts_the_tables_are_there(pages: dict[str, Path], tab: Browser) -> None:
    tab.open(pages["run"], scripts=False)
    picture = "[...document.querySelectorAll('.chart')].every(c => getComputedStyle(c).display == 'none')"
    assert tab.value(picture) is True
    assert "Charts need JavaScript" in tab.value("document.body.innerText")
    assert tab.value("document.querySelectorAll('table').length") >= 5
