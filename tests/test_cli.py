"""The command line: what it accepts, what it says of what it does not, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import runs
from darwinlm import __version__, cli
from darwinlm.commands import compress, export  # noqa: F401, before `run` is replaced
from darwinlm.config.files import read_settings
from darwinlm.config.run import DEMO, RunConfig, SearchConfig
from darwinlm.runtime import progress
from darwinlm.runtime.progress import console, say, track
from darwinlm.types import DarwinError, SelectionStage, UsageError
from refusals import TOLD, only_sentence, told


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, str]]:
    """The runs that a command starts, none of which is run."""
    started: list[tuple[RunConfig, str]] = []
    monkeypatch.setattr(compress, "run", lambda config, until: started.append((config, until)))
    return started


def test_flags_are_the_settings(ran: list[tuple[RunConfig, str]]):
    flags = (
        "compress M --data D --out O --target-level 2.5 --seed 7 --device cpu --dtype bfloat16 --genome G --no-verify"
    )
    nested = ("--calibration.sequence-length 64 --database.levels 6 --search.learning-rate 1e-3 "
              "--search.max-switches 2 --evaluation.repeats 2")  # fmt: skip
    stages = ["--search.stages", "[{survivors: 2, fitness_tokens: 64}, {survivors: 1, fitness_tokens: 128}]"]
    assert cli.main([*flags.split(), *nested.split(), *stages]) == 0
    ((config, until),) = ran
    expected = RunConfig("M", "D", "O", 2.5, 7, "cpu", "bfloat16", "G", verify=False)
    expected = dataclasses.replace(
        expected,
        calibration=dataclasses.replace(expected.calibration, sequence_length=64),
        database=dataclasses.replace(expected.database, levels=6),
        search=SearchConfig(stages=(SelectionStage(2, 64), SelectionStage(1, 128)), learning_rate=1e-3, max_switches=2),
        evaluation=dataclasses.replace(expected.evaluation, repeats=2),
    )
    assert config == expected
    assert until == "report"


def test_the_help_shows_what_people_use(capsys: pytest.CaptureFixture[str]):
    assert runs.call("compress", "--help") == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"^  (?:-h, )?(--[\w.-]+)", text, re.MULTILINE)) == {
        "--help", "--help-all", "--preset", "--config", "--data", "--out", "--target", "--target-level", "--seed",
        "--device", "--dtype", "--genome", "--fit-data",
    }  # fmt: skip
    assert "--help-all shows every setting" in text


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from darwinlm.cli import main\n"
        "try: main(['compare', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "evopress" in result.stdout


def test_a_flag_is_not_guessed_from_its_beginning(capsys: pytest.CaptureFixture[str]):
    assert runs.call("compress", "M", "--data", "D", "--out", "O", "--target-lev", "4") == 2
    assert "has no flag --target-lev (the closest is --target-level)" in capsys.readouterr().err


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]):
    assert runs.call("compress", "--help-all") == 0
    text = " ".join(capsys.readouterr().out.split())

    def flags(config: type, prefix: str = "") -> list[str]:
        found = []
        for field in dataclasses.fields(config):
            factory = field.default_factory
            nested = factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None
            found += flags(nested, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
        return found

    assert len(flags(RunConfig)) > 20
    for flag in flags(RunConfig):
        assert flag == "model" or f"--{flag.replace('_', '-')} " in text.replace(",", " "), flag


def test_a_recipe_is_read_and_flags_win_over_it(tmp_path: Path, ran: list[tuple[RunConfig, str]]):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: M\ndata: D\nseed: 3\nverify: false\nsearch: {generations: 9, offspring: 5}\n")
    flags = ["--out", "O", "--seed", "4", "--search.offspring", "6"]
    assert cli.main(["compress", "--config", str(recipe), *flags]) == 0
    assert cli.main(["compress", "OTHER", *flags, f"--config={recipe}", "--verify"]) == 0
    assert cli.main(["compress", "OTHER", *flags, "--config", str(recipe)]) == 0
    first, second, third = (config for config, _ in ran)
    assert (third.model, third.seed, third.search.generations) == ("OTHER", 4, 9)
    assert (first.model, first.data, first.out, first.verify) == ("M", "D", "O", False)
    assert (first.seed, first.search.generations, first.search.offspring) == (4, 9, 6)
    assert (second.model, second.verify) == ("OTHER", True)


@pytest.mark.parametrize("preset", [["--preset", "paper"], ["--preset=paper"]])
def test_a_preset_is_read_before_files_and_flags(
    preset: list[str], tmp_path: Path, ran: list[tuple[RunConfig, str]]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("search: {offspring: 5, learning_rate: 2.0e-5}\n")
    command = ["compress", "M", "--data", "D", "--out", "O", "--search.offspring", "6"]
    assert cli.main([*command, "--config", str(recipe), *preset]) == 0
    assert cli.main([*command[:-2], *preset]) == 0
    (mixed, _), (paper, _) = ran
    assert (mixed.search.offspring, mixed.search.learning_rate) == (6, 2e-5)
    assert (paper.search.offspring, paper.search.learning_rate, paper.search.max_switches) == (16, 1e-5, 3)
    assert (paper.search.start, paper.search.moves, paper.search.metric) == ("uniform", "within_kinds", "kl")
    assert (paper.search.loss, paper.search.trains) == ("cross-entropy", "all")
    assert (paper.search.generations, paper.search.scrambled, paper.refit.tokens) == (200, 0, 0)
    assert (paper.database.levels, paper.database.structure, paper.database.granularity) == (10, "head", 32)
    assert [s.survivors for s in paper.search.stages] == [8, 4, 2, 1]
    assert [s.fitness_tokens for s in paper.search.stages] == [1024, 2048, 4096, 8192]
    assert [s.training_tokens for s in paper.search.stages] == [10_000, 50_000, 100_000, 200_000]


def test_budgets_have_flags(ran: list[tuple[RunConfig, str]]) -> None:
    assert cli.main(["compress", "M", "--data", "D", "--out", "O", "--target", "params=0.6", "--keep-attention"]) == 0
    assert (ran[0][0].target, ran[0][0].keep_attention) == ("params=0.6", True)


def test_a_size_is_given_in_one_way(ran: list[tuple[RunConfig, str]], capsys: pytest.CaptureFixture[str]) -> None:
    """By a target or by a level; the demo's own level gives way to a target."""
    both = ["--out", "O", "--target", "params=0.6", "--target-level", "4"]
    for command in (["compress", "M", "--data", "D"], ["demo"]):
        assert cli.main([*command, *both]) == 2
        assert "expected one of them, found both (params=0.6 and level 4)" in capsys.readouterr().err
    assert cli.main(["demo", "--target", "params=0.9"]) == 0
    ((config, _),) = ran
    assert (config.target, config.target_level) == ("params=0.9", None)


