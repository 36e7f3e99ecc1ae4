"""Text that the dense model writes itself: answers to the prompts of a data set, or texts that begin with nothing.

A model that is calibrated and taught on what it writes is judged where it will be used. Every batch of texts has a
seed and a file of its own, so that writing can stop and resume anywhere and ends with the same texts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.config.own import OwnConfig
from darwinlm.data.chat import Chat, prompt_text
from darwinlm.data.corpus import HELD_OUT_SHARE, name_and_weight, parts_of
from darwinlm.data.documents import OWN, is_own, read_documents
from darwinlm.data.packing import bos_of, end_of_text, template_fingerprint
from darwinlm.data.sources import identity_of
from darwinlm.evaluation.answering import continued
from darwinlm.evaluation.generation import end_tokens
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_json_lines, sweep, write_record, write_text
from darwinlm.runtime.progress import say, track
from darwinlm.types import UsageError

BEGINNING = 32  # tokens of a text, no chat, that the model goes on from
SPARE = 1.25  # of the tokens that stages take: what is held out is a tenth only on average
PASSES = 16  # the most answers to one prompt
UNBOUNDED = 1 << 20  # positions of a model that names no limit
DIRECTORY = "own"


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from: token ids, and the chat that they are of, if any."""

    ids: tuple[int, ...]
    chat: Chat | None


def writes_own_text(data: str) -> bool:
    """Whether a part of `DATA` is written by the dense model."""
    return any(is_own(name) for name, _ in map(name_and_weight, parts_of(data)))


def with_own_text(
    data: str, checkpoint: Checkpoint, tokens: tuple[int, int], config: OwnConfig, out: Path, seed: int,
    device: torch.device, dtype: torch.dtype,
) -> str:  # fmt: skip
    """`DATA` with the files of what the dense model has written in the place of `self` and `self:SOURCE`.

    Several processes write together, each some of the batches.

    Args:
        tokens: that all sources together give to the stages, and to what is held out.
        out: the directory of the texts, in a directory `own`.

    Raises:
        UsageError: if a source of prompts cannot be read or has none, or a file of texts cannot be named in `DATA`.
    """
    parts = [name_and_weight(part) for part in parts_of(data)]
    total, named, loaded = sum(weight for _, weight in parts), list[str](), list[PreTrainedModel]()
    for name, weight in parts:
        if is_own(name):
            share = weight / total
            needed = max(tokens[0] / (1 - HELD_OUT_SHARE), tokens[1] / HELD_OUT_SHARE) * share * SPARE
            writer = Writer(checkpoint, name, config.tokens or round(needed), config, out / DIRECTORY, seed)
            if "," in str(writer.file):
                raise UsageError(f"--out: expected no comma in it where --data names {name}, found {out}; choose one")
            if parallel.from_first(lambda file=writer.file: "found" if file.exists() else "") != "found":
                loaded = loaded or [checkpoint.load(dtype, device)]
                writer.write(loaded[0])
            name = str(writer.file)
        named.append(f"{name}={weight!r}")
    return ",".join(named)


