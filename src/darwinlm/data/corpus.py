"""Text in, seeded disjoint token blocks out: calibration, search, training, and held-out.

A document's own hash decides whether it is held out, so no seed, size or mixture ever trains on held-out text, and two
copies of a document are always on the same side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from darwinlm.data.chat import Chat
from darwinlm.data.documents import read_documents
from darwinlm.data.packing import (
    Stream,
    as_counts,
    as_sequences,
    bos_of,
    end_of_text,
    interleave,
    one_stream,
    template_fingerprint,
    text_length,
)
from darwinlm.types import LossTokens, UsageError

HELD_OUT_SHARE = 0.1
DOCUMENTS = 256  # are read at a time, and then twice as many
TAIL = 64  # tokens that what comes after a text's end could change


# Texts with a part of their own for evaluation, all of which counts, as in the literature.
TESTS = {"wikitext2": "wikitext2-test", "c4": "c4-validation"}


# The flag that says how many tokens a purpose takes.
FLAGS = {
    "calibration": "--calibration.tokens",
    "search": "fitness_tokens in --search.stages",
    "training": "training_tokens in --search.stages",
    "refit": "--refit.tokens",
    "evaluation": "--evaluation.tokens",
}


def fingerprint(ids: Int[Tensor, "sequences length"], counts: Bool[Tensor, "sequences length"] | None = None) -> str:
    """A hash of token blocks, and of what of them counts."""
    digest = hashlib.sha256(ids.numpy().tobytes())
    if counts is not None:
        digest.update(counts.numpy().tobytes())
    return digest.hexdigest()


class Drawn(NamedTuple):
    """Token blocks, and for every token whether the prediction after it counts in a loss; None if all do."""

    ids: Int[Tensor, "sequences length"]
    counts: Bool[Tensor, "sequences length"] | None


@dataclass(frozen=True)
class Corpus:
    """Documents of one or several sources, and the token blocks drawn from them.

    Attributes:
        sources: documents and weight of each source; a block mixture follows the weights.
        tokenizer: of the model that will read the blocks.
        sequence_length: tokens in a block.
        seed: decides the order of the documents, so which blocks are drawn.
        loss_tokens: which tokens of a chat count.
    """

    sources: tuple[tuple[str, tuple[str, ...], float], ...]
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    seed: int
    loss_tokens: LossTokens = "assistant"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all documents and weights, of the tokens that are put between and before them, and of what renders
        chats."""
        digest = hashlib.sha256(f"{bos_of(self.tokenizer)} {end_of_text(self.tokenizer)}".encode())
        for _, documents, weight in self.sources:
            digest.update(f"{weight}".encode())
            for document in documents:
                digest.update(hashlib.sha256(document.encode()).digest())
        if any(isinstance(document, Chat) for _, documents, _ in self.sources for document in documents):
            digest.update(f"{self.loss_tokens} {template_fingerprint(self.tokenizer)}".encode())
        return digest.hexdigest()

    def draw(self, **tokens: int) -> dict[str, Int[Tensor, "sequences length"]]:
        """Disjoint blocks from the documents that are not held out, by purpose: `draw(calibration=8192, search=4096)`.

        Each count is rounded up to whole sequences. The first purpose's blocks do not depend on what is asked after it.

        Raises:
            UsageError: if a source has too little text.
        """
        return {purpose: drawn.ids for purpose, drawn in self.draw_counted(**tokens).items()}

    def draw_counted(self, **tokens: int) -> dict[str, Drawn]:
        """As `draw`, with which predictions count."""
        return self._draw(tokens, held_out=False)

    def draw_held_out(self, tokens: int) -> Int[Tensor, "sequences length"]:
        """Blocks from held-out documents; the same for every seed.

        Raises:
            UsageError: if a source has too little text.
        """
        return self.draw_held_out_counted(tokens).ids

    def draw_held_out_counted(self, tokens: int) -> Drawn:
        """As `draw_held_out`, with which predictions count."""
        return self._draw({"evaluation": tokens}, held_out=True)["evaluation"]

    def draw_parts(self, tokens: int) -> dict[str, Drawn]:
        """Of a mixture, held-out blocks of each source by itself, at most `tokens` of each; of a single source, none.

        A source in whose held-out documents nothing counts has none.
        """
        if len(self.sources) == 1:
            return {}
        there = self.available(-(-tokens // self.sequence_length), held_out=True)
        parts = {}
        for (name, documents, _), count, short in zip(self.sources, there, self._short_names, strict=True):
            chosen = [document for document in documents if is_held_out(document)]
            part = self._pack(name, chosen, count, {"evaluation": tokens})
            if count and (part.counts is None or part.counts.any()):
                parts[f"{short}, held out"] = part
        return parts

    @property
    def _short_names(self) -> list[str]:
        return short_names([name for name, _, _ in self.sources])

    def available(self, most: int, held_out: bool) -> tuple[int, ...]:
        """How many sequences each source has, of its held-out documents or of the others, at most `most` of each."""

        def count(documents: Sequence[str]) -> int:
            chosen = [document for document in documents if is_held_out(document) == held_out]
            stream = one_stream(chosen, self.tokenizer, most * self._text_length)
            return min(most, len(stream) // self._text_length)

        return tuple(count(documents) for _, documents, _ in self.sources)

    def needed(self, tokens: Mapping[str, int]) -> tuple[int, ...]:
        """How many sequences `draw` takes from each source for `tokens` by purpose."""
        return tuple(sum(self._sequences(count, weight) for count in tokens.values()) for _, _, weight in self.sources)

    def _sequences(self, tokens: int, weight: float) -> int:
        """The sequences that a source of this weight contributes to a purpose."""
        total = sum(weight for _, _, weight in self.sources)
        return int(-(-tokens * weight // (total * self.sequence_length)))

    def draw_beside(self, text: str, tokens: int) -> Int[Tensor, "sequences length"]:
        """The ids of `draw_beside_counted`. Raises as it does."""
        return self.draw_beside_counted(text, tokens).ids

    def draw_beside_counted(self, text: str, tokens: int) -> Drawn:
        """Blocks from the beginning of another text, to judge a model on; the same for every seed.

        Documents of it that this corpus gives to other purposes do not count.

        Raises:
            UsageError: if the text is unknown, unreadable or too short.
        """
        flag = "--evaluation.texts"
        needed = -(-tokens // self.sequence_length) * self._text_length
        used = {document for _, documents, _ in self.sources for document in documents if not is_held_out(document)}
        stream = stream_beside(text, self.tokenizer, needed, lambda document: document not in used, flag)
        if len(stream) < needed:
            raise UsageError(
                f"{flag}: too little text in {text}: expected {needed:,} tokens that nothing else uses, found "
                f"{len(stream):,}; give more text or lower --evaluation.tokens"
            )
        return self._blocks(stream, needed)

    @cached_property
    def _text_length(self) -> int:
        return text_length(self.sequence_length, self.tokenizer)

    def _blocks(self, stream: Stream, tokens: int) -> Drawn:
        """The whole blocks of a stream's first tokens."""
        count = tokens // self._text_length
        ids = as_sequences(stream.ids[: count * self._text_length], self.sequence_length, self.tokenizer)
        if self.loss_tokens == "all" or stream.all_count:
            return Drawn(ids, None)
        return Drawn(ids, as_counts(stream, self.sequence_length, self.tokenizer)[:count])

    def _draw(self, tokens: dict[str, int], held_out: bool) -> dict[str, Drawn]:
        parts: dict[str, list[Drawn]] = {purpose: [] for purpose in tokens}
        for name, documents, weight in self.sources:
            sequences = [self._sequences(count, weight) for count in tokens.values()]
            chosen = [document for document in documents if is_held_out(document) == held_out]
            if not held_out:
                Random(self.seed).shuffle(chosen)
            blocks = self._pack(name, chosen, sum(sequences), tokens)
            for purpose, part in zip(tokens, _split(blocks, sequences), strict=True):
                parts[purpose].append(part)
        return {purpose: mixed(drawn, purpose) for purpose, drawn in parts.items()}

    def _pack(self, name: str, documents: list[str], count: int, purposes: Mapping[str, int]) -> Drawn:
        """The first `count` blocks of the documents' tokens."""
        needed = count * self._text_length
        stream = one_stream(documents, self.tokenizer, needed)
        if len(stream) < needed:
            shares = ", ".join(
                f"{purpose} {tokens:,} ({FLAGS[purpose]})" for purpose, tokens in purposes.items() if tokens
            )
            raise UsageError(
                f"too little text in {name} for {shares}: expected {needed:,} tokens (sequences of "
                f"{self.sequence_length}), found {len(stream):,}; give more text, ask for fewer tokens, or let "
                "--fit-data scale them to the text"
            )
        return self._blocks(stream, needed)


def _split(blocks: Drawn, sequences: list[int]) -> list[Drawn]:
    counts = [None] * len(sequences) if blocks.counts is None else blocks.counts.split(sequences)
    return [Drawn(*part) for part in zip(blocks.ids.split(sequences), counts, strict=True)]


def mixed(parts: Sequence[Drawn], purpose: str) -> Drawn:
    """Blocks of several sources in turn.

    Raises:
        UsageError: if there are some, and no prediction in them counts.
    """
    ids = interleave([part.ids for part in parts])
    if all(part.counts is None for part in parts):
        return Drawn(ids, None)
    counts = interleave([torch.ones_like(i, dtype=torch.bool) if c is None else c for i, c in parts])
    if len(ids) and not counts.any():
        raise UsageError(
            f"no token of {purpose} counts: expected answers of an assistant in the chats, found none; give chats with "
            "answers, or take --loss-tokens all"
        )
    return Drawn(ids, counts)


def read_corpus(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    seed: int,
    loss_tokens: LossTokens = "assistant",
) -> Corpus:
    """The corpus that a user means by `DATA`: `SOURCE` or `SOURCE=WEIGHT,SOURCE=WEIGHT`.

    A document that is there twice, in one source or in two, counts once.

    Args:
        loss_tokens: which tokens of chats count: those that the assistant wrote, or all.

    Raises:
        UsageError: if a source is unknown, unreadable or empty, or adds nothing to those before it.
    """
    sources, seen = [], set()
    for name, weight in map(name_and_weight, parts_of(data)):
        documents = tuple(dict.fromkeys(document for document in read_documents(name) if document.strip()))
        if not documents:
            raise UsageError(f"the corpus {name} is empty: expected at least one document with text; name another")
        new = tuple(document for document in documents if document not in seen)
        if not new:
            raise UsageError(f"--data: all documents of {name} are in the sources before it; name it once")
        seen.update(new)
        sources.append((name, new, weight))
    return Corpus(tuple(sources), tokenizer, sequence_length, seed, loss_tokens)


def parts_of(data: str) -> list[str]:
    """The parts of `DATA` between its commas; a file may have commas in its name.

    Raises:
        UsageError: if there is nothing between two of them.
    """
    if Path(data).expanduser().is_file():
        return [data]
    parts = [part.strip() for part in data.split(",")]
    if not all(parts):
        raise UsageError(f"--data: expected a source before and after each comma, found {data!r}; leave the comma out")
    return parts


def name_and_weight(part: str) -> tuple[str, float]:
    """`SOURCE=WEIGHT` apart; a `=` with a slash after it belongs to a path."""
    name, equals, weight = part.rpartition("=")
    if not equals or "/" in weight:
        return part, 1.0
    if not re.fullmatch(r"\d+(\.\d+)?", weight) or not float(weight):
        raise UsageError(f"--data: expected a number above 0 as the weight of {name}, found {weight!r}; mend it")
    return name, float(weight)


def short_names(sources: Sequence[str]) -> list[str]:
    """The names of sources without their directories, where they differ even so."""
    names = [Path(source).name for source in sources]
    return [name if names.count(name) == 1 else source for name, source in zip(names, sources, strict=True)]


def is_held_out(document: str) -> bool:
    """Whether a document is kept for evaluation: a tenth of all are, by their own hash or, of chats, the question's."""
    deciding = document.opening if isinstance(document, Chat) else document
    return int.from_bytes(hashlib.sha256(deciding.encode()).digest()[:4]) < HELD_OUT_SHARE * 2**32


def stream_beside(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    counts: Callable[[str], bool],
    flag: str = "--data",
) -> Stream:
    """The first tokens of a text to judge models on, at least `tokens` if it has so many, without a BOS.

    Documents that count, with an end-of-text token after each; the test and validation sets of `TESTS` as in the
    literature: all their lines as one text, blank lines between them.

    Raises:
        UsageError: if the text is unknown or unreadable, or has a weight.
    """
    name, _ = name_and_weight(text)
    if name != text:
        raise UsageError(f"{flag}: expected texts without weights, found {text!r}: each is measured by itself")
    if name in TESTS:
        ids = _first_tokens(read_documents(TESTS[name], flag), tokenizer, tokens)
        return Stream(ids, bytearray(b"\1" * len(ids)))
    return one_stream(_once(d for d in read_documents(name, flag) if d.strip() and counts(d)), tokenizer, tokens)


def _once(documents: Iterable[str]) -> Iterator[str]:
    """Each document once, as far as they are read."""
    seen: set[str] = set()
    for document in documents:
        if document not in seen:
            seen.add(document)
            yield document


def _first_tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """The first tokens of documents as one text, blank lines between them; no more is read than that takes.

    The text is cut off some way beyond them, so that its end decides none of them.
    """
    source, read = iter(documents), list[str]()
    while True:
        more = list(islice(source, max(DOCUMENTS, len(read))))
        read += more
        ids: list[int] = tokenizer("\n\n".join(read), add_special_tokens=False, verbose=False)["input_ids"]
        if not more or len(ids) >= tokens + TAIL:
            return ids[:tokens]
