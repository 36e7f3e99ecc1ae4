"""Seconds of work that is killed and goes on."""

from __future__ import annotations

import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from darwinlm.runtime.stopwatch import BEAT, Stopwatch


def work(file: Path) -> None:
    with Stopwatch(file, go_on=True):
        time.sleep(60)


@pytest.mark.slow
def test_a_killed_process_has_its_seconds_counted(tmp_path: Path):
    file = tmp_path / "state" / "seconds"
    process = get_context("spawn").Process(target=work, args=(file,))
    process.start()
    while not file.exists():
        time.sleep(0.1)
    process.kill()
    process.join()
    with Stopwatch(file, go_on=True) as stopwatch:
        time.sleep(0.2)
    assert BEAT + 0.2 <= stopwatch.seconds < 2 * BEAT + 5
    with Stopwatch(file, go_on=False) as anew:
        time.sleep(0.2)
    assert 0.2 <= anew.seconds < BEAT


def test_an_error_is_handed_on_and_stops_it(tmp_path: Path):
    with pytest.raises(KeyError), Stopwatch(tmp_path / "seconds", go_on=True) as stopwatch:
        raise KeyError
    assert not stopwatch._thread.is_alive()
