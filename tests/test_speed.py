"""Counting equals what can be counted another way; measuring measures every model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import runs
import tiny
from darwinlm.config.evaluation import SpeedConfig
from darwinlm.evaluation.speed import count, measure
from darwinlm.model.size import parameter_bytes
from darwinlm.runtime.timing import Ratio
from darwinlm.types import UsageError

SHORT = SpeedConfig(batch=2, prompt_tokens=12, new_tokens=4, repeats=2)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_operations_are_those_that_torch_counts(family: str) -> None:
    model: Any = tiny.build(family)
    model.set_attn_implementation("eager")
    token_ids = torch.ones(SHORT.batch, SHORT.prompt_tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(token_ids, logits_to_keep=1)
    heads, blocks = model.config.num_attention_heads, model.config.num_hidden_layers
    masked = SHORT.batch * blocks * 2 * heads * model.model.layers[0].self_attn.head_dim * SHORT.prompt_tokens**2
    rotary = SHORT.batch * model.model.layers[0].self_attn.head_dim * SHORT.prompt_tokens
    assert counter.get_total_flops() == pytest.approx(count(model, SHORT).prefill_flops + masked, abs=rotary)


def test_bytes_are_the_weights_and_the_cache() -> None:
    model = tiny.build("llama-gqa")
    unread = sum(p.numel() for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")) * 4
    cache = 2 * 3 * 4 * 8 * (12 + 4 / 2) * 4  # keys and values, blocks, KV heads, their width, positions, bytes
    assert count(model, SHORT).decode_bytes == parameter_bytes(model) - unread + SHORT.batch * cache


def test_every_model_is_measured() -> None:
    models: dict[str, PreTrainedModel] = {family: tiny.build(family) for family in ("llama-mha", "llama-gqa")}
    order: list[str] = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    figures = measure(models, SHORT)
    assert list(figures) == list(models)
    turn = [name for name in models for _ in range(1 + SHORT.new_tokens)]  # a prompt, then one token at a time
    assert order == turn * (1 + SHORT.repeats)  # they alternate
    for name, measured in figures.items():
        config = models[name].config
        width = config.num_key_value_heads * config.head_dim
        assert measured.cache_bytes == 2 * 3 * width * (12 + 4) * 4 * SHORT.batch
        assert math.isclose(measured.prefill_tokens_per_s * measured.first_token_s, 24)
        assert measured.decode_tokens_per_s > 0
        assert measured.peak_bytes is None or measured.peak_bytes >= parameter_bytes(models[name])


def test_command_prints_both_models(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["evaluate", "--speed", str(checkpoints["llama-mha"]), "--against", str(checkpoints["llama-mha"])]
    assert runs.call(*command, "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    titles = "parameters|prefill, tokens/s|decode, tokens/s|time to first token, s|KV cache, MB|peak memory, MB"
    assert [line.split("  ")[0] for line in lines[1:]] == titles.split("|")
    assert lines[3].endswith("x; 1.00x predicted")
    assert runs.call(*command, "--prompt-tokens", "8", "--repeats", "1", "--out", str(tmp_path / "speed.json")) == 0
    saved = json.loads((tmp_path / "speed.json").read_text())["speed"]
    assert f"{saved['model']['cache_bytes'] / 1e6:.1f}" in capsys.readouterr().out
    assert saved["predicted"] == {"prefill": 1.0, "decode": 1.0}
    assert runs.call(*command[:-1], str(tmp_path / "none")) == 2
    assert "no model at" in capsys.readouterr().err
    assert runs.call(*command, "--repeats", "0") == 2
    assert "--repeats: expected at least 1, found 0" in capsys.readouterr().err


def test_command_heeds_batch_lengths_precision_and_device(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--speed", str(checkpoints["llama-mha"]), "--against", str(checkpoints["llama-mha"])]
    command += ["--batch", "20", "--prompt-tokens", "200", "--new-tokens", "8", "--repeats", "1"]
    values = 20 * (200 + 8) * 3 * 2 * 4 * 8  # sequences, positions, blocks, keys and values, KV heads, their width
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert runs.call(*command, "--dtype", dtype) == 0
        (cache,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("KV cache, MB"))
        assert cache.split()[-2:] == [f"{values * size / 1e6:.1f}"] * 2
    assert runs.call(*command, "--device", "abacus") == 2
    assert "no device 'abacus'" in capsys.readouterr().err


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="--new-tokens: expected at least 1, found 0"):
        SpeedConfig(new_tokens=0)


def test_a_ratio_has_its_range_and_a_mark_where_that_is_wide() -> None:
    """Medians of turns: a machine that is slow for one turn slows both works, and their ratio stays."""
    steady, busy = Ratio.of([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]), Ratio.of([2.0, 2.0, 2.0], [1.0, 4.0, 1.25])
    assert (str(steady), steady.wide) == ("2.00x, 2.00-2.20", False)
    assert (str(busy), busy.wide) == ("1.60x?, 0.50-2.00", True)
    assert str(Ratio.of([3.0], [2.0])) == "1.50x"