@pytest.mark.parametrize(
    ("of_file", "typed"), [("target_level: 4", "--target"), ("target: params=0.7", "--target-level")]
)
def test_a_size_that_is_typed_replaces_that_of_a_file(
    of_file: str, typed: str, tmp_path: Path, ran: list[tuple[RunConfig, str]]
) -> None:
    (tmp_path / "file.yaml").write_text(of_file)
    value = {"--target": "params=0.6", "--target-level": "3"}[typed]
    for flags in ([typed, value], [f"{typed}={value}"]):
        command = ["compress", "M", "--data", "D", "--out", "O", "--config", str(tmp_path / "file.yaml")]
        assert cli.main([*command, *flags]) == 0
        size = (ran[-1][0].target, ran[-1][0].target_level)
        assert size == (("params=0.6", None) if typed == "--target" else (None, 3.0))


def test_without_a_size_half_of_the_levels_is_the_target(ran: list[tuple[RunConfig, str]]) -> None:
    """So a database of few levels needs no target level."""
    for levels in ("4", "10"):
        assert cli.main(["database", "M", "--data", "D", "--out", "O", "--database.levels", levels]) == 0
    assert [config.level for config, _ in ran] == [2, 5]


def test_run_yaml_is_a_recipe(tmp_path: Path, ran: list[tuple[RunConfig, str]]):
    written = dataclasses.replace(runs.SHORT, genome="G", device="cpu")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load(_yaml(written))))
    assert read_settings(tmp_path / "run.yaml") == written
    assert cli.main(["compress", "--config", str(tmp_path / "run.yaml")]) == 0
    assert ran[0][0] == written


