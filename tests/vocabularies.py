"""Small tokenizers of every kind that a GGUF file can hold, trained on real text."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from darwinlm.export.gguf_vocabulary import SPLITS

END = "<|endoftext|>"  # token 0
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
STEPS: dict[str, Any] = {
    "ByteLevel": lambda split: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split),
    "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
    "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
}


def byte_pair_tokenizer(split: str, size: int = tiny.VOCAB, every_byte: bool = False) -> PreTrainedTokenizerFast:
    """It splits a text into words as the families of models do.

    Args:
        split: llama.cpp's name for how.
        every_byte: can spell any text. Without, it spells ASCII, and no token ends within a character: llama.cpp's
            server leaves out tokens that do.
    """
    steps = next(steps for steps, name in SPLITS.items() if name == split)
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([STEPS[kind](argument) for kind, argument in steps])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if every_byte else [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for text in tiny.documents()[:40] if text.isascii()], trainer)
    assert tokenizer.get_vocab_size() == size
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=TEMPLATE)


def sentencepiece_tokenizer(prefix: bool = True) -> PreTrainedTokenizerFast:
    """What transformers makes of a SentencePiece model.

    Args:
        prefix: puts a space before every text, as Llama 2's does and Gemma's does not.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(
        [text for text in tiny.documents()[:40] if text.isascii()],
        trainers.BpeTrainer(vocab_size=200, show_progress=False),
    )
    learnt = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    merges = [tuple(merge) for merge in learnt["merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # type: ignore[arg-type]
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if not prefix:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=END)
