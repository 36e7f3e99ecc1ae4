"""GGUF files as input: what transformers would read wrongly, or for ever, is completed or refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny
from darwinlm.export.gguf import export_gguf
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.gguf_file import stretched_by
from darwinlm.model.reading import load
from darwinlm.types import UsageError

IDS = torch.arange(40)[None]


@pytest.fixture
def file(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama with biases."""
    return export_gguf(checkpoints["llama-gqa"], tmp_path / "model.gguf", "f32", verify=False)


def _logits(file: Path, workspace: Path) -> torch.Tensor:
    return load(find_checkpoint(str(file), workspace).path)(IDS).logits


def test_biases_come_back(file: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    torch.testing.assert_close(
        _logits(file, tmp_path), load(checkpoints["llama-gqa"])(IDS).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_stretched_rotary_embeddings_come_back(rope: dict[str, object], tmp_path: Path) -> None:
    config = LlamaConfig(
        **tiny.COMMON, num_attention_heads=2, num_key_value_heads=2, rope_parameters={"rope_theta": 1e4} | rope
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32", verify=False)
    torch.testing.assert_close(_logits(file, tmp_path), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_factors_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters={"rope_theta": 5e5} | rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(plain / stretched_by(rope, 5e5, 64), stretched.double(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight", r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (b"blk.1.attn_q.bias", b"blk.1.attn_z.bias", r"lacks model\.layers\.1\.self_attn\.q_proj\.bias"),
        (b"blk.0.attn_q.bias", b"blk.0.attn_z.bias", "holds tensors of .* some would not be read"),
        (b"GGUF", b"GGML", "expected it to begin with GGUF"),
    ],
)
def test_renamed_tensors_are_refused(old: bytes, new: bytes, words: str, file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))
    with pytest.raises(UsageError, match=words):
        find_checkpoint(str(file), tmp_path)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [10**6, 10**12, 2**64 - 1])
def test_absurd_counts_are_refused_at_once(at: int, count: int, file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    struct.pack_into("<Q", data, at, count)
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"check the file|fetch it again"):
        find_checkpoint(str(file), tmp_path)


def test_an_absurd_number_of_blocks_is_refused_at_once(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    key = b"llama.block_count"
    at = data.index(key) + len(key) + 4  # after the type
    assert struct.unpack_from("<I", data, at) == (3,)
    file.write_bytes(data[:at] + struct.pack("<I", 10**7) + data[at + 4 :])
    with pytest.raises(UsageError, match="expected num_hidden_layers from 1 to 1,024, found 10,000,000"):
        find_checkpoint(str(file), tmp_path)
