"""Which families llama.cpp runs, even, uneven and in the forms that they come in: it is asked, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import llama_cpp
import tiny
from darwinlm.export.gguf import export_gguf
from darwinlm.model.pruned import pruned_config, register
from darwinlm.model.reading import load
from darwinlm.types import BlockSizes, UsageError
from exports import LLAMA_3_ROPE
from llama_cpp import Answer, difference, needs_llama_cpp
from vocabularies import byte_pair_tokenizer

NEW_TOKENS = 32
PROMPT = list(range(20, 32))
DENSE = (BlockSizes(8, 4, 96),) * 4
EVEN = (BlockSizes(4, 2, 64),) * 4
NARROW = (BlockSizes(8, 4, 64),) * 4  # all heads
UNEVEN = (BlockSizes(6, 3, 64), BlockSizes(0, 0, 32), BlockSizes(2, 1, 0), BlockSizes(8, 4, 96))
UNEVEN_MLP = (BlockSizes(8, 4, 64), BlockSizes(8, 4, 32), BlockSizes(8, 4, 0), BlockSizes(8, 4, 96))
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
MULTIPLIERS = {
    "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "logits_scaling": 2.0,
}  # fmt: skip
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 16, "sliding_window": 8}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
}
PERIOD = [*["sliding_attention"] * 2, "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Made:
    """A random model of some sizes, and the architecture that its file should have."""

    family: str
    architecture: str
    sizes: tuple[BlockSizes, ...] = EVEN
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "granite": Made("granite", "granite", options=MULTIPLIERS),
    "granite-tied-biases": Made("granite", "granite", EVEN, MULTIPLIERS | {"tie_word_embeddings": True, "attention_bias": True}),
    "granite-uneven": Made("granite", "deci", UNEVEN, MULTIPLIERS | {"mlp_bias": True, "attention_bias": True}),
    "granite-uneven-tied": Made("granite", "deci", UNEVEN, MULTIPLIERS | {"tie_word_embeddings": True}),
    "phi3": Made("phi3", "llama", NARROW),
    "phi3-tied": Made("phi3", "llama", DENSE, {"tie_word_embeddings": True}),
    "seed_oss": Made("seed_oss", "llama", EVEN, {"head_dim": 24}),
    "seed_oss-uneven": Made("seed_oss", "deci", UNEVEN, {"head_dim": 24}),
    "gemma2": Made("gemma2", "gemma2", EVEN, GEMMA | {"tie_word_embeddings": True}),
    "gemma2-uneven": Made("gemma2", "gemma2", UNEVEN, GEMMA | {"tie_word_embeddings": True}),
    "gemma3": Made("gemma3_text", "gemma3", EVEN, GEMMA | {"layer_types": PERIOD, "rope_parameters": TWO_ROPES}),
    "gemma3-uneven": Made("gemma3_text", "gemma3", UNEVEN, GEMMA | {"layer_types": PERIOD, "rope_parameters": TWO_ROPES}),
    "gemma3-untied": Made("gemma3_text", "gemma3", EVEN, GEMMA | {"layer_types": PERIOD, "tie_word_embeddings": False}),
    "olmo2": Made("olmo2", "olmo2", NARROW),
    "olmo2-tied": Made("olmo2", "olmo2", NARROW, {"tie_word_embeddings": True}),
    "smollm3": Made("smollm3", "smollm3", EVEN, {"no_rope_layers": [1, 1, 1, 0]}),
    "smollm3-uneven": Made("smollm3", "smollm3", UNEVEN, {"no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}),
    "smollm3-rotated": Made("smollm3", "deci", UNEVEN, {"no_rope_layers": [1, 1, 1, 1]}),
    "starcoder2": Made("starcoder2", "starcoder2", NARROW, {"tie_word_embeddings": True}),
    "starcoder2-no-biases": Made("starcoder2", "starcoder2", NARROW, {"use_bias": False}),
    "starcoder2-uneven": Made("starcoder2", "starcoder2", UNEVEN),
    "qwen3-uneven-untied": Made("qwen3", "qwen3", UNEVEN, {"head_dim": 24}),
}  # fmt: skip


def write_model(made: Made, out: Path) -> Path:
    torch.manual_seed(5)
    common = {
        "vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.25,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    config_class: Any = CONFIG_MAPPING[made.family]
    first = made.sizes[0]
    if made.family in ("phi3", "olmo2"):  # whose pruned form has no class yet
        common |= {"intermediate_size": first.intermediate}
        config = config_class(**(common | made.options))
    else:
        config = pruned_config(config_class(**(common | made.options)), made.sizes)
    register(made.family)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
    model.save_pretrained(out)
    byte_pair_tokenizer("qwen2").save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(made, root / name) for name, made in CASES.items()}


@pytest.fixture(scope="module")
def files(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    return {name: export_gguf(path, root / f"{name}.gguf", "f32", verify=False) for name, path in exports.items()}


@pytest.fixture(scope="module")
def answers(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return llama_cpp.answers(files, PROMPT, tmp_path_factory.mktemp("answers"), tiny.VOCAB, NEW_TOKENS)


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_what_transformers_gives(
    exports: dict[str, Path], answers: dict[str, Answer], name: str
) -> None:
    agreed, largest = difference(load(exports[name]), PROMPT, answers[name])
    print(f"{name}: {agreed} of {NEW_TOKENS} tokens, largest difference of a log-probability {largest:.1e}")
    assert len(answers[name].tokens) == agreed == NEW_TOKENS
    assert largest < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_the_one_that_has_room(files: dict[str, Path], name: str) -> None:
    fields = gguf.GGUFReader(files[name]).fields
    assert fields["general.architecture"].contents() == CASES[name].architecture