def _yaml(config: RunConfig) -> str:
    import json

    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))))


def test_each_command_stops_after_its_stage(ran: list[tuple[RunConfig, str]]):
    for command in ("database", "search", "compress"):
        assert cli.main([command, "M", "--data", "D", "--out", "O"]) == 0
    assert [until for _, until in ran] == ["database", "search", "report"]


def test_the_demo_has_its_own_settings(tmp_path: Path, ran: list[tuple[RunConfig, str]]):
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--seed", "2", "--out", "elsewhere"]) == 0
    (tmp_path / "demo.yaml").write_text("search: {generations: 1}\n")
    assert cli.main(["demo", "--config", str(tmp_path / "demo.yaml")]) == 0
    first, second, third = (config for config, _ in ran)
    assert first == DEMO
    assert second == dataclasses.replace(DEMO, seed=2, out="elsewhere")
    assert third == dataclasses.replace(DEMO, search=dataclasses.replace(DEMO.search, generations=1))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("compress M --data D --out O --bogus 1", ["--bogus", "darwinlm compress --help"]),
        ("compress M --data D --out O --seed x", ["--seed: expected a whole number, found x;"]),
        (
            "compress M --data D --out O --search.learning-rate fast",
            ["--search.learning-rate: expected a number, found fast;"],
        ),
        ("compress M --data D --out O --dtype float8", ["--dtype: expected auto, float32 or bfloat16, found float8;"]),
        ("compress M --data D --out O --preset plain", ["--preset", "plain", "paper"]),
        (
            "compress M --data D --out O --search.metric accuracy",
            ["--search.metric: expected kl, top-k-kl or perplexity, found accuracy"],
        ),
        ("compress M --data D --out O --config nowhere.yaml", ["--config", "nowhere.yaml"]),
        ("compress M --data D --out O --search.stages [{survivors:1}]", ["survivors:1", "darwinlm --help"]),
        (
            "compress M --data D --out O --evaluation.texts a",
            ["--evaluation.texts: expected a list such as [a,b], found a;"],
        ),
        ("compress M --data D --out O --target-level x", ["--target-level: expected a number or null, found x;"]),
        (
            "compress M --data D --out O --search.stages [1]",
            ["--search.stages: expected a mapping of settings, found 1;"],
        ),
        ("compress M --data D", ["required: --out;", "darwinlm compress --help"]),
        ("compress --data D --out O", ["required: MODEL;"]),
        ("gradual --data D --out O", ["required: --model;", "darwinlm gradual --help"]),
        ("export --format gguf", ["required: SOURCE, --out;"]),
        ("squash M", ["squash", "compress", "demo"]),
        ("", ["command", "compress", "demo"]),
    ],
)
def test_arguments_that_cannot_be_read(
    flags: str, words: list[str], capsys: pytest.CaptureFixture[str], ran: list[tuple[RunConfig, str]]
):
    assert runs.call(*flags.split()) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("darwinlm: ")
    for word in words:
        assert word in line
    assert output.out == ""
    assert not ran


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("a\n  b"), 2, "a b"),
        (DarwinError("broken"), 1, "broken"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "the same command goes on from here"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(compress, "run", fail)
    assert cli.main(["compress", "M", "--data", "D", "--out", "O"]) == code
    assert words in only_sentence(capsys.readouterr().err)


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(compress, "run", fail)
    with pytest.raises(AssertionError, match="an invariant"):
        cli.main(["compress", "M", "--data", "D", "--out", "O"])


def test_version(capsys: pytest.CaptureFixture[str]):
    assert runs.call("--version") == 0
    assert __version__ in capsys.readouterr().out


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]):
    assert not console.is_terminal
    assert list(track("abc", "letters", 5, done=2)) == ["a", "b", "c"]
    say("[bold]said[/bold]")
    lines = told(capsys.readouterr().err)
    assert lines[0].startswith("letters: 5/5, ")
    assert lines[0].endswith(" 0 s left")
    assert lines[1:] == ["[bold]said[/bold]"]


