"""Training tokens at scale: documents are streamed, filtered, tokenised and packed once, and kept for later runs.

A source is split into lanes, and a lane into parts. Processes fill different lanes at the same time. A part is written
whole or not at all, and its record says where in the source the next part begins, so filling can resume anywhere. Which
sequences are drawn depends only on the source, the filter and the number of sequences; the seed determines their order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from darwinlm.config.training import StreamConfig
from darwinlm.data.corpus import is_held_out, name_and_weight, parts_of, short_names
from darwinlm.data.documents import pieces_of
from darwinlm.data.mapped import mapped
from darwinlm.data.packing import (
    as_counts,
    as_sequences,
    check_ids,
    one_stream,
    template_fingerprint,
    text_length,
    tokenizer_fingerprint,
)
from darwinlm.data.sources import check_distinct, identity_of, stream_of, texts_of
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_record, sweep, write_record, write_tensors
from darwinlm.runtime.progress import say
from darwinlm.runtime.understood import understood
from darwinlm.types import DarwinError, LossTokens, UsageError

LANES = 64  # the most that a source has, whatever the number of processes


FIRST_PART, LARGEST_PART = 64, 8192  # in documents; each part of a lane is twice as large as the one before it


PARSER = 3  # raised when the documents or their positions in a source become others
MANIFEST = "tokens.json"


Place = tuple[int, int, int]  # where a sequence is: the lane, the part of the lane, the row of the part


@dataclass(frozen=True)
class TokenStore:
    """The packed sequences of one source, on disk.

    Attributes:
        path: the directory of the store, whose name contains a hash of what the sequences are made from.
        source: the source as the user named it.
        tokenizer: the tokenizer of the model that will read the sequences.
        config: the filter and the sequence length.
        held_out: whether the store holds the documents that are kept for evaluation; if not, it holds all others.
    """

    path: Path
    source: str
    tokenizer: PreTrainedTokenizerBase
    config: StreamConfig
    held_out: bool

    @classmethod
    def open(
        cls, cache: Path, source: str, tokenizer: PreTrainedTokenizerBase, config: StreamConfig, held_out: bool = False
    ) -> TokenStore:
        """The store of these documents in a cache directory, with the parts that earlier runs have written."""
        provenance = {
            "source": identity_of(source),
            "parser": PARSER,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template": template_fingerprint(tokenizer),
            "filter": {"column": config.score_column, "least": config.min_score, "held_out": held_out},
            "sequence_length": config.sequence_length,
        }
        key = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:16]
        store = cls(cache / f"{'held-out' if held_out else 'tokens'}-{key}", source, tokenizer, config, held_out)
        manifest = store.path / MANIFEST
        if parallel.first() and manifest.exists():
            read_record(manifest)  # refuses one of another format version
        elif parallel.first():
            write_record(manifest, {}, provenance)
        parallel.wait_for_all()
        return store

    def fill(self, sequences: int) -> list[Place]:
        """Fill the store until it has at least `sequences`, and return the places of the first ones.

        All processes call this together, and each fills its own lanes. The places depend neither on the number of
        processes nor on the sequences that the store had before, and a longer list of places begins with a shorter one.

        Raises:
            UsageError: if the source has too little text or cannot be read.
            PeerLostError: if another process dies.
        """
        with parallel.shared_directory(self.path, lambda: sweep(self.path)):
            return self._fill(sequences)

    def _fill(self, sequences: int) -> list[Place]:
        lanes = range(min(self._documents.num_shards, LANES))
        quota, counts = 0, self._counts(lanes)
        parallel.wait_for_all()  # every process has looked before the first one writes
        while (missing := sequences - sum(min(counts[lane], quota) for lane in lanes)) > 0:
            live = [lane for lane in lanes if counts[lane] > quota or not self._exhausted(lane)]
            if not live:
                length = self.config.sequence_length
                raise UsageError(
                    f"too little text in {self.source}: expected {sequences * length:,} tokens (sequences "
                    f"of {length}), found {sum(counts.values()) * length:,} {self._kept_share}; give more text or "
                    f"{'lower --training.evaluation-tokens' if self.held_out else 'ask for fewer tokens'}"
                )
            quota += -(-missing // len(live))
            for lane in live:
                if lane % parallel.processes() == parallel.rank():
                    self._extend(lane, quota)
            parallel.wait_for_all()
            counts = self._counts(lanes)
            parallel.wait_for_all()
        # Places are taken from lanes in turn, so that a longer list only adds to a shorter one.
        rounds = zip_longest(*(islice(self._places(lane), quota) for lane in lanes))
        return list(islice((place for turn in rounds for place in turn if place is not None), sequences))

    def _counts(self, lanes: Iterable[int]) -> dict[int, int]:
        """Return how many sequences each lane has so far."""
        return {lane: sum(part["sequences"] for part in self._parts(lane)) for lane in lanes}

    def _places(self, lane: int) -> Iterator[Place]:
        for number, part in enumerate(self._parts(lane)):
            yield from ((lane, number, row) for row in range(part["sequences"]))

    @property
    def _kept_share(self) -> str:
        """The part of the source that the store takes, for messages."""
        share = "among held-out documents" if self.held_out else "beside the tenth that is held out"
        column, least = self.config.score_column, self.config.min_score
        return share if column is None else f"{share} where {column} is at least {least:g}"

    def read(self, lane: int, part: int, row: int) -> Int[Tensor, " length"]:
        """Read one sequence through a memory map."""
        file = self._file(lane, part)
        return mapped(file, delete=file.parent).get_slice("tokens")[row].long()

    def counts(self, lane: int, part: int, row: int) -> Bool[Tensor, " length"]:
        """For every token of a sequence, whether the prediction after it counts: those of chats' answers, all of text.

        Within a part, it counts if the token that follows does, be it in the next sequence.
        """
        if not self.has_chats(lane, part):
            return torch.ones(self.config.sequence_length, dtype=torch.bool)
        file = self._file(lane, part)
        return mapped(file, delete=file.parent).get_slice("counts")[row]

    def has_chats(self, lane: int, part: int) -> bool:
        """Whether there is something in a part that does not count."""
        return self._record(self._file(lane, part).with_suffix(".json"))["chats"]

    def _extend(self, lane: int, sequences: int) -> None:
        """Add parts to a lane until it has `sequences` sequences or its documents are exhausted."""
        parts = self._parts(lane)
        if parts and not parts[-1]["whole"] and sum(part["sequences"] for part in parts) < sequences:
            parts.pop()  # an earlier run needed no more of it
        done = sum(part["sequences"] for part in parts)
        while done < sequences and not (parts and parts[-1]["end"]):
            start = parts[-1]["next"] if parts else None
            tensors, record = self._make_part(lane, start, len(parts), sequences - done)
            file = self._file(lane, len(parts))
            provenance = self._provenance(file)
            write_tensors(file, tensors, provenance)
            write_record(file.with_suffix(".json"), record, provenance)
            parts.append(record)
            done += record["sequences"]
            say(f"tokens: {self.source}, part {len(parts)} of lane {lane}, {done:,} sequences in it")

    def _make_part(self, lane: int, start: Any, number: int, most: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tokens of a lane's part, at most `most` sequences, and the record to keep beside them.

        Beside `tokens` there are `counts` if not every prediction counts, both `[sequences, length]`.

        Args:
            start: the state of the lane's documents at which the part begins; None for the first part.
            number: the number of the part within its lane.
        """
        documents = self._documents.shard(min(self._documents.num_shards, LANES), lane)
        if start is not None:
            documents.load_state_dict(start)
        size, before = min(FIRST_PART << number, LARGEST_PART), documents.state_dict()
        with understood(f"no text in {self.source} that can be read", "check --data"):
            kept = list(islice(self._kept_texts(documents), size))
        state = documents.state_dict()
        if kept and state == before:  # as with datasets 5.0.0: every part would be the first one again
            raise DarwinError(
                f"the position in {self.source} did not move on after {len(kept)} documents: expected that of datasets "
                f"5.2 or newer, found version {version('datasets')}; upgrade it"
            )
        # Neighbouring documents are often alike, so they are put in the order of their hashes.
        kept.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        tensors, whole = _pack(kept, self.tokenizer, self.config.sequence_length, most)
        end, chats = whole and len(kept) < size, "counts" in tensors
        return tensors, {"sequences": len(tensors["tokens"]), "whole": whole, "end": end, "next": state, "chats": chats}

    def _kept_texts(self, documents: IterableDataset) -> Iterator[str]:
        for record, whole in texts_of(self.source, documents):
            for text in pieces_of(whole):
                if text.strip() and self._scored_enough(record) and is_held_out(text) == self.held_out:
                    yield text

    def _scored_enough(self, record: Mapping[str, Any]) -> bool:
        column, least = self.config.score_column, self.config.min_score
        if column is None:
            return True
        if column not in record:
            raise UsageError(
                f"--stream.score-column: {self.source} has no column {column}, it has {', '.join(record)}; name one of "
                "these"
            )
        score = record[column]
        if score is not None and not isinstance(score, int | float):
            raise UsageError(
                f"--stream.score-column: expected numbers in {column} of {self.source}, found {score!r}; name another"
            )
        return score is not None and score >= least  # which NaN is not

    @cached_property
    def _documents(self) -> IterableDataset:
        return stream_of(self.source)

    def _exhausted(self, lane: int) -> bool:
        parts = self._parts(lane)
        return bool(parts) and parts[-1]["end"]

    def _parts(self, lane: int) -> list[dict[str, Any]]:
        return [self._record(file) for file in self._files(lane)]

    def _record(self, file: Path) -> dict[str, Any]:
        record = read_record(file, "sequences", "whole", "end", "next", "chats")
        if record["provenance"] != self._provenance(file):
            raise DarwinError(
                f"{file} is of another part: expected {self._provenance(file)}, found {record['provenance']}; delete "
                f"{file.parent} and run the command again"
            )
        return record

    def _provenance(self, file: Path) -> dict[str, str]:
        """What a file of the store says that it is part of."""
        return {"store": self.path.name, "part": f"{file.parent.name}/{file.stem}"}

    def _files(self, lane: int) -> list[Path]:
        """Return the files with the records of a lane's finished parts."""
        return sorted((self.path / f"lane-{lane:02d}").glob("*.json"))

    def _file(self, lane: int, number: int) -> Path:
        return self.path / f"lane-{lane:02d}" / f"{number:05d}.safetensors"


