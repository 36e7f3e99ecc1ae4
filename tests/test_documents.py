"""Documents from files as people have them: marks, broken lines, no blank lines, nesting, commas in names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from darwinlm.data.corpus import parts_of, read_corpus
from darwinlm.data.documents import LONGEST, PLAIN, pieces_of, read_documents
from darwinlm.types import UsageError
from refusals import told

GOOD = b'{"text": "Good."}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": \n', "is no JSON in UTF-8"),
        (b'{"text": "\xff"}\n', "is no JSON in UTF-8"),
        (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"words": "a"}\n', "has no text: expected a column text"),
        (b"5\n", "has no text"),
    ],
)
def test_bad_lines_are_left_out_and_counted(
    line: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD + line + GOOD + b"\n" + line)
    assert list(read_documents(str(file))) == ["Good.", "Good."]
    (said,) = told(capsys.readouterr().err)
    assert said.startswith(f"{file}: 2 of 4 lines are left out, the first for this: line 2 of {file}: it ")
    assert reason in said
    file.write_bytes(line)
    with pytest.raises(UsageError, match=rf"cannot be read as \.jsonl: line 1 .*{reason}"):
        list(read_documents(str(file)))


@pytest.mark.parametrize(("between", "kind"), [("\n\n", "paragraphs"), ("\n", "lines"), (" ", "pieces")])
def test_one_long_file_is_many_documents(
    between: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.txt"
    parts = [f"Part {number} of a text, {'which goes on, ' * 20}and ends." for number in range(2000)]
    file.write_text("\ufeff" + between.join(parts), encoding="utf-8")
    documents = list(read_documents(str(file)))
    assert between.join(documents).replace(between, "") == between.join(parts).replace(between, "") or kind == "pieces"
    assert "".join(documents).replace("\n", " ").count("and ends.") == 2000 or kind == "pieces"
    assert len(documents) > 100
    assert max(map(len, documents)) < 2 * PLAIN
    assert f"long.txt: documents are {kind} of about 2,000 characters" in capsys.readouterr().err


def test_a_file_of_one_line_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    text = "".join(f"{number} " for number in range(50_000))
    file.write_text(text)
    assert "".join(read_documents(str(file))) == text


def test_a_paragraph_without_an_end_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "paragraph.txt"
    line = f"{'word ' * 200}\n"
    file.write_text(f"Title\n\n{line * 2000}")
    documents = list(read_documents(str(file)))
    assert sum(document.count("word") for document in documents) == 200 * 2000
    assert max(map(len, documents)) <= LONGEST + len(line)


def test_long_documents_are_cut_before_a_tokenizer_sees_them(tmp_path: Path) -> None:
    for text in ("word " * LONGEST, "x" * (3 * LONGEST + 1), "line\n" * LONGEST, ""):
        pieces = list(pieces_of(text))
        assert "".join(pieces) == text
        assert all(len(piece) <= LONGEST for piece in pieces)
    file = tmp_path / "book.jsonl"
    file.write_text(json.dumps({"text": "word " * LONGEST}) + "\n" + json.dumps({"text": "short"}))
    assert len(list(read_documents(str(file)))) == 7


def test_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "one, two.jsonl"
    file.write_bytes(GOOD)
    assert parts_of(str(file)) == [str(file)]
    assert len(read_corpus(str(file), tiny.tokenizer(), 8, 0).sources) == 1
    assert parts_of("a.txt=2, b.txt") == ["a.txt=2", "b.txt"]
    for data in ("a.txt,", ",a.txt", "a.txt,,b.txt", ""):
        with pytest.raises(UsageError, match="expected a source before and after each comma"):
            parts_of(data)


def test_a_directory_with_a_script_is_no_source(tmp_path: Path) -> None:
    """Nothing in it is run."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError, match=r"no text at .* expected a file or a data set"):
        list(read_documents(str(tmp_path / "set")))
    assert not (tmp_path / "ran").exists()
