"""Tiny models that lost different parts, the oracle they are held against, and what is observed of both."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from darwinlm.types import BlockSizes

BLOCKS, HIDDEN, CHANNELS, VOCAB, EOS = 4, 64, 96, 128, 2
CARD = "---\nlicense: apache-2.0\n---\n# A pruned model\n"
Kept = tuple[tuple[int, ...], tuple[int, ...]]  # KV groups and MLP channels of a block

SOME = tuple(range(40)) + tuple(range(70, 94))
MIXED: tuple[Kept, ...] = (((1,), SOME), ((), SOME[:32]), ((0,), ()), ((0, 1), tuple(range(CHANNELS))))
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    heads: int = 4
    groups: int = 2
    kept: tuple[Kept, ...] = MIXED


CASES = {
    "llama-mha": Case("llama", groups=4, kept=(((0, 2, 3), SOME), *MIXED[1:3], ((1, 3), SOME[10:20]))),
    "llama-gqa-tied": Case("llama", {"tie_word_embeddings": True}),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-block-gone": Case("llama", kept=(MIXED[0], ((), ()), MIXED[1], MIXED[3])),
    "llama-3-rope": Case("llama", {"rope_parameters": LLAMA_3_ROPE}),
    "llama-3-native": Case("llama", {"rope_parameters": LLAMA_3_ROPE}, kept=(((1,), SOME),) * BLOCKS),
    "llama-no-native": Case("llama", heads=8, groups=8, kept=(((0, 2, 5), SOME),) * BLOCKS),
    "qwen2": Case("qwen2", heads=6, options={"hidden_size": 96, "tie_word_embeddings": True}),
    "qwen2-windows": Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "mistral": Case("mistral", {"sliding_window": 7}),
    "qwen3": Case("qwen3", {"head_dim": 24}),
    "mistral-native": Case("mistral", {"sliding_window": 7}, heads=8, groups=4, kept=(((0, 1, 3), SOME),) * BLOCKS),
    "qwen3-native": Case("qwen3", {"head_dim": 24}, kept=(((1,), SOME),) * BLOCKS),
}
NATIVE = {"llama-3-native", "mistral-native", "qwen3-native"}


def native_config(family: str, **options: Any) -> PreTrainedConfig:
    config_class: Any = CONFIG_MAPPING[family]
    return config_class(**options)


def dense_model(case: Case) -> PreTrainedModel:
    torch.manual_seed(7)
    options: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.groups,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    config = native_config(case.family, **(options | case.options))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start all alike, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
    return model


def spread(kept: tuple[int, ...], width: int) -> torch.Tensor:
    return torch.tensor([s * width + i for s in kept for i in range(width)], dtype=torch.long)


def masked_model(dense: PreTrainedModel, case: Case) -> PreTrainedModel:
    """The dense model with zeros where a unit's output enters the stream."""
    model = copy.deepcopy(dense)
    for layer, (groups, channels) in zip(model.model.layers, case.kept, strict=True):
        width = layer.self_attn.o_proj.in_features // case.groups
        for consumer, kept in (
            (layer.self_attn.o_proj, spread(groups, width)),
            (layer.mlp.down_proj, spread(channels, 1)),
        ):
            gone = torch.ones(consumer.in_features, dtype=torch.bool).scatter(0, kept, False)
            consumer.weight.data[:, gone] = 0
            if not len(kept) and consumer.bias is not None:
                consumer.bias.data.zero_()
    return model


class Gone(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return torch.zeros_like(hidden_states)


class GoneMixer(Gone):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return torch.zeros_like(hidden_states), None


def narrow(linear: nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight.data[rows])
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.data[rows])
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight.data[:, columns])


