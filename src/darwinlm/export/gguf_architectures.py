"""The architectures of llama.cpp that darwinlm writes: what each computes, and which families it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SMALL_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # of which llama.cpp computes one, the tanh's


@dataclass(frozen=True)
class Graph:
    """An architecture of llama.cpp: what it computes, and what its tensors are called.

    Attributes:
        per_block: it takes sizes for each block.
        empty_attention: a block may have no attention at all.
        filled: its query heads together are as wide as the hidden size.
        pairs: it rotates pairs of neighbouring rows of a head, where transformers rotates rows of its two halves.
        rotated: it has rotary embedding.
        partial: of a part of the head, if need be.
        slopes: scores have a bias that grows with the distance, by a slope of each head (ALiBi).
        head_norms: the heads of query and key have norms.
        joint_norms: query and key have norms over all heads.
        shifted: norms multiply by their weight, where transformers multiplies by 1 + weight.
        layer_norms: norms take off the mean.
        biases: norms and projections have biases, of zeros where the model has none.
        gated: the MLP has a gate.
        gate_beside: the gate and the input of the MLP are one tensor.
        fused: query, key and value are one tensor.
        tied: it has one embedding for input and output.
        output: it wants an output embedding, tied or not.
        by_kind: full attention and that with a window have heads of a width each, blocks have windows in any order, and
            the last ones may read keys and values of those before them.
        windows: how many blocks lie from one with full attention to the next, where the file does not say; 0 without
            sliding windows.
        unrotated: how many blocks lie from one without rotary embedding to the next, 0 if all have it.
        scales_query: it scales attention by 1 / √head_dim and no other; else by what the file says.
        odd_depth: a model of so many blocks is taken for one whose attention scales by √(heads / hidden size).
        fields: methods of the writer, and the fields of the config that they write.
        options: the same, 0 where the config has none: without a word llama.cpp may take another number.
        only: fields of the config, where it has them, and the values for which the graph computes it.
    """

    name: str
    per_block: bool = False
    empty_attention: bool = False
    filled: bool = False
    pairs: bool = False
    rotated: bool = True
    partial: bool = False
    slopes: bool = False
    head_norms: bool = False
    joint_norms: bool = False
    shifted: bool = False
    layer_norms: bool = False
    biases: bool = False
    gated: bool = True
    gate_beside: bool = False
    fused: bool = False
    tied: bool = False
    output: bool = False
    by_kind: bool = False
    windows: int = 0
    unrotated: int = 0
    activations: tuple[str, ...] = ("silu",)
    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    scales_query: bool = True
    odd_depth: int = 0
    fields: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    only: tuple[tuple[str, Any], ...] = ()


LLAMA = Graph("llama", pairs=True)
DECI = Graph("deci", pairs=True, per_block=True, empty_attention=True)
QWEN2 = Graph("qwen2", filled=True)
QWEN3 = Graph("qwen3", head_norms=True)
OPENELM = Graph("openelm", per_block=True, head_norms=True, fused=True, tied=True, ropes=("default",))
_CAPS = (
    ("add_attn_logit_softcapping", "attn_logit_softcapping"),
    ("add_final_logit_softcapping", "final_logit_softcapping"),
)
GEMMA2 = Graph(
    "gemma2", windows=2, odd_depth=46, tied=True, ropes=("default",), fields=_CAPS, shifted=True, activations=SMALL_GELU
)
GEMMA3 = Graph(
    "gemma3", windows=6, odd_depth=62, head_norms=True, ropes=("default", "linear"), shifted=True,
    activations=SMALL_GELU, only=(("attn_logit_softcapping", None), ("final_logit_softcapping", None)),
)  # fmt: skip
GEMMA4 = Graph(
    "gemma4", per_block=True, by_kind=True, windows=6, head_norms=True, partial=True, scales_query=False,
    ropes=("default", "proportional"), activations=SMALL_GELU, options=(
        ("add_final_logit_softcapping", "final_logit_softcapping"), ("add_shared_kv_layers", "num_kv_shared_layers"),
        ("add_embedding_length_per_layer_input", "hidden_size_per_layer_input"),
    ),
)  # fmt: skip
OLMO2 = Graph("olmo2", filled=True, joint_norms=True, output=True, ropes=("default",))
GRANITE = Graph(
    "granite", pairs=True, scales_query=False, ropes=("default", "linear", "llama3"),
    fields=(
        ("add_attention_scale", "attention_multiplier"), ("add_embedding_scale", "embedding_multiplier"),
        ("add_residual_scale", "residual_multiplier"), ("add_logit_scale", "logits_scaling"),
    ),
)  # fmt: skip
SMOLLM3 = Graph("smollm3", pairs=True, unrotated=4, ropes=("default",))
_OLDER: dict[str, Any] = {"filled": True, "layer_norms": True, "gated": False, "ropes": ("default", "linear")}
STARCODER2 = Graph("starcoder2", biases=True, activations=SMALL_GELU, **_OLDER)
_GELU = ("gelu", *SMALL_GELU)  # of which llama.cpp computes the tanh's, where the published models have the other
_FUSED: dict[str, Any] = _OLDER | {"fused": True, "activations": _GELU}
GPT2 = Graph(
    "gpt2", biases=True, rotated=False, **_FUSED,
    only=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
)  # fmt: skip
STARCODER = Graph("starcoder", biases=True, rotated=False, **_FUSED)
_PARALLEL = (("add_parallel_residual", "use_parallel_residual"),)
GPTNEOX = Graph("gptneox", biases=True, partial=True, **_FUSED, fields=_PARALLEL)
FALCON = Graph("falcon", **_FUSED, only=(("parallel_attn", True),))
BLOOM = Graph(
    "bloom", biases=True, rotated=False, slopes=True, **_FUSED,
    only=(("apply_residual_connection_post_layernorm", False),),
)  # fmt: skip
MPT = Graph("mpt", rotated=False, slopes=True, **_FUSED, only=(("attn_config.softmax_scale", None),))
PHI2 = Graph("phi2", biases=True, partial=True, **_OLDER, activations=_GELU, only=(("qk_layernorm", False),))
STABLELM = Graph(
    "stablelm", filled=True, layer_norms=True, partial=True, ropes=("default",), fields=_PARALLEL,
    only=(("qk_layernorm", False),),
)  # fmt: skip
GEMMA = Graph("gemma", shifted=True, tied=True, ropes=("default",), activations=_GELU)
GLM4 = Graph("glm4", partial=True, gate_beside=True, ropes=("default",))
EXAONE4 = Graph("exaone4", head_norms=True)
OLMO3 = replace(OLMO2, windows=4)
COMMAND_R = Graph(
    "command-r", layer_norms=True, tied=True, ropes=("default",), fields=(("add_logit_scale", "logit_scale"),),
    only=(("use_qk_norm", False),),
)  # fmt: skip
NEMOTRON = Graph("nemotron", partial=True, shifted=True, **_OLDER, activations=("relu2",))
ARCEE = Graph("arcee", pairs=True, gated=False, activations=("relu2",), ropes=("default",))
COHERE2 = Graph(
    "cohere2", layer_norms=True, tied=True, windows=4, ropes=("default",), fields=(("add_logit_scale", "logit_scale"),)
)
HUNYUAN = Graph("hunyuan-dense", head_norms=True, ropes=("default",))
JAIS2 = Graph("jais2", biases=True, **_OLDER, activations=("relu2",))
NEIGHBOURS = replace(LLAMA, pairs=False), replace(DECI, pairs=False)  # for who rotates pairs in transformers too
# The graphs that can compute a family, the first that has room for its sizes is taken.
GRAPHS: dict[str, tuple[Graph, ...]] = {
    "arcee": (ARCEE,),
    "bloom": (BLOOM,),
    "cohere": (COMMAND_R,),
    "cohere2": (COHERE2,),
    "hunyuan_v1_dense": (HUNYUAN,),
    "jais2": (JAIS2,),
    "ernie4_5": NEIGHBOURS,
    "exaone4": (EXAONE4,),
    "falcon": (FALCON,),
    "gemma": (GEMMA,),
    "glm4": (GLM4,),
    "gpt2": (GPT2,),
    "gpt_bigcode": (STARCODER,),
    "gpt_neox": (GPTNEOX,),
    "helium": NEIGHBOURS,
    "internlm3": (LLAMA, DECI),
    "iquestcoder": (LLAMA, DECI),
    "llama": (LLAMA, DECI),
    "mpt": (MPT,),
    "nemotron": (NEMOTRON,),
    "olmo3": (OLMO3,),
    "phi": (PHI2,),
    "stablelm": (STABLELM,),
    "mistral": (LLAMA, DECI),
    "phi3": (LLAMA, DECI),
    "seed_oss": (LLAMA, DECI),
    "qwen2": (QWEN2, DECI),
    "qwen3": (QWEN3, OPENELM),
    "gemma2": (GEMMA2,),
    "gemma3_text": (GEMMA3,),
    "gemma4_text": (GEMMA4,),
    "gemma4_unified_text": (GEMMA4,),
    "granite": (GRANITE, DECI),
    "olmo2": (OLMO2,),
    "smollm3": (LLAMA, DECI, SMOLLM3),
    "starcoder2": (STARCODER2,),
}
