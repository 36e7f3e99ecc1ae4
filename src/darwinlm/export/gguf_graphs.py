"""Which of llama.cpp's graphs computes a model, and with how much room for each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from darwinlm.export.gguf_architectures import GRAPHS, Graph
from darwinlm.model.families import block_sizes_of, find_family, lookups, modules_around
from darwinlm.model.layers import family_of, head_dim, is_pruned, shares
from darwinlm.model.reading import skeleton
from darwinlm.types import BlockSizes, UsageError

STUB_CHANNELS = 32  # of an MLP of zeros, where a block has none: llama.cpp computes wrong logits without one
USE_DIRECTORY = "use the Hugging Face directory"


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
        self.name = family_of(config)
        if self.name not in GRAPHS:
            found = f"{self.name}, of which no tensors can be written yet"
            raise refused(f"a model of one of the families {', '.join(GRAPHS)}", found)
        model = skeleton(config)
        self.family = find_family(model)
        self.around = [*lookups(self.family)[1:], *modules_around(model, self.family)]
        self.sizes: Sequence[BlockSizes] = block_sizes_of(model)
        self.widths = {"": head_dim(config, 0)}  # of a head, by the type of a block that has attention
        for index, kind in enumerate(self.kinds):
            if self.sizes[index].query_heads or kind not in self.widths:
                self.widths[kind] = head_dim(config, index)
        self.head_dim = self.widths.get("full_attention", self.widths[""])
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

    def width(self, index: int) -> int:
        """The width of a head of a block."""
        return self.widths[self.kinds[index]]

    def reads(self, index: int) -> bool:
        """Whether a block reads the keys and values of another."""
        return shares(self.config, index, "reuse")

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
        if graph.windows and not graph.by_kind:
            self.period(graph)
        if graph.by_kind:
            self._check_kinds()
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
        if graph.by_kind and self.rope("sliding_attention")["rope_type"] != "default":
            raise refused("plain rotary embedding under windows", self.rope("sliding_attention")["rope_type"])
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
        for index, block in enumerate(self.sizes):
            if block.query_heads and block.query_heads % block.key_value_heads:
                heads = f"{block.query_heads} for {block.key_value_heads} in block {index}"
                raise refused("as many query heads for every KV head", heads, "prune by KV groups")
        if not self.sizes[0].query_heads:
            raise refused("attention in the first block", "none", "choose a genome that keeps it")

    def _check_kinds(self) -> None:
        """Raise `GraphError` unless blocks read keys and values of the last two before them, one of each type."""
        stores = [index for index in range(len(self.sizes)) if shares(self.config, index, "store")]
        last = stores[-1] + 1 if stores else 2
        found = [self.kinds[index] for index in stores]
        if stores and (stores != [last - 2, last - 1] or found != ["sliding_attention", "full_attention"]):
            raise refused(
                "keys and values shared by a block with a window, and by one with full attention behind it",
                f"them in blocks {', '.join(map(str, stores))}",
            )
        if getattr(self.config, "use_bidirectional_attention", None) == "all":
            raise refused("attention to what was before", "attention to both sides")

    def _stub(self, graph: Graph, index: int) -> tuple[int, int]:
        """The heads of zeros of a block without attention: as many KV heads as are in the cache that it reads."""
        if graph.empty_attention:
            return 0, 0
        if not self.reads(index):
            return 1, 1
        stores = range(len(self.sizes))
        count = next(
            self.sizes[i].key_value_heads
            for i in stores
            if shares(self.config, i, "store") and self.kinds[i] == self.kinds[index]
        )
        return count, count

    def _room(self, graph: Graph) -> Sequence[BlockSizes]:
        if graph.per_block:
            heads = [
                (block.query_heads, block.key_value_heads) if block.query_heads else self._stub(graph, index)
                for index, block in enumerate(self.sizes)
            ]
            channels = (block.intermediate or STUB_CHANNELS for block in self.sizes)
            return tuple(BlockSizes(*each, width) for each, width in zip(heads, channels, strict=True))
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
        whole = is_pruned(self.config)  # whose norms over all heads see those of before
        if graph.joint_norms and not whole and self.sizes[0].query_heads != readers * groups:
            raise refused("norms over heads that fill the hidden size", f"over {self.sizes[0].query_heads} heads")
        room = BlockSizes(readers * groups, groups, max(block.intermediate for block in self.sizes) or STUB_CHANNELS)
        return (room,) * len(self.sizes)


def _size(block: BlockSizes) -> int:
    return block.query_heads + block.key_value_heads + block.intermediate
