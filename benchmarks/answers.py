"""How likely a model finds right answers, without a harness: a continuous measure where accuracy decides nothing."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = Path(__file__).parents[2] / "shared" / "data" / "eval" / "arc_easy.jsonl"
QUESTIONS = 150


@torch.inference_mode()
def right_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = QUESTIONS) -> float:
    """Return the mean log-likelihood of the right answers to the first questions of ARC-easy, in nats a question."""
    return fmean(_likelihood(model, tokenizer, json.loads(line)) for line in FILE.read_text().splitlines()[:count])


def _likelihood(model: Any, tokenizer: PreTrainedTokenizerBase, asked: dict[str, Any]) -> float:
    question, answer = f"{asked['query']}\nAnswer:", f" {asked['choices'][asked['gold']]}"
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (question, answer)]
    both = torch.tensor([[*ids[0], *ids[1]]], device=model.device)
    predicted = model(both, logits_to_keep=len(ids[1]) + 1).logits[0, :-1].float()
    return -F.cross_entropy(predicted, both[0, len(ids[0]) :], reduction="sum").item()
