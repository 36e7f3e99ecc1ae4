"""Zero stubs change no logit, and the check for vLLM finds what its Transformers backend would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from darwinlm.export.hf import export_hf
from darwinlm.export.vllm import _interface_calls, check_vllm, tensor_parallel_sizes, zero_stubs
from darwinlm.model.families import block_sizes_of
from darwinlm.model.pruned import pruned_model
from darwinlm.model.reading import load
from darwinlm.types import BlockSizes, UsageError
from exports import CARD, CASES, VOCAB, dense_model, make_tokenizer, stitched_model

TOKEN_IDS = torch.randint(4, VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))
UNEVEN = ("llama-gqa-tied", "llama-biases", "qwen2", "mistral", "qwen3")


def pruned(name: str) -> Any:
    return pruned_model(*stitched_model(dense_model(CASES[name]), CASES[name]))


def exported(model: PreTrainedModel, out: Path) -> Path:
    return export_hf(model, block_sizes_of(model), make_tokenizer(), out, CARD)


@pytest.mark.parametrize("name", UNEVEN)
def test_zero_stubs_change_nothing_and_fill_every_block(name: str) -> None:
    model = pruned(name)
    stubbed: Any = zero_stubs(model)
    torch.testing.assert_close(stubbed(TOKEN_IDS).logits, model(TOKEN_IDS).logits, atol=1e-5, rtol=0)
    assert any(not block.query_heads for block in block_sizes_of(model))
    filled = zip(block_sizes_of(model), block_sizes_of(stubbed), strict=True)
    for before, after in filled:
        assert after.query_heads == (before.query_heads or 1)
        assert after.key_value_heads == (before.key_value_heads or 1)
        assert after.intermediate == (before.intermediate or 32)
    assert stubbed.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_check_names_what_is_refused_and_the_cure(tmp_path: Path) -> None:
    model = pruned("llama-gqa-tied")
    before = exported(model, tmp_path / "before")
    after = exported(zero_stubs(model), tmp_path / "after")
    assert check_vllm(before) == [
        "no attention in block 1: export with --compat vllm, which writes zeros there",
    ]
    assert check_vllm(after) == []
    path = after / "config.json"
    config = json.loads(path.read_text())
    del config["auto_map"]["AutoModel"]
    path.write_text(json.dumps(config))
    (after / "modeling_pruned_llama.py").unlink()
    refusals = check_vllm(after)
    assert [refusal.split(":")[0] for refusal in refusals] == [
        "config.json has no complete auto_map, AutoModel above all",
        "modeling_pruned_llama.py is missing or not that of this darwinlm",
    ]
    with pytest.raises(UsageError, match="no model in"):
        check_vllm(tmp_path)


def test_check_names_groups_of_different_sizes(tmp_path: Path) -> None:
    directory = exported(zero_stubs(pruned("llama-gqa-tied")), tmp_path / "model")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["per_layer_config"]["1"] |= {"num_attention_heads": 3, "num_key_value_heads": 2}
    path.write_text(json.dumps(config))
    assert check_vllm(directory) == [
        "query heads are not the same number for every KV head in block 1: prune with --database.structure kv_group or "
        "balanced"
    ]


def test_check_names_what_classes_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that lack the attention interface are named, with the cure."""
    directory = exported(zero_stubs(pruned("llama-gqa-tied")), tmp_path / "model")
    model: Any = load(directory)
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", Twice.forward)
    refusals = check_vllm(directory)
    assert "PrunedLlamaForCausalLM does not support attention backends" in refusals[0]
    assert "model.layers.0.self_attn calls the attention interface 2 times, not once" in refusals[1]
    assert "serve it with transformers" in refusals[0]
    assert "install the transformers that this darwinlm was tested with" in refusals[1]


@pytest.mark.parametrize("name", ["llama-3-native", "llama-no-native"])
def test_blocks_that_are_all_there_pass(tmp_path: Path, name: str) -> None:
    assert check_vllm(exported(pruned(name), tmp_path / "model")) == []


@pytest.mark.parametrize("name", UNEVEN)
def test_backend_like_vllms_sees_every_layer_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM passes its attention instances through the model and uses them in its own attention function."""
    seen: list[tuple[int, int, int]] = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, *, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert kwargs["attention_instances"][module.layer_idx] == f"instance {module.layer_idx}"
        seen.append((module.layer_idx, query.shape[1], key.shape[1]))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2), None

    model = load(exported(zero_stubs(pruned(name)), tmp_path / "model")).eval()
    short = TOKEN_IDS[:, :6]  # within Mistral's window, which this function ignores
    expected = model(short).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm_like", attention)
    model.config._attn_implementation = "vllm_like"
    sizes = block_sizes_of(model)
    instances = {index: f"instance {index}" for index in range(len(sizes))}
    logits = model(short, use_cache=False, attention_instances=instances).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert seen == [(index, block.query_heads, block.key_value_heads) for index, block in enumerate(sizes)]


class Twice(nn.Module):
    """An attention that calls the interface twice, which vLLM does not support."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        interface: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return interface(hidden_states) + interface(hidden_states)


def test_interface_calls_are_counted() -> None:
    assert _interface_calls(type(load_attention())) == 1
    assert _interface_calls(Twice) == 2
    assert _interface_calls(nn.Linear) == 0


def load_attention() -> nn.Module:
    return pruned("qwen3").model.layers[0].self_attn


def test_tensor_parallel_sizes_divide_every_block() -> None:
    assert tensor_parallel_sizes([BlockSizes(8, 4, 64), BlockSizes(16, 4, 96)]) == (1, 2, 4)
    assert tensor_parallel_sizes([BlockSizes(8, 4, 64), BlockSizes(1, 1, 32)]) == (1,)
