"""Which of llama.cpp's graphs computes a model, and with how much room for each block: a table, and its one reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from darwinlm.model.families import PRUNED, block_sizes_of, find_family, head_dim, modules_around
from darwinlm.model.reading import skeleton
from darwinlm.types import BlockSizes, UsageError

STUB_CHANNELS = 32  # of an MLP of zeros, where a block has none: llama.cpp computes wrong logits without one
USE_DIRECTORY = "use the Hugging Face directory"
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
        windows: how many blocks lie from one with full attention to the next, where the file does not say; 0 without
            sliding windows.
        unrotated: how many blocks lie from one without rotary embedding to the next, 0 if all have it.
        scales_query: it scales attention by 1 / √head_dim and no other; else by what the file says.
        odd_depth: a model of so many blocks is taken for one whose attention scales by √(heads / hidden size).
        fields: methods of the writer, and the fields of the config that they write.
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
    windows: int = 0
    unrotated: int = 0
    activations: tuple[str, ...] = ("silu",)
    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    scales_query: bool = True
    odd_depth: int = 0
    fields: tuple[tuple[str, str], ...] = ()
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
    activations=SMALL_GELU,
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
    "granite": (GRANITE, DECI),
    "olmo2": (OLMO2,),
    "smollm3": (LLAMA, DECI, SMOLLM3),
    "starcoder2": (STARCODER2,),
}


class GraphError(UsageError):
    """llama.cpp has a graph that does not compute this model."""


def refused(expected: str, found: str, cure: str = USE_DIRECTORY) -> GraphError:
    """The error that says why llama.cpp does not compute a model."""
    return GraphError(f"llama.cpp cannot run this model: expected {expected}, found {found}; {cure}")


class Description:
    """What a GGUF file says of a model, which precedes its weights.

    Attributes:
        sizes: what each block has.
        room: what the graph computes of each block; what the block does not have of it are zeros.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config: Any = config
        self.name = config.model_type.removeprefix(PRUNED)
        if self.name not in GRAPHS:
            found = f"{self.name}, of which no tensors can be written yet"
            raise refused(f"a model of one of the families {', '.join(GRAPHS)}", found)
        model = skeleton(config)
        self.family = find_family(model)
        self.around = modules_around(model, self.family)
        self.sizes: Sequence[BlockSizes] = block_sizes_of(model)
        self.head_dim = head_dim(config)
        self.graph, self.room = self._choose()

    def _choose(self) -> tuple[Graph, Sequence[BlockSizes]]:
        """The first graph without zeros, else the first one; what the first one lacks is raised where none is left."""
        found: list[tuple[int, Graph, Sequence[BlockSizes]]] = []
        reasons: list[GraphError] = []
        for graph in GRAPHS[self.name]:
            try:
                self._check(graph)
                room = self._room(graph)
            except GraphError as error:
                reasons.append(error)
                continue
            found.append((0 if graph.per_block else sum(map(_size, room)) - sum(map(_size, self.sizes)), graph, room))
        if not found:
            raise reasons[0]
        return min(found, key=lambda each: each[0])[1:]

    @property
    def zeros(self) -> int:
        """How many heads and channels of the room hold zeros alone."""
        return sum(map(_size, self.room)) - sum(map(_size, self.sizes))

    def rope(self, kind: str = "full_attention") -> dict[str, Any]:
        """The settings of the rotary embedding in blocks of a type: `rope_type`, `rope_theta` and more, if any."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        return rope.get(kind, rope)

    @property
    def positions(self) -> int:
        """How many positions the model has; where scores have slopes, there is no end."""
        names = ("max_position_embeddings", "max_seq_len", "seq_length")
        return next((getattr(self.config, name) for name in names if hasattr(self.config, name)), 2048)

    @property
    def clip(self) -> float | None:
        """The largest query, key and value, None if there is no end."""
        return getattr(getattr(self.config, "attn_config", None), "clip_qkv", None)

    @property
    def epsilon(self) -> float:
        """What norms add to the variance."""
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        return next(getattr(self.config, name) for name in names if hasattr(self.config, name))

    @property
    def kinds(self) -> list[str]:
        """The type of every block: `full_attention` or `sliding_attention`."""
        kind = "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"
        return list(getattr(self.config, "layer_types", None) or [kind] * len(self.sizes))

    def period(self, graph: Graph) -> int:
        """Every how many blocks attention is full, as `graph` understands it. Raises `GraphError` if it does not."""
        used = [(i, kind) for i, kind in enumerate(self.kinds) if self.sizes[i].query_heads]
        for period in (graph.windows, *range(1, len(self.sizes) + 2)):
            if all((kind == "sliding_attention") == bool((i + 1) % period) for i, kind in used):
                return period
        raise refused("every so many blocks one with full attention", "no such order of sliding windows")

    @property
    def query_factor(self) -> float:
        """By what queries are multiplied so that the graph, which scales by 1 / √head_dim, scales as the model does."""
        if not self.graph.scales_query:
            return 1.0
        config, width = self.config, self.head_dim
        scale = getattr(config, "attention_multiplier", None)  # Granite
        if getattr(config, "query_pre_attn_scalar", None):  # Gemma
            scale = config.query_pre_attn_scalar**-0.5
        if len(self.sizes) == self.graph.odd_depth:
            width = config.hidden_size / self.room[0].query_heads
        return 1.0 if scale is None else scale * width**0.5

    def multiplier(self, name: str) -> float:
        """A field of the config that multiplies something, 1 where there is none or where the graph does it."""
        known = {field for _, field in self.graph.fields}
        return 1.0 if name in known else float(getattr(self.config, name, None) or 1.0)

    def _check(self, graph: Graph) -> None:
        """Raise `GraphError` with the reason if a graph does not compute this model."""
        config, positions = self.config, self.positions
        window = getattr(config, "sliding_window", None) or positions
        if not graph.windows and "sliding_attention" in self.kinds and window < positions:
            raise refused(
                f"full attention over its {positions} positions", f"a sliding window of {window}",
                f"{USE_DIRECTORY}, or, for texts of that length, a copy whose config.json says "
                f"sliding_window null and max_position_embeddings {window}",
            )  # fmt: skip
        if graph.windows:
            self.period(graph)
        names = ("hidden_activation", "hidden_act", "activation_function", "activation")
        activation = next(filter(None, (getattr(config, name, None) for name in names)), graph.activations[0])
        if activation not in graph.activations:
            raise refused(f"the activation {graph.activations[0]}", str(activation))
        for name, value in graph.only:
            owner, _, field = name.rpartition(".")
            found = getattr(getattr(config, owner) if owner else config, field, value)
            if found != value:
                raise refused(f"{name} {value}", str(found))
        if bool(self.family.biases) != graph.slopes:
            raise refused(*(("a slope of each head", "none") if graph.slopes else ("heads without slopes", "slopes")))
        for rope in (self.rope(), self.rope("sliding_attention")) if graph.rotated else ():
            if rope.get("partial_rotary_factor", 1.0) != 1.0 and not graph.partial:
                raise refused("rotary embedding of whole heads", "of a part")
            if rope["rope_type"] not in graph.ropes:
                kinds = " or ".join(filter(None, [", ".join(graph.ropes[:-1]), graph.ropes[-1]]))
                raise refused(f"{kinds} rotary embedding", f"rope_type {rope['rope_type']}")
        rotated = getattr(config, "no_rope_layers", None) or [1] * len(self.sizes)
        expected = [int(not graph.unrotated or (i + 1) % graph.unrotated != 0) for i in range(len(self.sizes))]
        if any(a != b for a, b, block in zip(rotated, expected, self.sizes, strict=True) if block.query_heads):
            wanted = f"every {graph.unrotated}th block alone" if graph.unrotated else "no block"
            raise refused(f"{wanted} without rotary embedding", f"no_rope_layers {rotated}")
        if graph.tied and not config.tie_word_embeddings:
            raise refused(
                f"tied embeddings in {graph.name}",
                "an output embedding of its own",
                f"{USE_DIRECTORY}, or a genome whose blocks are all alike",
            )
        for _, name in graph.fields:
            if getattr(config, name) in (None, 0.0) and getattr(config, name) is not False:
                raise refused(f"a number as {name}", str(getattr(config, name)))
        if graph.name == GEMMA3.name and (config.attn_logit_softcapping or config.final_logit_softcapping):
            raise refused("logits without a cap in Gemma 3", "one")
        for index, block in enumerate(self.sizes):
            if block.query_heads and block.query_heads % block.key_value_heads:
                heads = f"{block.query_heads} for {block.key_value_heads} in block {index}"
                raise refused("as many query heads for every KV head", heads, "prune by KV groups")
        if not self.sizes[0].query_heads:
            raise refused("attention in the first block", "none", "choose a genome that keeps it")

    def _room(self, graph: Graph) -> Sequence[BlockSizes]:
        stub = (0, 0) if graph.empty_attention else (1, 1)
        if graph.per_block:
            return tuple(
                BlockSizes(
                    block.query_heads or stub[0], block.key_value_heads or stub[1], block.intermediate or STUB_CHANNELS
                )
                for block in self.sizes
            )
        readers = max(block.query_heads // block.key_value_heads for block in self.sizes if block.query_heads)
        groups = max(block.key_value_heads for block in self.sizes)
        if graph.filled:
            heads, rest = divmod(self.config.hidden_size, self.head_dim)
            if rest or readers > heads:
                raise refused("heads that fill the hidden size", f"heads of {self.head_dim} in {readers} to a group")
            readers = heads if groups == 1 else next(n for n in range(readers, heads + 1) if heads % n == 0)
            groups = heads // readers
            if any(block.key_value_heads > groups for block in self.sizes):
                raise refused("KV groups of one size", "groups that have lost single heads", "prune by KV groups")
        whole = self.config.model_type.startswith(PRUNED)  # whose norms over all heads see those of before
        if graph.joint_norms and not whole and self.sizes[0].query_heads != readers * groups:
            raise refused("norms over heads that fill the hidden size", f"over {self.sizes[0].query_heads} heads")
        room = BlockSizes(readers * groups, groups, max(block.intermediate for block in self.sizes) or STUB_CHANNELS)
        return (room,) * len(self.sizes)


def _size(block: BlockSizes) -> int:
    return block.query_heads + block.key_value_heads + block.intermediate
