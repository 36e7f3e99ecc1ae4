"""Text of several kinds from what packages hold: articles, novels, dialogue, technical prose and code.

Novels are those of Debian's `r-cran-janeaustenr`; dialogue is their paragraphs that are speech for the most part, and
narrative (`novels`) the others.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from darwinlm.data.documents import read_documents
from darwinlm.types import DarwinError

PACKAGE = "r-cran-janeaustenr"
BOOKS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
KINDS = ("articles", "novels", "dialogue", "topics", "code")
PARAGRAPHS = 2000  # characters of a document of a novel
SPOKEN = 0.7  # share of a paragraph in quotation marks, from which it is dialogue
SHORTEST = 400  # characters of a document


def write_kinds(directory: Path, novels: Path | None) -> dict[str, Path]:
    """Write each kind to a `.jsonl` file, unless it is there, and return the files by kind.

    Args:
        novels: the package's directory or file, if it was fetched before.
    """
    files = {kind: directory / f"{kind}.jsonl" for kind in KINDS}
    if not all(file.exists() for file in files.values()):
        directory.mkdir(parents=True, exist_ok=True)
        told, spoken = _novels(_books(directory, novels))
        texts = {
            "articles": list(read_documents("vital-wiki")),
            "novels": told,
            "dialogue": spoken,
            "topics": list(topics.values()),
            "code": list(_code()),
        }
        for kind, documents in texts.items():
            kept = [text for text in dict.fromkeys(documents) if len(text) >= SHORTEST]
            files[kind].write_text("".join(f"{json.dumps({'text': text})}\n" for text in kept), encoding="utf-8")
    return files


def _code() -> Iterator[str]:
    """The modules of the standard library, without those in folders."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="replace")


def _books(directory: Path, given: Path | None) -> list[str]:
    """The novels, a text each, of a directory into which the package was unpacked, or of a package that apt fetches."""
    root = given if given is not None and given.is_dir() else directory / "package"
    if not (root / BOOKS).is_file():
        package = given if given is not None and given.is_file() else _fetched(directory)
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return ["\n".join(lines) for lines in r_strings(root / BOOKS)]


def _fetched(directory: Path) -> Path:
    if shutil.which("apt-get") is None:
        raise DarwinError(f"no novels: expected Debian's package {PACKAGE}, found no apt; give it with --novels")
    subprocess.run(["apt-get", "download", PACKAGE], cwd=directory, check=True, capture_output=True)
    return next(directory.glob(f"{PACKAGE}_*.deb"))


def r_strings(file: Path) -> Iterator[list[str]]:
    """The character vectors in a database of R's (`.rdb`): objects one after another, each compressed by zlib.

    Each has its length before it, and is serialised in big-endian form: a header, then flags and length of the vector,
    then flags, length and bytes of each string.
    """
    rest = file.read_bytes()
    while len(rest) > 4:
        reader = zlib.decompressobj()
        content, rest = reader.decompress(rest[4:]), reader.unused_data
        place = 14  # behind the format and three versions
        if content[2:6] == b"\0\0\0\3":  # whose third version names the encoding
            place += 4 + struct.unpack_from(">i", content, place)[0]
        flags, count = struct.unpack_from(">ii", content, place)
        if flags & 0xFF != 16:  # no character vector
            continue
        place, lines = place + 8, []
        for _ in range(count):
            length = max(0, struct.unpack_from(">ii", content, place)[1])
            lines.append(content[place + 8 : place + 8 + length].decode("utf-8"))
            place += 8 + length
        yield lines


def _novels(books: list[str]) -> tuple[list[str], list[str]]:
    """Narrative and dialogue, each as documents of consecutive paragraphs of its kind."""
    told: list[str] = []
    spoken: list[str] = []
    for book in books:
        paragraphs = [" ".join(each.split()) for each in re.split(r"\n\s*\n", book)]
        in_quotes = [sum(map(len, re.findall(r'"[^"]*"?|“[^”]*”?', text))) / max(1, len(text)) for text in paragraphs]
        told += _together(text for text, share in zip(paragraphs, in_quotes, strict=True) if share < SPOKEN)
        spoken += _together(text for text, share in zip(paragraphs, in_quotes, strict=True) if share >= SPOKEN)
    return told, spoken


def _together(paragraphs: Iterator[str]) -> Iterator[str]:
    gathered: list[str] = []
    for text in paragraphs:
        gathered.append(text)
        if sum(map(len, gathered)) >= PARAGRAPHS:
            yield "\n\n".join(gathered)
            gathered = []
    yield "\n\n".join(gathered)
