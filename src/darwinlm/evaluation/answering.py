"""Whether a model's answers stop: their length, the share that is cut off at the limit, and what they repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.evaluation.generation import NGRAM, end_tokens, repetition
from darwinlm.evaluation.quality import evaluation_mode
from darwinlm.runtime.progress import track


@dataclass(frozen=True)
class Answers:
    """A model's greedy answers to prompts, in the order of the prompts.

    Attributes:
        limit: the most tokens that an answer may have.
        lengths: their tokens, without the one that ends an answer.
        cut_off: 1 for an answer that had not ended at the limit, else 0.
        repetitions: the share of 4-grams of tokens that occurred before in the answer; 0 where it has none.
    """

    limit: int
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    cut_off: tuple[int, ...]
    repetitions: tuple[float, ...]

    @property
    def median_length(self) -> float:
        """The median of the answers' tokens."""
        return median(self.lengths)

    @property
    def share_cut_off(self) -> float:
        """The share of answers that had not ended at the limit."""
        return fmean(self.cut_off)

    @property
    def repetition(self) -> float:
        """The mean share of repeated 4-grams."""
        return fmean(self.repetitions)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    limit: int,
    batch_size: int,
) -> Answers:
    """Let a model answer prompts greedily, several at a time, those of like length together.

    What its generation config says of ends counts, as does the tokenizer's end of text; samplers and penalties do not.

    Args:
        prompts: token ids.
        limit: the most tokens of an answer.
    """
    own = tokenizer.eos_token_id
    ends = end_tokens(model) | ({own} if isinstance(own, int) else set())
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    starts = range(0, len(prompts), batch_size)
    written: dict[int, list[int]] = {}
    with evaluation_mode([model]):
        for start in track(starts, "answers", len(starts)):
            chosen = by_length[start : start + batch_size]
            written |= zip(chosen, continued(model, [prompts[index] for index in chosen], ends, limit), strict=True)
    answers = [[token for token in written[index] if token not in ends] for index in range(len(prompts))]
    return Answers(
        limit,
        tuple(str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers),
        tuple(map(len, answers)),
        tuple(int(len(ids) == limit) for ids in answers),
        tuple(repetition(ids) if len(ids) >= NGRAM else 0.0 for ids in answers),
    )


def continued(
    model: Any, prompts: Sequence[Sequence[int]], ends: set[int], limit: int, **sampling: Any
) -> list[list[int]]:
    """What a model writes after prompts, each up to a token that ends it, that one included, or up to the limit.

    Shorter prompts have padding before them, which nothing attends to. The model's generation config does not count.

    Args:
        prompts: token ids.
        ends: the tokens that end an answer.
        sampling: settings of transformers' `GenerationConfig`; without any, the likeliest token is taken.
    """
    before = model.generation_config
    pad = getattr(before, "pad_token_id", None)
    pad = min(ends, default=0) if pad is None else pad
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": False} | sampling
    model.generation_config = GenerationConfig(
        max_new_tokens=limit, eos_token_id=sorted(ends) or None, pad_token_id=pad, **how
    )
    try:
        written = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))
    finally:
        model.generation_config = before
    return [_up_to_end(answer, ends) for answer in written[:, longest:].tolist()]


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)
