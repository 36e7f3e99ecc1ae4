"""How a test sees that a command was refused: one sentence, an exit code, nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import runs
from darwinlm.config.run import RunConfig

TOLD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # before each line of progress


def only_sentence(stderr: str) -> str:
    """The one line on stderr that is no progress."""
    lines = [line for line in stderr.splitlines() if not TOLD.match(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("darwinlm: ")
    return lines[0]


def told(stderr: str) -> list[str]:
    """The messages on stderr, without their times."""
    return [TOLD.sub("", line) for line in stderr.splitlines() if TOLD.match(line)]


def refused(
    config: RunConfig, capsys: pytest.CaptureFixture[str], code: int, *words: str, flags: tuple[str, ...] = ()
) -> str:
    """The sentence that a command ends with, in which all `words` must be."""
    capsys.readouterr()
    assert runs.call(*runs.command(config, *flags)) == code
    found = only_sentence(capsys.readouterr().err)
    for word in words:
        assert word in found
    return found


def as_if_nothing_had_happened(config: RunConfig) -> None:
    assert not Path(config.out).exists()


def copied_model(config: RunConfig, tmp_path: Path) -> Path:
    model = tmp_path / "copy"
    shutil.copytree(config.model, model)
    return model


def change_config(model: Path, file: str = "config.json", **fields: Any) -> None:
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