def test_a_terminal_shows_a_bar_and_a_status_that_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=100))
    said: list[str] = []
    for item in track("ab", "letters", 2, status=lambda: f"after {said}"):
        said.append(item)
        say("told between")
    shown = screen.getvalue()
    assert "letters" in shown
    assert "2/2" in shown
    assert "after ['a', 'b']" in shown
    assert "told between" in shown
    assert not TOLD.search(shown)


def test_what_is_told_goes_to_a_file_as_json(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where nothing is printed; the figures of every generation go there too."""
    file = tmp_path / "log.jsonl"
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", device="cpu")
    arguments = runs.command(config, "--log-file", str(file), name="search")
    assert runs.call(*arguments) == 0
    printed = told(capsys.readouterr().err)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert [event["message"] for event in events if "message" in event] == printed
    found = [(event["step"], event["fitness"]) for event in events if event.get("work") == "search"]
    assert found == [(line["generation"], line["fitness"]) for line in runs.history(tmp_path / "run")[1:]]
    assert all(datetime.fromisoformat(event["time"]).tzinfo for event in events)
    file.unlink()
    assert runs.call(*arguments, "--quiet") == 0
    assert capsys.readouterr().err == ""
    again = [json.loads(line)["message"] for line in file.read_text().splitlines()]
    assert again[0] == "search: loading torch and transformers"


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(tmp_path / "missing" / "log.jsonl")
    assert runs.call("compress", "M", "--data", "D", "--out", str(tmp_path / "O"), "--log-file", name) == 2
    assert f"--log-file: cannot write to {name}" in only_sentence(capsys.readouterr().err)


def test_figures_go_to_tensorboard(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", device="cpu", report_to=("tensorboard",))
    compress.run(config, until="search")
    (file,) = (tmp_path / "run" / "tracked").rglob("events.*")
    accumulator = events.EventAccumulator(str(file)).Reload()
    found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in accumulator.Scalars("search/fitness")]
    assert found == [(line["generation"], line["fitness"]) for line in runs.history(tmp_path / "run")[1:]]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("compress", "M", "--data", "D", "--out", str(tmp_path / "O"), "--report-to", "[paper]")
    assert runs.call(*arguments) == 2
    assert "--report-to: expected what is installed" in only_sentence(capsys.readouterr().err)
    assert not (tmp_path / "O").exists()


@pytest.mark.parametrize("command", ["compress", "database", "search", "train", "gradual", "plan", "compare"])
def test_printed_settings_are_a_file_that_gives_them_again(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = ("--model", "M") if command == "gradual" else ("M",)
    where = () if command == "plan" else ("--data", "D", "--out", "O")
    assert runs.call(command, *model, *where, "--seed", "7", "--print-config") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["seed"] == 7
    file = tmp_path / "settings.yaml"
    file.write_text(printed)
    assert runs.call(command, "--config", str(file), "--print-config") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_an_interruption_is_one_sentence_however_early(tmp_path: Path) -> None:
    """While modules are loaded, too, from which Python would print a traceback."""
    command = [
        sys.executable,
        "-m",
        "darwinlm",
        "compress",
        str(tmp_path),
        "--data",
        "c4",
        "--out",
        str(tmp_path / "out"),
    ]
    for seconds in (0.3, 0.45, 0.6, 1.2, 2.4):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
            time.sleep(seconds)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=60)
        # It may be done before that, with its refusal. Python itself ends by the signal where that came before it could
        # heed any, or within `exec` of a string, which some modules load by: its shell then sees 130 all the same.
        assert running.returncode in (130, 2, -signal.SIGINT)
        assert "Traceback" not in said, seconds
        told = [line for line in said.splitlines() if "loading torch" not in line]
        assert len(told) == 1 or (running.returncode == -signal.SIGINT and not told)
