"""Which of llama.cpp's graphs computes a model, and with how much room for each block: a table, and its one reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from darwinlm.model.families import PRUNED, block_sizes_of, find_family, head_dim
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
        attention_norms, mlp_norms: what the norms before and after a unit are called.
        head_norms: the heads of query and key have norms.
        joint_norms: query and key have norms over all heads.
        shifted: norms multiply by their weight, where transformers multiplies by 1 + weight.
        layer_norms: norms take off the mean and have biases, and all projections have biases.
        gated: the MLP has a gate.
        fused: query, key and value are one tensor.
        tied: it has one embedding for input and output.
        output: it wants an output embedding, tied or not.
        windows: how many blocks lie from one with full attention to the next, where the file does not say; 0 without
            sliding windows.
        unrotated: how many blocks lie from one without rotary embedding to the next, 0 if all have it.
        scales_query: it scales attention by 1 / √head_dim and no other; else by what the file says.
        odd_depth: a model of so many blocks is taken for one whose attention scales by √(heads / hidden size).
        fields: methods of the writer, and the fields of the config that they write.
    """

    name: str
    per_block: bool = False
    empty_attention: bool = False
    filled: bool = False
    pairs: bool = False
    attention_norms: tuple[str, ...] = ("attn_norm",)
    mlp_norms: tuple[str, ...] = ("ffn_norm",)
    head_norms: bool = False
    joint_norms: bool = False
    shifted: bool = False
    layer_norms: bool = False
    gated: bool = True
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


LLAMA = Graph("llama", pairs=True)
DECI = Graph("deci", pairs=True, per_block=True, empty_attention=True)
QWEN2 = Graph("qwen2", filled=True)
QWEN3 = Graph("qwen3", head_norms=True)
OPENELM = Graph("openelm", per_block=True, head_norms=True, fused=True, tied=True, ropes=("default",))
_SANDWICH = {
    "attention_norms": ("attn_norm", "post_attention_norm"), "mlp_norms": ("ffn_norm", "post_ffw_norm"),
    "shifted": True, "activations": SMALL_GELU,
}  # fmt: skip
_CAPS = (
    ("add_attn_logit_softcapping", "attn_logit_softcapping"),
    ("add_final_logit_softcapping", "final_logit_softcapping"),
)
GEMMA2 = Graph("gemma2", windows=2, odd_depth=46, tied=True, ropes=("default",), fields=_CAPS, **_SANDWICH)
GEMMA3 = Graph("gemma3", windows=6, odd_depth=62, head_norms=True, ropes=("default", "linear"), **_SANDWICH)
OLMO2 = Graph(
    "olmo2", filled=True, joint_norms=True, output=True, ropes=("default",),
    attention_norms=("post_attention_norm",), mlp_norms=("post_ffw_norm",),
)  # fmt: skip
GRANITE = Graph(
    "granite", pairs=True, scales_query=False, ropes=("default", "linear", "llama3"),
    fields=(
        ("add_attention_scale", "attention_multiplier"), ("add_embedding_scale", "embedding_multiplier"),
        ("add_residual_scale", "residual_multiplier"), ("add_logit_scale", "logits_scaling"),
    ),
)  # fmt: skip
SMOLLM3 = Graph("smollm3", pairs=True, unrotated=4, ropes=("default",))
STARCODER2 = Graph(
    "starcoder2", filled=True, layer_norms=True, gated=False, activations=SMALL_GELU, ropes=("default", "linear")
)
# The graphs that can compute a family, the first that has room for its sizes is taken.
GRAPHS: dict[str, tuple[Graph, ...]] = {
    "llama": (LLAMA, DECI),
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
        """The settings of the rotary embedding in blocks of a type: `rope_type`, `rope_theta` and more."""
        rope = self.config.rope_parameters
        return rope if "rope_type" in rope else rope[kind]

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
        config, positions = self.config, self.config.max_position_embeddings
        window = getattr(config, "sliding_window", None) or positions
        if not graph.windows and "sliding_attention" in self.kinds and window < positions:
            raise refused(
                f"full attention over its {positions} positions", f"a sliding window of {window}",
                f"{USE_DIRECTORY}, or, for texts of that length, a copy whose config.json says "
                f"sliding_window null and max_position_embeddings {window}",
            )  # fmt: skip
        if graph.windows:
            self.period(graph)
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in graph.activations:
            raise refused(f"the activation {graph.activations[0]}", str(activation))
        for rope in (self.rope(), self.rope("sliding_attention")):
            if rope.get("partial_rotary_factor", 1.0) != 1.0:
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
            if not getattr(config, name):
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
            if rest or heads % readers:
                raise refused("heads that fill the hidden size", f"heads of {self.head_dim} in {readers} to a group")
            groups = heads // readers
            if any(block.key_value_heads > groups for block in self.sizes):
                raise refused("KV groups of one size", "groups that have lost single heads", "prune by KV groups")
        room = BlockSizes(readers * groups, groups, max(block.intermediate for block in self.sizes) or STUB_CHANNELS)
        alike = all((block.query_heads, block.key_value_heads) == (room.query_heads, groups) for block in self.sizes)
        if graph.joint_norms and not alike:
            raise refused("all heads in every block, for norms are taken over all", "an attention that has lost some")
        return (room,) * len(self.sizes)


def _size(block: BlockSizes) -> int:
    return block.query_heads + block.key_value_heads + block.intermediate
