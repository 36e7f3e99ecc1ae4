"""A low-rank adapter as the dense model: merged into its base as PEFT merges it, or refused in a sentence."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import runs
import tiny
from darwinlm.commands.compress import run
from darwinlm.commands.plan.show import find_config
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.reading import load
from darwinlm.types import UsageError
from refusals import change_config
from test_quantised import WAYS, quantised

WAYS_TO_ADAPT: dict[str, dict[str, Any]] = {
    "two projections": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 3},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"o_proj": 5, r"layers\.[12]\.mlp\.down_proj": 7},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head saved whole": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}


def write_adapter(base: Path, out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Write a random adapter of a model, and return the weights of the two as PEFT merges them."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    settings = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"} | settings
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of tied embeddings, and has warnings of its own
        adapted: Any = get_peft_model(model, LoraConfig(**settings))
        for parameter in (parameter for parameter in adapted.parameters() if parameter.requires_grad):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(out)
        return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("way", WAYS_TO_ADAPT)
def test_an_adapter_is_merged_as_peft_does(
    way: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = write_adapter(checkpoints["qwen2"], tmp_path / "adapter", **WAYS_TO_ADAPT[way])
    found = find_checkpoint(str(tmp_path / "adapter"), tmp_path / "work")
    assert "merging the adapter adapter into qwen2" in capsys.readouterr().err
    weights, base = load(found.path).state_dict(), load(checkpoints["qwen2"]).state_dict()
    assert weights.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, base[name]) for name, tensor in weights.items())
    assert found.tokenizer("a text")["input_ids"] == tiny.tokenizer()("a text")["input_ids"]


def test_an_adapter_is_pruned_and_planned(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    merged = write_adapter(checkpoints["qwen2"], tmp_path / "adapter", target_modules="all-linear")
    assert find_config(str(tmp_path / "adapter")).model_type == "qwen2"
    run(runs.short(tmp_path / "adapter", tiny.write_text(tmp_path / "data.jsonl"), tmp_path / "run"))
    embedding = "model.embed_tokens.weight"  # which pruning leaves as it is
    assert torch.equal(load(tmp_path / "run" / "model").state_dict()[embedding], merged[embedding])


def test_an_adapter_of_a_quantised_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base, meant = quantised(checkpoints["qwen2"], tmp_path / "base", *WAYS["fp8-blocks"])
    merged = write_adapter(meant, tmp_path / "adapter", target_modules="all-linear")
    change_config(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=str(base))
    weights = load(find_checkpoint(str(tmp_path / "adapter"), tmp_path / "work").path).state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["dense"]


def test_an_adapter_with_more_tokens(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Its embeddings are stored whole, and its tokenizer takes the place of the base's."""
    adapter = tmp_path / "adapter"
    write_adapter(checkpoints["qwen2"], adapter, target_modules=["q_proj"])
    weights, base = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(checkpoints["qwen2"] / "model.safetensors"),
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[f"base_model.model.{name}"] = torch.cat([base[name], torch.ones(2, 32)])
    save_file(weights, adapter / "adapter_model.safetensors")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})  # type: ignore[dict-item]
    tokenizer.save_pretrained(adapter)
    found = find_checkpoint(str(adapter), tmp_path / "work")
    assert found.fingerprint
    assert (found.config.vocab_size, len(found.tokenizer)) == (tiny.VOCAB + 2, tiny.VOCAB + 2)


def test_tied_embeddings_that_are_stored_twice(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    merged = write_adapter(checkpoints["llama-gqa"], adapter, target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    changed = merged["lm_head.weight"] + 1
    weights |= {f"base_model.model.{name}.weight": changed.clone() for name in ("model.embed_tokens", "lm_head")}
    save_file(weights, adapter / "adapter_model.safetensors")
    found = find_checkpoint(str(adapter), tmp_path / "work")
    found.check_head()
    assert torch.equal(load(found.path).state_dict()["lm_head.weight"], changed)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fan_in_fan_out": True}, "expected a plain LoRA, found fan_in_fan_out True"),
        ({"use_dora": True}, "found use_dora True"),
        ({"peft_type": "IA3"}, "found peft_type IA3"),
        ({"init_lora_weights": "pissa"}, "found init_lora_weights 'pissa', which changes the base"),
        ({"base_model_name_or_path": None}, "names no base: expected base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere"}, "no model at /nowhere"),
        ({"base_model_name_or_path": "OTHER"}, r"in the shape .*: expected .*, as in .*llama-mha; check"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    fields: dict[str, Any], words: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    write_adapter(checkpoints["qwen2"], tmp_path / "adapter", target_modules="all-linear")
    other = str(checkpoints["llama-mha"])
    change_config(
        tmp_path / "adapter",
        "adapter_config.json",
        **{name: other if value == "OTHER" else value for name, value in fields.items()},
    )
    with pytest.raises(UsageError, match=words):
        find_checkpoint(str(tmp_path / "adapter"), tmp_path / "work")
    assert not (tmp_path / "work" / "dense").exists()


def test_tensors_that_fit_no_base_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(checkpoints["llama-gqa"], adapter, target_modules=["embed_tokens"])
    with pytest.raises(UsageError, match=r"changes model\.embed_tokens\.weight, which .* for its input and its output"):
        find_checkpoint(str(adapter), tmp_path / "work")
    weights = load_file(adapter / "adapter_model.safetensors")
    half = next(name for name in weights if name.endswith("lora_embedding_B"))
    save_file({name: tensor for name, tensor in weights.items() if name != half}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=f"lacks {half}"):
        find_checkpoint(str(adapter), tmp_path / "work")
    save_file({"base_model.model.model.hat.weight": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"changes model\.hat\.weight, which .*llama-gqa does not have"):
        find_checkpoint(str(adapter), tmp_path / "work")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"expected adapter_model\.safetensors in it, found none"):
        find_checkpoint(str(adapter), tmp_path / "work")
    shutil.copyfile(checkpoints["llama-gqa"] / "model.safetensors", adapter / "model.safetensors")
    with pytest.raises(UsageError, match="holds a model and an adapter"):
        find_checkpoint(str(adapter), tmp_path / "work")
