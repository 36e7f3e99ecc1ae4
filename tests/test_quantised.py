"""Quantised models as the dense model: read as the floats that they stand for, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantisers
import runs
import tiny
from darwinlm.commands.compress import run
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.reading import load
from darwinlm.types import DarwinError, UsageError
from refusals import change_config

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": quantisers.GROUP}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
WAYS: dict[str, tuple[dict[str, Any], Callable[..., Any], dict[str, Any]]] = {
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [24, 24]}, quantisers.fp8_blocks, {}),
    "fp8-whole": ({"quant_method": "fp8"}, quantisers.fp8_whole, {}),
    "fp8-rows": ({"quant_method": "fbgemm_fp8"}, quantisers.fp8_rows, {}),
    "gptq": (GPTQ, quantisers.gptq, {}),
    "gptq-8": (GPTQ | {"bits": 8}, quantisers.gptq, {"bits": 8}),
    "gptq-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, quantisers.gptq, {"first": 0}),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, quantisers.awq, {}),
    "compressed-fp8": ({"quant_method": "compressed-tensors"}, quantisers.fp8_rows, {}),
    "compressed-int8": ({"quant_method": "compressed-tensors"}, quantisers.int8_rows, {}),
    "packed": (PACKED, quantisers.packed, {}),
    "packed-8": (PACKED, quantisers.packed, {"bits": 8}),
    "packed-asymmetric": (PACKED, quantisers.packed, {"symmetric": False}),
    "mxfp4": (PACKED | {"format": "mxfp4-pack-quantized"}, quantisers.mxfp4, {}),
    "nvfp4": (PACKED | {"format": "nvfp4-pack-quantized"}, quantisers.nvfp4, {}),
}


def quantised(model: Path, out: Path, settings: dict[str, Any], quantise: Callable[..., Any], options: dict[str, Any]):
    """A copy of a model with the projections of its blocks quantised, and one in floats that says the same."""
    meant = shutil.copytree(model, out.with_name(out.name + "-meant"))
    shutil.copytree(model, out)
    tensors, floats = load_file(model / "model.safetensors"), load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, floats[name] = quantise(tensors.pop(name), **options)
        tensors |= {name.replace("weight", part): value for part, value in parts.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors")
    save_file(floats, meant / "model.safetensors", {"format": "pt"})
    change_config(out, quantization_config=settings)
    return out, meant


@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_model_is_what_it_stands_for(
    way: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, meant = quantised(checkpoints["qwen2"], tmp_path / "given", *WAYS[way])
    found = find_checkpoint(str(given), tmp_path / "work")
    assert f"given: 21 weights are dequantised ({WAYS[way][0]['quant_method']}) to float32" in capsys.readouterr().err
    expected, actual = load(meant).state_dict(), load(found.path).state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-7)
    assert found.tokenizer("a text")["input_ids"] == Checkpoint(meant).tokenizer("a text")["input_ids"]
    assert find_checkpoint(str(given), tmp_path / "work").fingerprint == found.fingerprint  # made once


def test_channels_that_gptq_sorted(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def quantise(weight: torch.Tensor) -> Any:
        return quantisers.gptq(weight, group_of=[channel % 2 for channel in range(weight.shape[1])])

    given, meant = quantised(checkpoints["qwen2"], tmp_path / "given", GPTQ | {"desc_act": True}, quantise, {})
    found = load(find_checkpoint(str(given), tmp_path / "work").path).state_dict()
    for name, tensor in load(meant).state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_quantised_model_is_pruned(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    given, _ = quantised(checkpoints["qwen2"], tmp_path / "given", *WAYS["fp8-blocks"])
    out = tmp_path / "run"
    run(runs.short(given, tiny.write_text(tmp_path / "data.jsonl"), out))
    assert not getattr(load(out / "model").config, "quantization_config", None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "found quant_method bitsandbytes"),
        ({"quant_method": "mxfp4"}, "found quant_method mxfp4"),
        (GPTQ | {"bits": 3}, "found gptq of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "found awq of version gemv"),
        (PACKED | {"transform_config": {"config_groups": {"u": {}}}}, "found rotated weights"),
    ],
)
def test_what_cannot_be_dequantised_is_refused(
    settings: dict[str, Any], words: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    given, _ = quantised(checkpoints["qwen2"], tmp_path / "given", settings, quantisers.gptq, {})
    with pytest.raises(UsageError, match=f"is quantised: expected fp8.*{words}.*was quantised from"):
        find_checkpoint(str(given), tmp_path / "work")
    assert not (tmp_path / "work" / "dense").exists()


def test_a_part_that_is_missing_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    given, _ = quantised(checkpoints["qwen2"], tmp_path / "given", *WAYS["gptq"])
    tensors = load_file(given / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, given / "model.safetensors")
    with pytest.raises(DarwinError, match=r"model\.layers\.1\.mlp\.up_proj in .* cannot be dequantised \('scales'\)"):
        find_checkpoint(str(given), tmp_path / "work")
    assert not (tmp_path / "work" / "dense").exists()


def test_an_empty_quantisation_is_none(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(checkpoints["qwen2"], tmp_path / "model")
    change_config(model, quantization_config={})
    found = find_checkpoint(str(model), tmp_path)
    assert found.path == model
    expected = load(checkpoints["qwen2"]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(model).state_dict().items())
    run(runs.short(model, tiny.write_text(tmp_path / "data.jsonl"), tmp_path / "run"))
    assert "quantization_config" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())
