"""The sources of training text: files, directories, patterns, packages, and data sets of a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

from datasets import IterableDataset, load_dataset

from darwinlm.data.documents import PACKAGED, read_documents
from darwinlm.data.hub import dataset_named, stream_dataset
from darwinlm.runtime.understood import understood
from darwinlm.types import UsageError

LOADERS = {".jsonl": "json", ".parquet": "parquet"}


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
    """Return the documents of a source as records, in the shards that the source has."""
    files = files_of(source)
    if files and files[0].suffix in LOADERS:
        with understood(f"no text in {source} that can be read", "check --data"):
            names = [str(file) for file in files]
            return load_dataset(LOADERS[files[0].suffix], data_files=names, split="train", streaming=True)
    if source in PACKAGED or files:
        return IterableDataset.from_generator(_in_memory, gen_kwargs={"source": source})
    with understood(f"no text in {source} that can be read", "check --data"):
        return stream_dataset(source)


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
