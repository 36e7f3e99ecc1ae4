"""Documents packed into sequences as a model was trained on them: an end-of-text token between two documents, and a
beginning-of-sequence token (BOS) before each sequence, where the model's tokenizer adds one to every text.

Of a chat, only what the assistant wrote counts in a loss; of any other text, all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from darwinlm.data.chat import Chat, render
from darwinlm.types import UsageError

RENDERER = 1  # raised when a chat's tokens become others
BATCH = 16  # documents that are tokenized at once


# Tokens that end a document in pre-training. An instruct model's own end token ends a turn of a chat instead.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")  # noqa: RUF001


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text, or None if it puts none there."""
    bos: Any = tokenizer.bos_token_id
    if bos is None:
        return None
    ids: list[int] = tokenizer("a")["input_ids"]
    return bos if ids[0] == bos else None


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token between two documents in pre-training, or None if the tokenizer has none.

    It is `<|endoftext|>` for Qwen-2.5-Instruct, for example, although the tokenizer's own end token is `<|im_end|>`.
    """
    eos: Any = tokenizer.eos_token_id
    if eos is not None and tokenizer.eos_token in END_OF_TEXT:
        return eos
    vocabulary: Any = tokenizer  # whose type does not know the method
    added: dict[str, int] = vocabulary.get_added_vocab()
    return next((added[token] for token in END_OF_TEXT if token in added), eos)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary and rules, which tokenizers that give the same tokens share."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(sorted(tokenizer.get_vocab().items()))
    if backend is not None:
        parts: Mapping[str, Any] = json.loads(backend.to_str())
        kept = {name: parts.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        content += json.dumps(kept, sort_keys=True)
    return hashlib.sha256(f"{content}{bos_of(tokenizer)} {end_of_text(tokenizer)}".encode()).hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's chat templates and of how chats are rendered by them."""
    content = json.dumps([RENDERER, getattr(tokenizer, "chat_template", None)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens between two documents: one, or none if the tokenizer has no such token."""
    end = end_of_text(tokenizer)
    return [] if end is None else [end]


def check_ids(ids: Int[Tensor, "*shape"], vocabulary: int) -> None:
    """Raise `UsageError` if a text has a token for which the model's embedding has no row.

    Args:
        vocabulary: rows of the embedding.
    """
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise UsageError(
            f"the tokenizer gives the token {int(ids.max()):,}: expected at most {vocabulary - 1:,}, the last row of "
            "the model's embedding; put the tokenizer of this model beside it"
        )


def text_length(length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens of text in a sequence of `length`, which begins with a BOS where the model expects one."""
    return length - (bos_of(tokenizer) is not None)


@dataclass
class Stream:
    """The tokens of documents one after another.

    Attributes:
        counts: for each token, whether a loss counts its prediction: 1 or 0.
        whole: whether all documents are in it.
    """

    ids: list[int] = field(default_factory=list)
    counts: bytearray = field(default_factory=bytearray)
    whole: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int], counts: Iterable[bool]) -> None:
        """Add tokens to its end."""
        self.ids += ids
        self.counts += bytes(counts)

    @property
    def all_count(self) -> bool:
        """Whether the prediction of every token counts."""
        return 0 not in self.counts


def one_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Stream:
    """The tokens of documents one after another, an end-of-text token after each.

    No more batches of documents are read once there are `tokens`.

    Raises:
        UsageError: as `chat.render`.
    """
    stream, source = Stream(), iter(documents)
    while len(stream) < tokens:
        these = list(islice(source, BATCH))
        for ids, counts in _with_ends(these, tokenizer):
            stream.add(ids, counts)
        if len(these) < BATCH:
            stream.whole = True
            return stream
    stream.whole = next(source, None) is None
    return stream


def _with_ends(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[bool]]]:
    """The tokens of each document with its end-of-text token, and which of them count. Sequences alone have a BOS."""
    between = separator(tokenizer)
    texts = [document for document in documents if not isinstance(document, Chat)]
    of_texts = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    for document in documents:
        if isinstance(document, Chat):
            ids, counts = render(document, tokenizer)
            first = int(ids[:1] == [bos_of(tokenizer)])
            yield ids[first:] + between, counts[first:] + [False] * len(between)
        else:
            ids = next(of_texts)
            yield ids + between, [True] * (len(ids) + len(between))


def as_sequences(
    stream: Sequence[int] | Tensor, length: int, tokenizer: PreTrainedTokenizerBase
) -> Int[Tensor, "sequences length"]:
    """The whole sequences of `length` tokens that a stream of text gives, each with its BOS; the rest is left out."""
    bos, text = bos_of(tokenizer), text_length(length, tokenizer)
    count = len(stream) // text
    body = torch.as_tensor(stream[: count * text], dtype=torch.long).view(count, text)
    return body if bos is None else torch.cat([torch.full((count, 1), bos), body], dim=1)


def as_counts(stream: Stream, length: int, tokenizer: PreTrainedTokenizerBase) -> Bool[Tensor, "sequences length"]:
    """For every token of `as_sequences(stream.ids, ...)`, whether the prediction that a model makes after it counts.

    It counts if the token that follows in the stream does, be it in the next sequence. After the stream's last token,
    it counts if that one itself does.
    """
    text = text_length(length, tokenizer)
    count = len(stream) // text
    own = torch.tensor(list(stream.counts), dtype=torch.bool)
    following = torch.cat([own[1:], own[-1:]])[: count * text].view(count, text)
    if text == length:
        return following
    return torch.cat([own[: count * text].view(count, text)[:, :1], following], dim=1)


def cut(
    sequences: Shaped[Tensor, "sequences length"], ends: Iterable[int], bos: int | None
) -> list[Shaped[Tensor, "1 piece_length"]]:
    """Cut sequences, or what is known of their tokens, apart, and after each number of tokens in `ends`: so many are
    in the pieces before that cut.

    A piece that begins within a sequence begins with a BOS, in the place of its first token, where the model expects
    one.
    """
    length = sequences.shape[1]
    cuts = sorted({*range(0, sequences.numel() + 1, length), *(end for end in ends if end <= sequences.numel())})
    pieces = []
    for start, end in pairwise(cuts):
        row, first = divmod(start, length)
        piece = sequences[row : row + 1, first : first + end - start].clone()
        if first and bos is not None:
            piece[:, 0] = bos
        pieces.append(piece)
    return pieces


def scramble(blocks: Int[Tensor, "sequences length"], share: float) -> Int[Tensor, "sequences length"]:
    """The blocks, with this share of each, at its end, in random order; the same order every time.

    Such an end has the text's words but none of its form: what a model does there tells how it fares on other text. The
    first token of a block, which may be a BOS, stays where it is.
    """
    rng, length = torch.Generator().manual_seed(0), blocks.shape[1]
    scrambled = blocks.clone()
    for block in scrambled:
        end = block[max(1, length - round(share * length)) :]
        end.copy_(end[torch.randperm(len(end), generator=rng)])
    return scrambled


def interleave(parts: list[Tensor]) -> Tensor:
    """Blocks of several sources in turn, evenly spread, so that every prefix is close to the mixture."""
    positions = torch.cat([(torch.arange(len(part)) + 0.5) / max(len(part), 1) for part in parts])
    return torch.cat(parts)[positions.argsort(stable=True)]
