"""The demo on the real SmolLM2, cut short: the searched model is better than the uniform one, and it talks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from darwinlm.commands.compress import run
from darwinlm.config.run import DEMO, CalibrationConfig, DatabaseConfig, EvaluationConfig, SelectionStage

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

APART = """
import sys
sys.modules["darwinlm"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True, padding_side="left")
ids = tokenizer(["The capital of France is", "The Roman Empire was one of the largest empires in"], padding=True,
                return_tensors="pt")
greedy = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False)
with torch.inference_mode():
    cached = model.generate(**ids, **greedy)
    assert torch.equal(cached, model.generate(**ids, **greedy, use_cache=False)), "the cache changes tokens"
    for row, mask in zip(ids.input_ids, ids.attention_mask):
        alone = model.generate(row[mask.bool()][None], **greedy)[0, -32:]
        index = (ids.input_ids == row).all(1).nonzero()[0, 0]
        assert torch.equal(alone, cached[index, -32:]), "left padding changes tokens"
print(tokenizer.batch_decode(cached, skip_special_tokens=True))
"""


def test_the_searched_model_is_ahead_of_the_uniform_one_and_talks(tmp_path: Path) -> None:
    config = replace(
        DEMO,
        out=str(tmp_path / "run"),
        target_level=1.5,
        calibration=CalibrationConfig(tokens=8192),
        database=DatabaseConfig(levels=6),
        search=replace(DEMO.search, generations=1, stages=(SelectionStage(4, 256), SelectionStage(1, 512))),
        evaluation=EvaluationConfig(tokens=2048, repeats=1, continuation_tokens=16),
    )
    result = run(config)
    dense, uniform, searched = result.table
    assert searched["parameters"] <= uniform["parameters"] < 0.85 * dense["parameters"]
    assert searched["kl"] < uniform["kl"]
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    apart = [sys.executable, "-c", APART, str(result.exported)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(apart, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout or "France" in done.stdout
