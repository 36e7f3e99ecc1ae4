"""Whether a model can still write: pruned models can pass multiple choice and repeat themselves in prose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.evaluate import final_logits, greedy, hidden_states
from darwinlm.progress import track
from darwinlm.types import UsageError

NGRAM = 4


@dataclass(frozen=True)
class Writing:
    """What a model makes of prompts.

    Attributes:
        continuations: the prompts with what the model adds greedily.
        repetition: share of 4-grams of tokens in a continuation that were in it before (seq-rep-4, Welleck et al.,
            2020, arXiv 1908.04319), averaged over those that have any; None where none has.
        agreement: share of the dense model's tokens that the model would have chosen too, given what the dense model
            wrote before; None without a dense model, or with one of another vocabulary.
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
    texts, repeated, agreed, written = [], [], 0, 0
    for prompt in track(prompts, "continuations", len(prompts)):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if not ids:
            raise UsageError(f"--prompts: {prompt!r} has no tokens; give it a word, or leave it out")
        added = greedy(model, ids, new_tokens)
        texts.append(str(tokenizer.decode(ids + added, skip_special_tokens=True)))
        if len(added) >= NGRAM:
            repeated.append(repetition(added))
        if reference is not None:
            wanted = torch.tensor(greedy(reference, ids, new_tokens))
            hidden = hidden_states(model, torch.cat([torch.tensor(ids), wanted]))[len(ids) - 1 : -1]
            agreed += int((final_logits(model, hidden).argmax(-1).cpu() == wanted).sum())
            written += len(wanted)
    share = sum(repeated) / len(repeated) if repeated else None
    return Writing(tuple(texts), share, agreed / written if written else None)


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that have been there before: `1 - distinct / all`."""
    ngrams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)
