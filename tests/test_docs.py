"""The commands in README.md and docs/: all of them parse, and those that a tiny model allows are run."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import yaml

import runs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if not path.is_symlink())]
BLOCK = re.compile(r"(?P<mark><!-- not run: [^\n]+ -->\n\n?)?```sh\n(?P<text>.*?)```", re.DOTALL)
SMALL = {
    "compress": {"calibration", "database", "search", "refit", "evaluation"},
    "frontier": {"calibration", "database", "search", "refit", "evaluation"},
    "compare": {"calibration", "database", "search", "evaluation"},
    "plan": {"calibration", "database"},
}
"""Sections of the settings of a short run that a command takes."""
TRAINING = {
    "stream": {"sequence_length": 32},
    "training": {"batch_size": 2, "micro_batch_size": 2, "warmup_steps": 1, "evaluation_tokens": 64},
}


@dataclass(frozen=True)
class Block:
    """A shell block: the page it is on, its commands, and whether a test runs it."""

    page: str
    commands: tuple[str, ...]
    runs: bool

    @property
    def darwinlm(self) -> list[list[str]]:
        """The arguments of each darwinlm command."""
        words = [shlex.split(command, comments=True) for command in self.commands]
        starts = [("darwinlm",), ("-m", "darwinlm")]
        return [
            line[line.index("darwinlm") + 1 :]
            for line in words
            if line and (line[0] == "darwinlm" or any(tuple(line[i : i + 2]) == starts[1] for i in range(len(line))))
        ]


def blocks() -> list[Block]:
    """Every shell block of every page, in order."""
    result = []
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            lines = match["text"].replace("\\\n", " ").strip().splitlines()
            result.append(Block(page.name, tuple(lines), runs=match["mark"] is None))
    return result


def test_a_block_that_is_not_run_says_why_and_most_are_run() -> None:
    found = blocks()
    assert sum(block.runs for block in found) >= len(found) / 2
    for block in found:
        assert not block.runs or block.darwinlm, f"{block.page}: {block.commands} is no darwinlm command: mark it"


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_every_flag_in_the_documentation_exists(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = next(path for path in PAGES if path.name == page).read_text(encoding="utf-8")
    prose = re.findall(r"`(darwinlm [a-z]+ [^`\n]*--[^`\n]+)`", text)
    commands = [c for block in blocks() if block.page == page for c in block.darwinlm]
    for arguments in commands + [shlex.split(command)[1:] for command in prose]:
        known = _flags(arguments[0], capsys)
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert flag in known, f"{page}: darwinlm {shlex.join(arguments)}: there is no {flag}"


def _flags(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """All flags of a command, as its longest help lists them."""
    capsys.readouterr()
    assert runs.call(command, "--help-all") == 0
    return set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", sorted({block.page for block in blocks() if block.runs}))
def test_the_commands_of_a_page_run_on_a_tiny_model(
    page: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, as a reader gives them: what an earlier command has written, a later one reads."""
    monkeypatch.chdir(tmp_path)
    given = {"MODEL": str(checkpoints["llama-gqa"]), "DATA": str(text)}
    commands = [command for block in blocks() if block.page == page and block.runs for command in block.darwinlm]
    if not any("runs/mine" in command for command in commands if command[0] == "compress") and any(
        "runs/mine" in command for command in commands
    ):
        commands.insert(0, ["compress", "MODEL", "--data", "DATA", "--target", "params=0.6", "--out", "runs/mine"])
    done: list[list[str]] = []
    for command in commands:
        if command in done:
            continue
        done.append(command)
        arguments = [given.get(word, word) for word in command]
        unverified = ["--no-verify"] if command[0] in ("compress", "train", "export") else []
        assert runs.call(*_small(arguments, tmp_path), *unverified) == 0, f"{page}: darwinlm {shlex.join(command)}"


def _small(arguments: list[str], directory: Path) -> list[str]:
    """The command with settings that a tiny model and seconds allow, in a file or, where there is none, by flags."""
    command = arguments[0]
    settings = {name: value for name, value in _short_settings().items() if name in SMALL.get(command, ())}
    if command == "train":
        settings, arguments = dict(TRAINING), _with(arguments, "--tokens", "256")
    if command == "evaluate":
        return [*arguments, "--tokens", "256", "--window", "64", "--prompt-tokens", "16", "--new-tokens", "4"]
    if command == "plan":
        settings["database"] = {"granularity": 8}  # of ten levels, in which its default target level is
    if not settings:
        return arguments
    file = directory / f"{command}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return [*arguments, "--config", str(file)]


def _with(arguments: list[str], flag: str, value: str) -> list[str]:
    index = arguments.index(flag) + 1
    return [*arguments[:index], value, *arguments[index + 1 :]]


def _short_settings() -> dict[str, object]:
    return json.loads(json.dumps(asdict(runs.SHORT)))
