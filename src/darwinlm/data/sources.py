"""The sources of training text: files, directories, patterns, packages, and data sets of a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from darwinlm.data.documents import PACKAGED, documents_of, read_documents, records_of
from darwinlm.data.hub import dataset_named, stream_dataset
from darwinlm.runtime.understood import understood
from darwinlm.types import UsageError

# The lines of .jsonl are parsed by us, since datasets stops at a bad one. In Latin-1, any bytes are text.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("text", {"encoding": "latin-1"}),
    ".parquet": ("parquet", {}),
}


def check_distinct(sources: Sequence[str]) -> None:
    """Raise `UsageError` if a file or a data set is in two of the sources: a training would see its text twice."""
    owners: dict[object, str] = {}
    for source in sources:
        files = [file.resolve() for file in files_of(source)]
        for text in files or [source if source in PACKAGED else dataset_named(source)]:
            if text in owners:
                what = text if isinstance(text, Path) else source
                raise UsageError(
                    f"--data: expected every text in one source, found {what} in {owners[text]} and in {source}; name "
                    "it once, with a weight if it is to count more"
                )
            owners[text] = source


def stream_of(source: str) -> IterableDataset:
    """Return the documents of a source, in the shards that the source has: as `texts_of` takes them."""
    files = files_of(source)
    if files and files[0].suffix in LOADERS:
        with understood(f"no text in {source} that can be read", "check --data"):
            names = [str(file) for file in files]
            loader, options = LOADERS[files[0].suffix]
            return load_dataset(loader, data_files=names, split="train", streaming=True, **options)
    if source in PACKAGED or files:
        return IterableDataset.from_generator(_in_memory, gen_kwargs={"source": source})
    with understood(f"no text in {source} that can be read", "check --data"):
        return stream_dataset(source)


def texts_of(source: str, documents: IterableDataset) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a source, each with its document. Lines of `.jsonl` that hold none, and rows of a broken chat, are
    left out and counted.

    Args:
        documents: what is left of `stream_of`.

    Raises:
        UsageError: if a record of another source has no text.
    """
    files = files_of(source)
    if files and files[0].suffix == ".jsonl":
        lines = (record["text"].encode("latin-1") for record in documents)
        yield from records_of(lines, source, lambda _, line: _place(files, line), whole=False)
    else:
        yield from documents_of(documents, source, lambda _, record: _row(files, source, record), whole=False)


def _place(files: Sequence[Path], line: bytes) -> str:
    """Where a line is. Only this tells its number, for datasets goes on from anywhere in a file."""
    for file in files:
        with file.open("rb") as lines:
            for number, other in enumerate(lines, 1):
                if other.rstrip(b"\r\n") == line:
                    return f"line {number} of {file}"
    return f"a line of {files[0]}"  # which is being written to


def _row(files: Sequence[Path], source: str, record: Mapping[str, Any]) -> str:
    """Where a record is: datasets goes on from anywhere in a file, so it is looked for in all of them."""
    from pyarrow.parquet import ParquetFile  # slow to import, and only these sources need it

    for path in files:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, other in enumerate(rows, 1):
                if other == record:
                    return f"row {number:,} of {path}"
    return f"the row of {source} that begins {str(dict(record))[:80]}"


def _in_memory(source: str) -> Iterator[dict[str, str]]:
    documents = dict.fromkeys(read_documents(source))
    for text in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()):
        yield {"text": text}


def files_of(source: str) -> list[Path]:
    """Return the local files of a source that is a file, a directory or a pattern with `*`, or none for other sources.

    Raises:
        UsageError: if the source is one of these, but there are no such files.
    """
    path = Path(source).expanduser()
    if "*" in source:
        files = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    elif path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.suffix in LOADERS)
    elif path.suffix in (".txt", *LOADERS):
        files = [path] if path.is_file() else []
    else:
        return []
    files = [file for file in files if file.stat().st_size]  # an empty shard has no columns
    if not files or len({file.suffix for file in files}) > 1:
        kinds = " and ".join(sorted({file.suffix for file in files})) or "none"
        raise UsageError(f"no text at {source}: expected .jsonl or .parquet files of one kind, found {kinds}; check it")
    return files


def identity_of(source: str) -> object:
    """Return what identifies a source: name, size and time of each local file, or the full name of any other."""
    files = files_of(source)
    if files:
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return source if source in PACKAGED else astuple(dataset_named(source))
