"""The form for vLLM's AnyModel: stock layers with the sizes of `per_layer_config` compute what the export computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import pruned
from darwinlm.commands.export import convert
from darwinlm.config.run import ExportConfig
from darwinlm.model.reading import load
from darwinlm.types import UsageError

FORM = ExportConfig(compat="anymodel", verify=False)


class Nothing(nn.Module):
    """In the place of what a layer skips, as transformers' proposal for `per_layer_config` has it."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        return torch.zeros_like(hidden_states)


class NoAttention(Nothing):
    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        return torch.zeros_like(hidden_states), None


def read_anymodel(directory: Path) -> Any:
    """A model of stock layers, by transformers' own `per_layer_config` alone."""
    config: Any = AutoConfig.from_pretrained(directory)
    fields = {name: value for name, value in config.to_dict().items() if "per_layer" not in name}
    model: Any = AutoModelForCausalLM.from_config(type(config)(**fields))
    for index, layer in enumerate(model.model.layers):
        own = config.per_layer_config[index]
        own._attn_implementation = model.config._attn_implementation
        model.model.layers[index] = type(layer)(own, index)
        if "attention" in getattr(own, "skip", ()):
            model.model.layers[index].self_attn = NoAttention()
            model.model.layers[index].input_layernorm = nn.Identity()
        if "mlp" in getattr(own, "skip", ()):
            model.model.layers[index].mlp = Nothing()
            model.model.layers[index].post_attention_layernorm = nn.Identity()
    report = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """Exports in which an attention and an MLP are gone."""
    root = tmp_path_factory.mktemp("anymodel")
    for family in ("llama-gqa", "qwen3", "olmo2"):
        case = pruned.prune(checkpoints[family], root / f"{family}-database")
        pruned.write_export(case, case.genomes()[-2], root / family)
    return root


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_stock_layers_compute_the_export(source: Path, tmp_path: Path, family: str) -> None:
    out = convert(source / family, tmp_path / "out", FORM)
    ids = pruned.token_ids(3, 1)
    torch.testing.assert_close(read_anymodel(out)(ids).logits, load(source / family)(ids).logits, atol=1e-4, rtol=1e-4)
    config = json.loads((out / "config.json").read_text())
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
    assert (config["architectures"], config["base_architecture"]) == (["AnyModel"], stock)
    assert "auto_map" not in config
    assert not list(out.glob("*.py"))
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    layers = config["per_layer_config"].values()
    assert all(layer.get("num_attention_heads") != heads for layer in layers)
    assert all(layer.get("num_key_value_heads") != keys for layer in layers)
    assert [layer.get("skip") for layer in layers if "skip" in layer] == [["attention"], ["mlp"]]
    assert "AnyModel" in (out / "README.md").read_text()
    with pytest.raises(UsageError, match="form for vLLM's AnyModel"):
        load(out)


def test_what_stock_layers_do_not_build_is_refused(source: Path, tmp_path: Path) -> None:
    """OLMo 2 norms all heads at once, and an export of it keeps them all."""
    with pytest.raises(UsageError, match="--compat anymodel: expected layers of olmo2 that take sizes of their own"):
        convert(source / "olmo2", tmp_path / "out", FORM)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_layers_are_alike_needs_no_such_form(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = convert(checkpoints["qwen3"], tmp_path / "out", FORM)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
