"""An export has its name once it is whole; until then, and if its process is killed, nothing has."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from darwinlm.runtime.files import new_directory, new_file
from darwinlm.types import UsageError

PATIENCE = 120.0  # seconds
Place = Callable[[Path], AbstractContextManager[Path]]


def write(partial: Path) -> None:
    """Something at a name, which is a directory or not there yet."""
    (partial / "weights" if partial.is_dir() else partial).write_text("half")


@pytest.mark.parametrize("place", [new_directory, new_file])
def test_a_name_is_given_in_the_end(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with place(out) as partial:
        write(partial)
        assert not out.exists()
        with pytest.raises(UsageError, match="another process is writing"), place(out):
            pass
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(UsageError, match="to be new"), place(out):
        pass


@pytest.mark.parametrize("place", [new_directory, new_file])
def test_a_failure_leaves_nothing(place: Place, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), place(tmp_path / "out") as partial:  # noqa: PT012
        write(partial)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"), new_directory(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("place", [new_directory, new_file])
def test_what_a_killed_process_leaves_never_has_the_name(place: Place, tmp_path: Path) -> None:
    """Nor does it stay for long: the next export to that name removes it."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    half = partial / "weights" if place is new_directory else partial
    script = (
        "import pathlib, sys, time\nfrom darwinlm.runtime.files import new_directory, new_file\n"
        f"with {place.__name__}(pathlib.Path(sys.argv[1])):\n"
        "    pathlib.Path(sys.argv[2]).write_text('half')\n    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(out), str(half)]) as running:
        deadline = time.monotonic() + PATIENCE
        while not half.exists() or half.read_text() != "half":
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with pytest.raises(UsageError, match="another process is writing"), place(out):
            pass
        running.kill()
        assert running.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == [partial]
    with place(out) as again:
        assert not list(again.glob("weights"))
        write(again)
    assert list(tmp_path.iterdir()) == [out]
