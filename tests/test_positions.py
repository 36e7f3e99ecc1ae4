"""Loss and KL by position against full logits, and the command that tells them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import runs
import tiny
from darwinlm.commands.evaluate import read_text
from darwinlm.config.evaluation import EvaluateConfig
from darwinlm.evaluation.positions import FIRST, by_position, long_windows, ranges
from darwinlm.model.reading import load


@given(st.integers(2, 10_000))
def test_ranges_hold_every_position_once_and_each_is_twice_as_long(length: int) -> None:
    found = ranges(length)
    assert [at for first, last in found for at in range(first, last + 1)] == list(range(1, length))
    assert all(first == 1 or first % FIRST == 0 for first, _ in found)
    assert all(last == 2 * first - 1 for first, last in found[1:-1])


@pytest.mark.parametrize("bos", [None, 1])
def test_figures_are_those_of_full_logits(bos: int | None) -> None:
    models: list[Any] = [tiny.build("llama-mha"), tiny.build("llama-mha", 1)]
    stream = torch.randint(4, tiny.VOCAB, (560,), generator=torch.Generator().manual_seed(0))
    windows = long_windows(stream, 200, bos)
    assert [len(window.token_ids) for window in windows] == [200, 200]
    found = by_position(models[1], windows, models[0], [])
    losses, divergences = [], []
    for window in windows:
        with torch.no_grad():
            p, q = (model(window.token_ids[None]).logits[0, :-1].double().log_softmax(-1) for model in models)
        losses.append(-q.gather(-1, window.token_ids[1:, None])[:, 0])
        divergences.append((p.exp() * (p - q)).sum(-1))
    loss, divergence = torch.stack(losses), torch.stack(divergences)
    assert [at.name for at in found] == ["1-63", "64-127", "128-199"]
    for at in found:
        part = slice(at.first - 1, at.last)
        assert at.tokens == loss[:, part].numel()
        assert at.loss == pytest.approx(loss[:, part].mean().item(), rel=1e-5)
        assert at.kl == pytest.approx(divergence[:, part].mean().item(), rel=1e-5)
    (short,) = long_windows(stream[:50], 200, bos)
    assert [at.name for at in by_position(models[1], [short])] == [f"1-{len(short.token_ids) - 1}"]
    assert [at.kl for at in by_position(models[1], windows)] == [None] * 3
    assert [at.kl for at in by_position(models[0], windows, models[0], [])] == [0.0] * 3


def test_the_command_tells_them_up_to_the_models_context(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, other = checkpoints["llama-mha"], tiny.write_checkpoint(tmp_path / "other", "llama-mha", seed=1)
    flags = ["--data", str(text), "--tokens", "600", "--window", "64", "--positions", "context"]
    out = tmp_path / "out.json"
    assert runs.call("evaluate", str(other), "--against", str(dense), *flags, "--out", str(out)) == 0
    shown = capsys.readouterr().out
    stream, _ = read_text(str(text), tiny.tokenizer(), EvaluateConfig("M", tokens=600))
    expected = by_position(load(other), long_windows(stream, 256, None), load(dense))
    models = json.loads(out.read_text())["models"]
    assert [at["first"] for at in models[0]["positions"][str(text)]] == [1, 64, 128]
    for at, found in zip(expected, models[1]["positions"][str(text)], strict=True):
        assert (found["loss"], found["kl"]) == (pytest.approx(at.loss), pytest.approx(at.kl))
        (line,) = (line for line in shown.splitlines() if line.startswith(f"loss at {at.name}, "))
        assert line.split()[-1] == f"{at.loss:.3f}"
        (line,) = (line for line in shown.splitlines() if line.startswith(f"KL at {at.name}, "))
        assert line.split()[-1] == f"{at.kl:.4f}"
    assert "positions: tokens before a token in its window" in shown


def test_positions_that_cannot_be_told(
    checkpoints: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in (
        (
            ["--data", str(text), "--window", "64", "--positions", "257"],
            "--positions: expected at most the 256 positions",
        ),
        (["--data", str(text), "--positions", "1"], "--positions: expected at least 2, found 1"),
        (["--generation", "--positions", "64"], "--positions is of text: expected --data"),
    ):
        assert runs.call("evaluate", str(checkpoints["llama-mha"]), *flags) == 2
        assert words in capsys.readouterr().err