@dataclass(frozen=True)
class Sequences(torch.utils.data.Dataset):
    """Sequences of one or several stores, in the order in which a model reads them.

    Attributes:
        places: the store, lane, part and row of each sequence.
        loss_tokens: which tokens of chats count.
    """

    stores: tuple[TokenStore, ...]
    places: Int[Tensor, "sequences 4"]
    loss_tokens: LossTokens = "assistant"

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sequence: `input_ids`, and where not every prediction of every sequence counts, `counts` for each token."""
        number, *place = self.places[index].tolist()
        store = self.stores[number]
        ids = {"input_ids": store.read(*place)}
        return ids | {"counts": store.counts(*place)} if self.has_chats else ids

    @property
    def sources(self) -> tuple[str, ...]:
        """The short name of each store's source."""
        return tuple(short_names([store.source for store in self.stores]))

    def expect_counted(self, flag: str) -> None:
        """Raise `UsageError` if no prediction in them counts; a flag says how many there are."""
        if self.has_chats and not any(self[index]["counts"][:-1].any() for index in range(len(self))):
            raise UsageError(
                f"{flag}: expected answers of an assistant among {len(self):,} sequences, found none; give chats with "
                "answers, more tokens, or --loss-tokens all"
            )

    @cached_property
    def has_chats(self) -> bool:
        """Whether there are predictions that do not count."""
        parts = torch.unique(self.places[:, :3], dim=0).tolist()
        return self.loss_tokens == "assistant" and any(self.stores[store].has_chats(*part) for store, *part in parts)

    def check_ids(self, vocabulary: int) -> None:
        """Raise `UsageError` if a sequence has a token beyond the rows of a model's embedding.

        All of them are read only if the tokenizer has such a token.
        """
        if any(max(store.tokenizer.get_vocab().values()) >= vocabulary for store in self.stores):
            for index in range(len(self)):
                check_ids(self[index]["input_ids"], vocabulary)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the order of the sequences and of what they are made from."""
        names = " ".join([*(store.path.name for store in self.stores), *(["answers"] if self.has_chats else [])])
        return hashlib.sha256(names.encode() + self.places.numpy().tobytes()).hexdigest()


def draw_sequences(
    data: str,
    sequences: int,
    tokenizer: PreTrainedTokenizerBase,
    config: StreamConfig,
    cache: Path,
    seed: int,
    skip: int = 0,
    loss_tokens: LossTokens = "assistant",
) -> Sequences:
    """Draw training sequences from `SOURCE` or a mixture `SOURCE=WEIGHT,SOURCE=WEIGHT`, and shuffle them by `seed`.

    Args:
        data: the source or the mixture.
        sequences: how many to draw.
        skip: how many sequences before these to leave out, because earlier stages of a recipe use them.
        loss_tokens: which tokens of chats count.

    Raises:
        UsageError: if a source cannot be read or has too little text.
    """
    drawn = _draw(data, skip + sequences, tokenizer, config, cache, held_out=False)
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
    return Sequences(drawn.stores, drawn.places[skip:][order], loss_tokens)


def draw_held_out(
    data: str,
    sequences: int,
    tokenizer: PreTrainedTokenizerBase,
    config: StreamConfig,
    cache: Path,
    loss_tokens: LossTokens = "assistant",
) -> Sequences:
    """Draw sequences of documents that are kept for evaluation. Raises as `draw_sequences` does."""
    drawn = _draw(data, sequences, tokenizer, config, cache, held_out=True)
    return Sequences(drawn.stores, drawn.places, loss_tokens)


def _draw(
    data: str, sequences: int, tokenizer: PreTrainedTokenizerBase, config: StreamConfig, cache: Path, held_out: bool
) -> Sequences:
    """Draw the first sequences of a mixture, from its sources in turn according to their weights."""
    sources = [name_and_weight(part) for part in parts_of(data)]
    check_distinct([source for source, _ in sources])
    # Sequence k of a source has the position (k + 1/2) / weight, so that any prefix has about the right weights.
    positions = [(torch.arange(sequences, dtype=torch.float64) + 0.5) / weight for _, weight in sources]
    first = torch.cat(positions).argsort(stable=True)[:sequences] // sequences
    stores, places = [], torch.empty(sequences, 4, dtype=torch.int32)
    for number, (source, _) in enumerate(sources):
        store = TokenStore.open(cache, source, tokenizer, config, held_out)
        stores.append(store)
        of_source = first == number
        in_store = torch.tensor(store.fill(int(of_source.sum())), dtype=torch.int32).view(-1, 3)
        places[of_source] = nn.functional.pad(in_store, (1, 0), value=number)
    return Sequences(tuple(stores), places)


def _pack(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, most: int
) -> tuple[dict[str, Tensor], bool]:
    """At most `most` sequences of the documents' tokens, as `_make_part` returns them, and whether these are all."""
    stream = one_stream(documents, tokenizer, most * text_length(length, tokenizer))
    sequences = as_sequences(stream.ids, length, tokenizer).to(torch.int32)
    tensors = {"tokens": sequences[:most]}
    if not stream.all_count:
        tensors["counts"] = as_counts(stream, length, tokenizer)[:most]
    return tensors, stream.whole and len(sequences) <= most
