"""A file has its name only once it is whole, and a run refuses a file that was altered or is of another format."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from darwinlm.runtime.files import (
    new_directory,
    new_file,
    open_tensors,
    read_record,
    read_tensors,
    replaced,
    write_record,
    write_tensors,
)
from darwinlm.types import DarwinError, UsageError

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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    for text in ("old", "new"):
        with replaced(file) as temporary:
            temporary.write_text(text)
            assert not file.exists() or file.read_text() == "old"
    with pytest.raises(KeyboardInterrupt), replaced(file) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def test_a_record_comes_back_as_json_has_it(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_record(file, {"levels": (1, 2), "by_number": {10: 0.1, 9: 1e-300}}, {"model": "a"})
    expected = {"levels": [1, 2], "by_number": {"10": 0.1, "9": 1e-300}, "provenance": {"model": "a"}}
    assert read_record(file, "levels") == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"levels": [1, 3]}, "is damaged .*checksum does not match.*; delete it and run the command again"),
        ({"more": None}, "is damaged .*checksum does not match"),
        ({"provenance": {"model": "b"}}, "is damaged .*checksum does not match"),
        ({"sha256": "0" * 64}, "is damaged .*checksum does not match"),
        ({"format": 3}, r"another version of darwinlm \(format 3, expected 2\): start a new run in another --out"),
    ],
)
def test_a_record_that_was_altered_is_refused(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    file = tmp_path / "record.json"
    write_record(file, {"levels": [1, 2]}, {"model": "a"})
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DarwinError, match=sentence):
        read_record(file, "levels")


@pytest.mark.parametrize("content", ['{"provenance": {"model": "a"}}', "[0, 1]"])
def test_a_file_of_the_first_version_is_refused(tmp_path: Path, content: str) -> None:
    """It named neither its format nor a checksum."""
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(DarwinError, match=r"another version of darwinlm \(format 1, expected 2\)"):
        read_record(tmp_path / "record.json")


TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.tensor([0.1, -2.0]).bfloat16(),
    "step": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
}


def test_tensors_come_back_with_their_record(tmp_path: Path) -> None:
    write_tensors(tmp_path / "tensors", TENSORS, {"levels": (1, 2)}, steps=7)
    record, tensors = read_tensors(tmp_path / "tensors")
    assert record == {"provenance": {"levels": [1, 2]}, "name": f"{tmp_path.name}/tensors", "steps": 7}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert [tensors[name].dtype for name in TENSORS] == [tensor.dtype for tensor in TENSORS.values()]


def test_no_byte_of_a_tensor_file_can_be_altered(tmp_path: Path) -> None:
    file = tmp_path / "tensors"
    write_tensors(file, TENSORS, {"model": "a"}, steps=7)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in [*range(whole.index(b"steps"), header - 20, 3), *range(header, len(whole))]:
        altered = bytearray(whole)
        altered[position] ^= 1
        file.write_bytes(altered)
        with pytest.raises(DarwinError, match="tensors"):
            read_tensors(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(DarwinError, match=r"tensors is damaged .*; delete it and run the command again"):
        open_tensors(file)


def test_tensors_of_another_version_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"steps": "7", "provenance": "{}"}, {"darwinlm": '{"format": 1}'}):
        save_file(TENSORS, tmp_path / "tensors", metadata)
        with pytest.raises(DarwinError, match=r"tensors was written by another version .*\(format 1, expected 2\)"):
            open_tensors(tmp_path / "tensors")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process holds")
def test_what_is_not_used_of_a_tensor_file_takes_no_memory(tmp_path: Path) -> None:
    write_tensors(tmp_path / "tensors", {str(number): torch.ones(2**21) for number in range(8)}, {})
    before = mapped_bytes()
    _, tensors = read_tensors(tmp_path / "tensors")
    assert mapped_bytes() - before < tensors["3"].nbytes
    assert tensors["3"].sum() == 2**21
    assert tensors["3"].nbytes / 2 < mapped_bytes() - before < 3 * tensors["3"].nbytes


def mapped_bytes() -> int:
    """Bytes of files that this process has in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssFile")).split()[1])
