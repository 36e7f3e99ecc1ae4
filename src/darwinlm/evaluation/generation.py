"""Greedy continuations of prompts. They show a loss that multiple choice does not: prose that repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.evaluation.quality import evaluation_mode
from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.runtime.progress import track
from darwinlm.types import UsageError

NGRAM = 4


@dataclass(frozen=True)
class Writing:
    """A model's continuations of prompts, and figures about them.

    Attributes:
        continuations: the prompts, each followed by the model's greedy continuation.
        repetition: the share of 4-grams of tokens in a continuation that occurred in it before (seq-rep-4, Welleck et
            al., 2020, arXiv 1908.04319), averaged over the continuations that have 4-grams; None if none has.
        agreement: the share of the dense model's tokens that the model would have chosen too, given the dense model's
            tokens before; None without a dense model, or with one of another vocabulary.
    """

    continuations: tuple[str, ...]
    repetition: float | None
    agreement: float | None


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    reference: PreTrainedModel | None = None,
) -> Writing:
    """Continue each prompt by at most `new_tokens` tokens, the likeliest at every step.

    Args:
        reference: the dense model, of the same vocabulary.

    Raises:
        UsageError: if a prompt has no tokens.
    """
    texts, repeated, agreed, written, logits = [], [], 0, 0, Logits.of(model)
    for prompt in track(prompts, "continuations", len(prompts)):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if not ids:
            raise UsageError(f"--prompts: {prompt!r} has no tokens; give it a word, or leave it out")
        added = greedy(model, ids, new_tokens)
        texts.append(str(tokenizer.decode(ids + added, skip_special_tokens=True)))
        if len(added) >= NGRAM:
            repeated.append(repetition(added))
        if reference is not None:
            expected = torch.tensor(greedy(reference, ids, new_tokens))
            hidden = hidden_states(model, torch.cat([torch.tensor(ids), expected])[None])[0, len(ids) - 1 : -1]
            agreed += int((logits(hidden).argmax(-1).cpu() == expected).sum())
            written += len(expected)
    share = sum(repeated) / len(repeated) if repeated else None
    return Writing(tuple(texts), share, agreed / written if written else None)


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before in the tokens: `1 - distinct / all`."""
    ngrams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> tuple[str, ...]:
    """Return each prompt followed by at most `new_tokens` tokens, the likeliest at every step.

    Decoding is plainly greedy: of a checkpoint's generation config, the end-of-text tokens count, but settings for
    sampling or repetition penalties do not. Prompt and continuation are decoded together, because a tokenizer may drop
    the space between two texts that it decodes separately.

    Raises:
        UsageError: if a prompt has no tokens.
    """
    result: list[str] = []
    with evaluation_mode([model]):
        for prompt in prompts:
            ids: list[int] = tokenizer(prompt)["input_ids"]
            if not ids:
                raise UsageError("evaluation.prompts holds an empty prompt; give it a word, or leave it out")
            result.append(str(tokenizer.decode(ids + greedy(model, ids, new_tokens), skip_special_tokens=True)))
    return tuple(result)


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Return at most `new_tokens` tokens after a prompt, the likeliest at every step, up to an end-of-text token."""
    ends = end_tokens(model)
    result: list[int] = []
    token, cache = torch.tensor([prompt], device=model.device), None
    while len(result) < new_tokens:
        token, cache = next_token(model, token, cache)
        result.append(int(token.item()))
        if result[-1] in ends:
            break
    return result


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens that end a text, of the generation config or else of the config."""
    ends = (model.generation_config or model.config).eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def next_token(
    model: PreTrainedModel, token_ids: Int[Tensor, "batch length"], cache: Cache | None = None
) -> tuple[Int[Tensor, "batch 1"], Cache]:
    """Return the likeliest token after each sequence, and the cache, which now holds the sequences."""
    output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(dim=-1), output.past_key_values
