"""The tokenizer of a GGUF file, with which llama.cpp must split texts as the model's own tokenizer does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from darwinlm.data.packing import bos_of
from darwinlm.types import UsageError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names for the ways to split a text before byte pairs are merged, by the steps in tokenizer.json.
SPLITS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", WORDS + r"|\p{N}{1,3}" + REST), ("ByteLevel", False)): "llama-bpe",
    (("Split", WORDS + r"|\p{N}" + REST), ("ByteLevel", False)): "qwen2",
    (("Split", TEKKEN), ("ByteLevel", False)): "tekken",
}
LLAMA_3_WITH_MERGES = "smaug-bpe"  # splits like llama-bpe, but does not look up whole words before merging
SPACE = "▁"


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Write a tokenizer to a GGUF file: tokens, merges or scores, special tokens and the chat template.

    Args:
        size: rows of the model's embedding; those without a token get a placeholder.

    Raises:
        UsageError: if llama.cpp has no equivalent tokenizer, or if the tokenizer has more than `size` tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("a tokenizer with a tokenizer.json", type(tokenizer).__name__)
    definition: dict[str, Any] = json.loads(backend.to_str())
    if definition["model"]["type"] != "BPE":
        raise _refused("byte-pair or SentencePiece tokens", f"a {definition['model']['type']} tokenizer")
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= size:
        raise UsageError(
            f"expected at most {size} tokens, one a row of the embedding, found {max(vocabulary.values()) + 1}; "
            "put the model's own tokenizer beside it"
        )
    sentencepiece = definition["model"]["byte_fallback"]
    if sentencepiece:
        _add_sentencepiece(writer, definition, vocabulary, size)
    else:
        _add_byte_pairs(writer, definition)
    _add_tokens(writer, definition, vocabulary, size, sentencepiece)
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    bare = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos_of(tokenizer) is not None)
    writer.add_add_eos_token(bare[-1] == tokenizer.eos_token_id)
    template: Any = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _add_byte_pairs(writer: gguf.GGUFWriter, definition: Mapping[str, Any]) -> None:
    steps = _steps(definition["pre_tokenizer"])
    split = SPLITS.get(tuple(_summary(step) for step in steps))
    if split is None or any(step.get("add_prefix_space") for step in steps):
        raise _refused(f"words split as in {', '.join(SPLITS.values())}", json.dumps(definition["pre_tokenizer"])[:200])
    normalizers = {step["type"] for step in _steps(definition["normalizer"])}
    if normalizers - {"NFC"}:  # llama.cpp leaves NFC out, which changes almost no text
        raise _refused("text that is not normalised, or to NFC", ", ".join(sorted(normalizers)))
    if split == "llama-bpe" and not definition["model"]["ignore_merges"]:
        split = LLAMA_3_WITH_MERGES
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_merges([" ".join(pair) for pair in _merges(definition)])


def _add_sentencepiece(
    writer: gguf.GGUFWriter, definition: Mapping[str, Any], vocabulary: Mapping[str, int], size: int
) -> None:
    """Write SentencePiece scores: it merges the pair of highest score first, so earlier merges get higher scores."""
    normalizers, splits = _steps(definition["normalizer"]), _steps(definition["pre_tokenizer"])
    known = {"Prepend", "Replace", "Metaspace"}
    if any(step["type"] == "Replace" and step["pattern"].get("String") == " " for step in normalizers):
        splits = [step for step in splits if step.get("pattern") != {"String": " "}]  # of which there are none then
    unknown = {step["type"] for step in [*normalizers, *splits]} - known
    if unknown:
        raise _refused("SentencePiece tokens with spaces alone replaced", ", ".join(sorted(unknown)))
    prefix = any(step["type"] == "Prepend" for step in normalizers)
    prefix |= any(step.get("prepend_scheme") in ("always", "first") for step in splits)
    scores = [0.0] * size
    for rank, pair in reversed(list(enumerate(_merges(definition)))):
        scores[vocabulary["".join(pair)]] = -float(rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_add_space_prefix(prefix)


def _add_tokens(
    writer: gguf.GGUFWriter,
    definition: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    size: int,
    sentencepiece: bool,
) -> None:
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
        if sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = gguf.TokenType.BYTE
    for added in definition["added_tokens"]:
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        if sentencepiece and not added["special"]:
            tokens[added["id"]] = added["content"].replace(SPACE, " ")
    if sentencepiece and definition["model"]["unk_token"] is not None:
        kinds[vocabulary[definition["model"]["unk_token"]]] = gguf.TokenType.UNKNOWN
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)


def _steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the single steps of a pre-tokenizer or normalizer, in order; sequences of steps may be nested."""
    if part is None:
        return []
    nested = part.get("pretokenizers") or part.get("normalizers")
    return [step for inner in nested for step in _steps(inner)] if nested else [dict(part)]


def _summary(step: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = step["type"]
    if kind == "Split":
        plain = step["behavior"] == "Isolated" and not step["invert"]
        return (kind, step["pattern"].get("Regex")) if plain else (kind, step["behavior"], step["invert"])
    return (kind, step.get({"Digits": "individual_digits", "ByteLevel": "use_regex"}.get(kind, "")))


def _merges(definition: Mapping[str, Any]) -> list[list[str]]:
    merges = definition["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _refused(expected: str, found: str) -> UsageError:
    return UsageError(
        f"llama.cpp cannot tokenise as this model does: expected {expected}, found {found}; "
        "use the Hugging Face directory"
    )