def stitched_model(dense: PreTrainedModel, case: Case) -> tuple[PreTrainedModel, list[BlockSizes]]:
    """The dense model with the lost rows and columns cut out, and what is left of each block."""
    model = copy.deepcopy(dense)
    sizes = []
    for layer, (groups, channels) in zip(model.model.layers, case.kept, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        if groups:
            narrow(attention.q_proj, rows=spread(groups, attention.q_proj.out_features // case.groups))
            for projection in (attention.k_proj, attention.v_proj):
                narrow(projection, rows=spread(groups, attention.head_dim))
            narrow(attention.o_proj, columns=spread(groups, attention.o_proj.in_features // case.groups))
        else:
            layer.self_attn, layer.input_layernorm = GoneMixer(), nn.Identity()
        if channels:
            narrow(mlp.gate_proj, rows=spread(channels, 1))
            narrow(mlp.up_proj, rows=spread(channels, 1))
            narrow(mlp.down_proj, columns=spread(channels, 1))
        else:
            layer.mlp, layer.post_attention_layernorm = Gone(), nn.Identity()
        sizes.append(BlockSizes(len(groups) * case.heads // case.groups, len(groups), len(channels)))
    return model, sizes


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )


def observe(model, token_ids, backbone):
    """All that is compared of a model. Its source also runs in the fresh process, so it uses torch alone."""
    import torch

    def greedy(ids, **options):
        mask = options.pop("attention_mask", torch.ones_like(ids))
        return model.generate(ids, attention_mask=mask, max_new_tokens=32, min_new_tokens=32, **options)

    seen = {}
    with torch.no_grad():
        for kind in ("eager", "sdpa"):
            model.set_attn_implementation(kind)
            out = model(token_ids, output_hidden_states=True)
            seen[f"logits-{kind}"] = out.logits
            seen[f"hidden-{kind}"] = out.hidden_states[-1]
        seen["backbone"] = backbone(token_ids).last_hidden_state
        prompt = token_ids[:1, :6]
        seen["greedy-cache"] = greedy(prompt, do_sample=False)
        seen["greedy-no-cache"] = greedy(prompt, do_sample=False, use_cache=False)
        seen["greedy-static-cache"] = greedy(prompt, do_sample=False, cache_implementation="static")
        seen["beams"] = greedy(prompt, do_sample=False, num_beams=3)
        padded, mask = token_ids[:, :9].clone(), torch.ones(2, 9, dtype=torch.long)
        padded[1, :4], mask[1, :4] = 0, 0
        seen["greedy-left-padded"] = greedy(padded, do_sample=False, attention_mask=mask)
        seen["greedy-left-padded-static-cache"] = greedy(
            padded, do_sample=False, attention_mask=mask, cache_implementation="static"
        )
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            older_name = "gradient_checkpointing_enable"  # deprecated in transformers 5.23
            getattr(model, "activation_checkpointing_enable", getattr(model, older_name))()
        model.zero_grad()
        model(token_ids, labels=token_ids, use_cache=False).loss.backward()
        name = "gradient-checkpointed" if checkpointing else "gradient"
        seen[name] = model.get_input_embeddings().weight.grad.clone()
        model.eval()
    return {name: tensor.detach().contiguous() for name, tensor in seen.items()}


FRESH_PROCESS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "darwinlm":
            raise ImportError("darwinlm is blocked")

sys.meta_path.insert(0, Blocked())
import pathlib
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

root = pathlib.Path(sys.argv[1])
token_ids = load_file(root / "token_ids.safetensors")["token_ids"]
for directory in sorted((root / "exports").iterdir()):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    backbone = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    seen = observe(model, token_ids, backbone)
    saved = root / "saved" / directory.name
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
    seen["logits-saved-again"] = again(token_ids).logits.detach()
    save_file(seen, root / f"{directory.name}.safetensors")
"""


@dataclass(frozen=True)
class Outcome:
    root: Path
    expected: dict[str, dict[str, torch.Tensor]]
    sizes: dict[str, list[BlockSizes]]
    stitched: dict[str, PreTrainedModel]
    token_ids: torch.Tensor

    def directory(self, name: str) -> Path:
        return self.root / "exports" / name

    def found(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / f"{name}.safetensors")
