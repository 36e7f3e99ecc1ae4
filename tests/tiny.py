"""Tiny random models of every family, written as checkpoints, and real text that every Python has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

VOCAB = 320
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough for attention and logits to be far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
MIXED: dict[str, Any] = COMMON | {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
STATES: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
SLIDING_FULL = ["sliding_attention", "full_attention"]
TURNS: dict[str, Any] = MIXED | {
    "layer_types": SLIDING_FULL * 2, "sliding_window": 8, "head_dim": 4, "global_head_dim": 8,
    "num_global_key_value_heads": 2,
}  # fmt: skip
ALL: dict[str, Any] = {**COMMON}
FOUR_TIMES: dict[str, Any] = COMMON | {"intermediate_size": 128}  # as wide as these have their MLPs
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-mha": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False),
    "llama-gqa": LlamaConfig(
        **COMMON, num_attention_heads=8, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True,
        attention_bias=True, mlp_bias=True,
    ),
    "qwen2": Qwen2Config(**COMMON, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False),
    "mistral": MistralConfig(**COMMON, num_attention_heads=8, num_key_value_heads=4, head_dim=4, sliding_window=None),
    "qwen3": Qwen3Config(**COMMON, num_attention_heads=8, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True),
    "granite": GraniteConfig(
        **COMMON, num_attention_heads=8, num_key_value_heads=4, attention_bias=True, residual_multiplier=0.5,
        embedding_multiplier=2.0, attention_multiplier=0.4, logits_scaling=3.0, tie_word_embeddings=True,
    ),
    "smollm3": SmolLM3Config(
        **COMMON, num_attention_heads=8, num_key_value_heads=4, no_rope_layers=[1, 0, 1], use_sliding_window=True,
        sliding_window=8, layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma2": Gemma2Config(
        **COMMON, num_attention_heads=8, num_key_value_heads=4, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
    ),
    "gemma3": Gemma3TextConfig(
        **COMMON, num_attention_heads=8, num_key_value_heads=4, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], attention_bias=True,
    ),
    # Heads of another width and number where attention is full, whose values are what the projection of the keys gives.
    "gemma4": Gemma4TextConfig(
        **TURNS, attention_k_eq_v=True, hidden_size_per_layer_input=0, final_logit_softcapping=30.0,
    ),
    # The last blocks read keys and values of earlier ones, have wider MLPs, and all are given embeddings of their own.
    "gemma4-shared-mqa": Gemma4TextConfig(
        **TURNS | {"num_key_value_heads": 1, "num_hidden_layers": 6, "layer_types": SLIDING_FULL * 3},
        num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
        use_double_wide_mlp=True,
    ),
    "phi3": Phi3Config(**COMMON, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False),
    "olmo2": Olmo2Config(**COMMON, num_attention_heads=8, num_key_value_heads=4, attention_bias=True),
    "glm4": Glm4Config(**COMMON, num_attention_heads=8, num_key_value_heads=4, head_dim=8, attention_bias=True),
    "cohere2": Cohere2Config(
        **COMMON, num_attention_heads=8, num_key_value_heads=4, sliding_window=8, logit_scale=0.5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    # Attention and MLP read one norm, and both are added to the stream at once.
    "phi": PhiConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, partial_rotary_factor=0.5),  # pyright: ignore[reportCallIssue]
    # Linear modules are stored transposed, and blocks take arguments without names.
    "gpt2-mha": GPT2Config(**COMMON, num_attention_heads=4, n_inner=64),  # pyright: ignore[reportCallIssue]
    # One KV head for all; rows of query, key and value follow one another; blocks return more than hidden states.
    "falcon-mqa": FalconConfig(**COMMON, num_attention_heads=4, ffn_hidden_size=64),  # pyright: ignore[reportCallIssue]
    # A KV head lies behind the query heads that read it, group after group.
    "falcon-fused-gqa": FalconConfig(
        **ALL, num_attention_heads=8, num_kv_heads=4, ffn_hidden_size=64, new_decoder_architecture=True
    ),
    # Biases of attention scores differ by head (ALiBi): [sequences * heads, ...], in the mask too, and for all texts.
    "bloom-mha": BloomConfig(**FOUR_TIMES, n_head=4),
    "falcon-alibi-mha": FalconConfig(
        **ALL, num_attention_heads=4, ffn_hidden_size=64, multi_query=False, alibi=True, parallel_attn=False
    ),
    "mpt-mha": MptConfig(**FOUR_TIMES, n_heads=4, max_seq_len=256),
    # Query, key and value of a head lie side by side in one projection.
    "gpt_neox-mha": GPTNeoXConfig(**COMMON, num_attention_heads=4),
    # Positions are learned, and the linear modules of the MLP lie in the block itself.
    "opt-mha": OPTConfig(**COMMON, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32),
    "starcoder2": Starcoder2Config(**COMMON, num_attention_heads=8, num_key_value_heads=4, use_bias=True),
    # Linear attention in turns with attention, whose heads' gates lie beside their queries.
    "qwen3_5-hybrid": Qwen3_5TextConfig(
        **MIXED, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"] * 2,
    ),
    # Short convolutions in turns with attention, and an MLP whose width is not that in the config.
    "lfm2-hybrid": Lfm2Config(**MIXED, layer_types=["conv", "full_attention"] * 2, block_multiple_of=16),
    # A state-space layer beside each attention, which reads the same norm.
    "falcon_h1-hybrid": FalconH1Config(
        **MIXED, **STATES, mamba_d_ssm=64, ssm_multipliers=[0.5, 1.5, 0.7, 1.3, 0.9], lm_head_multiplier=0.5,
        attention_out_multiplier=0.8, ssm_out_multiplier=1.2,
    ),
    # State-space layers in turns with attention, and gate and input of the MLP in one projection.
    "granite-hybrid": GraniteMoeHybridConfig(
        **MIXED, **STATES, shared_intermediate_size=64, num_local_experts=0, residual_multiplier=0.5,
        logits_scaling=3.0, attention_multiplier=0.4, layer_types=["linear_attention", "full_attention"] * 2,
    ),
}  # fmt: skip

FAMILIES = ["llama-mha", "llama-gqa", "qwen2", "mistral", "qwen3"]  # whose pruned form can be exported


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose every parameter is random: biases and norms too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    draw_scalars(model)
    return model.requires_grad_(False)


def draw_scalars(model: PreTrainedModel) -> None:
    """Give blocks that scale the stream a random number each."""
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            nn.init.uniform_(buffer, 0.5, 1.5)


def write_checkpoint(path: Path, family: str, seed: int = 0, adds_bos: bool = False) -> Path:
    """Write a tiny model with its tokenizer."""
    build(family, seed).save_pretrained(path)
    tokenizer(adds_bos).save_pretrained(path)
    return path


def documents() -> list[str]:
    """Technical prose: the topics of Python's own help."""
    return list(topics.values())


def few_documents(count: int) -> list[str]:
    """Some documents, the first of which is held out: the hash decides, and the text of every Python is another."""
    from darwinlm.data.corpus import is_held_out  # not before jaxtyping has its hook in place

    chosen = list(dict.fromkeys(documents()))
    held_out = [document for document in chosen if is_held_out(document)][:1]
    return held_out + [document for document in chosen if not is_held_out(document)][: count - 1]


def write_text(path: Path) -> Path:
    """The documents as a .jsonl file."""
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents()))
    return path


def tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the documents.

    Args:
        adds_bos: whether it puts a BOS before every text, as those of Llama, Mistral and Gemma do.
    """
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(documents()[:20], vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False)
    unknown, begin, end, padding = SPECIAL
    if adds_bos:
        trained._tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, SPECIAL.index(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, unk_token=unknown, bos_token=begin, eos_token=end, pad_token=padding
    )
