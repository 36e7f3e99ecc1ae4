"""A pruned model as a draft: what is counted is what an own, slow loop of assisted generation accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import tiny
from darwinlm.config.run import RefitConfig
from darwinlm.evaluation.drafting import drafting
from darwinlm.evaluation.generation import greedy

PROMPTS, NEW, AHEAD = ("The list of", "A function is"), 24, 3


def accepted_by_hand(dense: Any, draft: Any, prompt: list[int]) -> tuple[list[int], int, int, int]:
    """The continuation, and how many tokens were drafted and accepted in how many passes of the dense model."""
    text, drafted, accepted, passes = list(prompt), 0, 0, 0

    def likeliest(model: Any, ids: list[int]) -> list[int]:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].argmax(-1).tolist()

    while len(text) < len(prompt) + NEW:
        left = len(prompt) + NEW - len(text)
        proposed: list[int] = []
        while len(proposed) < min(AHEAD, left - 1):
            proposed.append(likeliest(draft, text + proposed)[-1])
        chosen = likeliest(dense, text + proposed)[len(text) - 1 :]
        agreed = next((i for i, token in enumerate(proposed) if token != chosen[i]), len(proposed))
        drafted, accepted, passes = drafted + len(proposed), accepted + agreed, passes + 1
        text += chosen[: agreed + 1]
    return text[len(prompt) :], drafted, accepted, passes


@pytest.mark.parametrize("seed", [0, 1])
def test_acceptance_is_what_a_slow_loop_accepts(seed: int) -> None:
    """The dense model itself as the draft, and a disturbed one."""
    dense: Any = tiny.build("llama-gqa")
    draft: Any = tiny.build("llama-gqa")
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.02 * seed * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for model in (dense, draft):
        model.generation_config.eos_token_id = None
    tokenizer = tiny.tokenizer()
    found = drafting(dense, draft, tokenizer, PROMPTS, NEW, AHEAD)
    by_hand = [accepted_by_hand(dense, draft, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    texts, *counts = zip(*by_hand, strict=True)
    drafted, accepted, passes = map(sum, counts)
    assert list(texts) == [greedy(dense, tokenizer(prompt)["input_ids"], NEW) for prompt in PROMPTS]
    assert found.same
    assert found.acceptance == pytest.approx(accepted / drafted)
    assert found.tokens_a_pass == pytest.approx(len(PROMPTS) * NEW / passes)
    assert (found.acceptance == 1) == (seed == 0)
    assert found.speedup.median > 0


def test_evaluate_reports_a_draft(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export with uneven blocks, in the command; without the dense model there is nothing to draft for."""
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", refit=RefitConfig(tokens=0))
    assert runs.call(*runs.command(config, name="search")) == 0
    assert runs.call("export", config.out, "--out", str(tmp_path / "model"), "--no-verify") == 0
    out = tmp_path / "out.json"
    flags = ("--draft", "--continuation-tokens", "8", "--prompts", "[Hello there]", "--out", str(out))
    capsys.readouterr()
    assert runs.call("evaluate", str(tmp_path / "model"), "--against", config.model, *flags) == 0
    assert "accepted of what it drafts, %" in capsys.readouterr().out
    dense, pruned = json.loads(out.read_text())["models"]
    assert dense["draft"] is None
    assert 0 <= pruned["draft"]["acceptance"] <= 1
    assert pruned["draft"]["same"]
    assert runs.call("evaluate", str(tmp_path / "model"), *flags) == 2
    assert "--draft is for the dense model: expected --against" in capsys.readouterr().err
