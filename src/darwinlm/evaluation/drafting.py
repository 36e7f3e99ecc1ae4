"""A pruned model as the dense one's draft: how many of its tokens are accepted, and how much faster that is.

In assisted generation (Leviathan et al., 2023, arXiv 2211.17192) the draft writes some tokens, and one pass of the
dense model accepts those that it would have chosen itself. What is written is what the dense model writes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.evaluation.quality import evaluation_mode
from darwinlm.runtime.timing import Ratio, alternate, now

REPEATS = 3  # timings of each way to write, whose median counts


@dataclass(frozen=True)
class Drafting:
    """What a draft is worth to the dense model.

    Attributes:
        ahead: the tokens that the draft writes at a time.
        acceptance: the share of its tokens that the dense model accepts.
        tokens_a_pass: the tokens that are written with each pass of the dense model; alone, it is 1.
        speedup: how many times as fast the dense model writes with the draft as alone.
        same: whether all continuations are those that the dense model writes alone.
    """

    ahead: int
    acceptance: float
    tokens_a_pass: float
    speedup: Ratio
    same: bool


@torch.inference_mode()
def drafting(
    dense: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    ahead: int = 5,
) -> Drafting:
    """Let the dense model continue prompts greedily, alone and with the other as its draft, in turns.

    Args:
        new_tokens: the tokens of each continuation, end-of-text tokens or not.
        ahead: the tokens that the draft writes at a time.
    """
    inputs = [tokenizer(prompt, return_tensors="pt")["input_ids"].to(dense.device) for prompt in prompts]
    written: dict[str, list[list[int]]] = {}
    with _plain(dense, new_tokens), _plain(draft, new_tokens, ahead), evaluation_mode([dense, draft]):

        def timed(name: str, **options: Any) -> float:
            began = now(dense.device)
            written[name] = [_continued(dense, ids, **options) for ids in inputs]
            return now(dense.device) - began

        with _counted(dense) as passes, _counted(draft) as drafted:
            timed("drafted", assistant_model=draft)
        works = {
            "alone": lambda: timed("alone"),
            "drafted": lambda: timed("drafted", assistant_model=draft),
        }
        seconds = alternate(works, REPEATS, "drafting")
    tokens = sum(map(len, written["drafted"]))
    accepted = tokens - passes[0]  # every pass of the dense model adds a token of its own
    return Drafting(
        ahead=ahead,
        acceptance=accepted / drafted[0] if drafted[0] else 0.0,
        tokens_a_pass=tokens / passes[0],
        speedup=Ratio.of(seconds["alone"], seconds["drafted"]),
        same=written["alone"] == written["drafted"],
    )


def _continued(dense: Any, token_ids: torch.Tensor, **options: Any) -> list[int]:
    found = dense.generate(token_ids, attention_mask=torch.ones_like(token_ids), **options)
    return found[0, token_ids.shape[1] :].tolist()


@contextmanager
def _plain(model: PreTrainedModel, new_tokens: int, ahead: int = 1) -> Iterator[None]:
    """Let a model write greedily, and as a draft so many tokens ahead, whatever its generation config says."""
    before = model.generation_config
    pad = getattr(before, "pad_token_id", None) or 0
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=pad,
        num_assistant_tokens=ahead, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """Count the passes of a model."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    hook = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


def rows_of(drafts: Sequence[Drafting | None]) -> list[list[str]]:
    """Return rows of a table with a column for each model, after their titles; none if no model was a draft."""
    measures: dict[str, Callable[[Drafting], str]] = {
        "accepted of what it drafts, %": lambda draft: f"{100 * draft.acceptance:.1f}",
        "tokens a pass of the dense model": lambda draft: f"{draft.tokens_a_pass:.2f}",
        "speed of the dense model with it": lambda draft: draft.speedup.brief,
    }
    if not any(drafts):
        return []
    return [[name, *("" if draft is None else text(draft) for draft in drafts)] for name, text in measures.items()]
