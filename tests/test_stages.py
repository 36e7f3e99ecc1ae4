"""What the stages of a run take, also where they are killed and go on."""

from __future__ import annotations

import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from darwinlm.runtime.files import read_record
from darwinlm.runtime.peaks import Peaks, held
from darwinlm.runtime.stages import BEAT, Stages

CPU = torch.device("cpu")
LARGE = 1 << 28  # bytes


def fill(size: int) -> None:
    assert torch.ones(size, dtype=torch.uint8)[-1] == 1


def killed(file: Path) -> None:
    with Stages(file, CPU).measured("search"):
        fill(LARGE)
        time.sleep(60)


def test_a_stage_holds_what_it_holds_and_no_other_does(tmp_path: Path) -> None:
    stages, before = Stages(tmp_path / "stages.json", CPU), held()
    for name, size in (("large", LARGE), ("small", LARGE // 16)):
        with stages.measured(name):
            fill(size)
    large, small = stages.used["large"], stages.used["small"]
    assert 0.9 * LARGE < large.host - before < 1.5 * LARGE
    assert small.host < large.host - LARGE // 2
    assert (large.device, small.device) == (0, 0)
    assert Stages(tmp_path / "stages.json", CPU).used == stages.used


def test_a_stage_that_goes_on_adds_up(tmp_path: Path) -> None:
    for _ in range(2):
        with Stages(tmp_path / "stages.json", CPU).measured("search"):
            time.sleep(0.2)
    assert 0.4 <= Stages(tmp_path / "stages.json", CPU).used["search"].seconds < 2.0


def test_marks_are_shared_by_those_that_watch() -> None:
    with Peaks(CPU) as outer:
        before = held()
        fill(LARGE)
        with Peaks(CPU) as inner:
            fill(LARGE // 16)
    assert outer.host - before > 0.9 * LARGE
    assert inner.host - before < LARGE // 2


def test_an_error_is_handed_on_and_counted(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "stages.json", CPU)
    with pytest.raises(KeyError), stages.measured("search"):
        raise KeyError
    assert read_record(tmp_path / "stages.json", "stages")["stages"]["search"]["seconds"] >= 0


@pytest.mark.slow
def test_a_killed_stage_has_its_seconds_and_its_memory_counted(tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    process = get_context("spawn").Process(target=killed, args=(file,))
    process.start()
    while not file.exists():
        time.sleep(0.1)
    process.kill()
    process.join()
    stages = Stages(file, CPU)
    with stages.measured("search"):
        time.sleep(0.2)
    assert BEAT + 0.2 <= stages.used["search"].seconds < 2 * BEAT + 5
    assert stages.used["search"].host > LARGE