@dataclass(frozen=True)
class Writer:
    """Writes one source: `self`, or `self:SOURCE` for answers to the prompts of another.

    Attributes:
        tokens: of all texts together, prompts included.
        directory: where the texts are kept.
    """

    checkpoint: Checkpoint
    source: str
    tokens: int
    config: OwnConfig
    directory: Path
    seed: int

    @property
    def provenance(self) -> dict[str, Any]:
        """All that determines the texts."""
        asked = self.source.removeprefix(OWN).removeprefix(":")
        settings = asdict(self.config) | {"tokens": self.tokens, "seed": self.seed}
        return {
            "model": self.checkpoint.fingerprint,
            "prompts": identity_of(asked) if asked else None,
            "template": template_fingerprint(self.checkpoint.tokenizer),
            "settings": settings,
        }

    @property
    def file(self) -> Path:
        """The texts, a line of JSON each, as any source has them."""
        key = hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode()).hexdigest()[:8]
        stem = Path(self.source.partition(":")[2] or "bos").stem.replace(":", "-")
        return self.directory / f"self-{stem}-{key}.jsonl"

    def write(self, model: PreTrainedModel) -> None:
        """Write all texts; batches that an earlier call has written are not written again.

        Of several processes, each writes every so many-th batch.

        Raises:
            UsageError: if there are no prompts.
        """
        done = self.file.with_suffix(".parts")
        if parallel.first():
            done.mkdir(parents=True, exist_ok=True)
            sweep(self.directory)
        parallel.wait_for_all()
        written, texts = 0, list[dict[str, Any]]()
        of_batch = self.config.batch_size * self.config.answer_tokens  # at most
        steps = -(-self.tokens // (parallel.processes() * of_batch))  # at least
        prompts = self._prompts()
        batches = enumerate(iter(lambda: list(islice(prompts, self.config.batch_size)), []))
        rounds = iter(lambda: list(islice(batches, parallel.processes())), [])
        for at_once in track(rounds, f"{self.source}: texts", steps):
            parts = [done / f"{number:05d}.jsonl" for number, _ in at_once]
            for part, (number, batch) in zip(parts, at_once, strict=True):
                if parallel.is_mine(number) and not part.exists():
                    lines = self._batch(model, batch, number)
                    write_text(part, "".join(json.dumps(line) + "\n" for line in lines))
            parallel.wait_for_all()
            for part in parts:
                if written < self.tokens:
                    lines = read_json_lines(part)
                    texts += lines
                    written += sum(line["tokens"] for line in lines)
            if written >= self.tokens:
                break
        parallel.wait_for_all()  # every process has read the batches before the first one deletes them
        if parallel.first():
            say(f"{self.source}: {len(texts):,} texts of {written:,} tokens, in {self.file}")
            write_record(self.file.with_suffix(".json"), {"texts": len(texts), "written": written}, self.provenance)
            write_text(self.file, "".join(line["document"] + "\n" for line in texts))
            shutil.rmtree(done)
        parallel.wait_for_all()

    def _prompts(self) -> Iterator[Prompt]:
        """All prompts, and where answers are sampled, again and again."""
        tokenizer, asked = self.checkpoint.tokenizer, self.source.removeprefix(OWN).removeprefix(":")
        if not asked:
            begin = bos_of(tokenizer) or end_of_text(tokenizer)
            if begin is None:
                raise UsageError("--data self: expected a token that begins texts, found none; name prompts, self:FILE")
            yield from (Prompt((begin,), None) for _ in (range(1) if not self.config.temperature else count()))
            return
        positions = getattr(self.checkpoint.config, "max_position_embeddings", None) or UNBOUNDED
        room = positions - self.config.answer_tokens
        prompts = {prompt for text in read_documents(asked) if text.strip() and (prompt := _prompt(text, tokenizer))}
        fitting = sorted((each for each in prompts if len(each.ids) <= room), key=lambda each: _order(each, self.seed))
        if not fitting:
            raise UsageError(
                f"--data {self.source}: expected prompts of at most {room:,} tokens, which leave room for "
                f"{self.config.answer_tokens:,} (--own.answer-tokens), found none in {asked}; give others"
            )
        for _ in range(PASSES if self.config.temperature else 1):
            yield from fitting

    @torch.inference_mode()
    def _batch(self, model: PreTrainedModel, prompts: Sequence[Prompt], number: int) -> list[dict[str, Any]]:
        """The texts of a batch of prompts: `document`, a line of JSON, and `tokens`. Empty answers are left out."""
        torch.manual_seed(self.seed * 1_000_003 + number)
        tokenizer, lines = self.checkpoint.tokenizer, []
        for prompt, answer in zip(prompts, self._generate(model, prompts), strict=True):
            document = _document(prompt, answer, tokenizer)
            if document is not None:
                lines.append({"document": document, "tokens": len(prompt.ids) + len(answer)})
        return lines

    def _generate(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> list[list[int]]:
        """What a model writes after each prompt, with the token that ends it, if there is one.

        The checkpoint's own settings, such as a penalty for repetition, would make it another distribution.
        """
        tokenizer = self.checkpoint.tokenizer
        ends = end_tokens(model) | {
            token for token in (tokenizer.eos_token_id, end_of_text(tokenizer)) if isinstance(token, int)
        }
        sampling = {"do_sample": True, "temperature": self.config.temperature, "top_p": self.config.top_p, "top_k": 0}
        how = sampling if self.config.temperature else {}
        return continued(model, [prompt.ids for prompt in prompts], ends, self.config.answer_tokens, **how)


def _prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    """What a model goes on from: the turns of a chat before its first answer, or the beginning of a text."""
    if isinstance(text, Chat):
        ids = tokenizer(prompt_text(text.opening, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
        return Prompt(tuple(ids), text.opening)
    bos = bos_of(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:BEGINNING]
    return Prompt((*([] if bos is None else [bos]), *ids), None)


def _order(prompt: Prompt, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {prompt.ids}".encode()).digest()


def _document(prompt: Prompt, answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A prompt with its answer as a line of JSON, as `read_documents` takes it; None if the answer has no text."""
    if prompt.chat is None:
        text = str(tokenizer.decode([*prompt.ids, *answer], skip_special_tokens=True))
        return json.dumps({"text": text}) if text.strip() else None
    content = str(tokenizer.decode(list(answer), skip_special_tokens=True)).strip()
    turns = [*prompt.chat.messages, {"role": "assistant", "content": content}]
    return json.dumps(json.loads(Chat.of(turns, prompt.chat.tools))) if content else None
