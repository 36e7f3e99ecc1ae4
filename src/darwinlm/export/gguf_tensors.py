"""The tensors of a GGUF file, made from those of a model directory as the graph of the file wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gguf
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from darwinlm.export.gguf_graphs import USE_DIRECTORY, Description
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import HEADS, head_dim
from darwinlm.model.reading import read_parameter
from darwinlm.types import BlockSizes, DarwinError

ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
INPUTS = ("attn_q", "attn_k", "attn_v")
# What blocks have beside their units: a number for the stream, and what they compute of an embedding of each token.
GIVEN = (
    "layer_scalar", "per_layer_input_gate.weight", "per_layer_projection.weight", "post_per_layer_input_norm.weight"
)  # fmt: skip
UNROTATED = 1e30  # the factor of rows that are not rotated


class Weights:
    """The tensors of a model directory, each of which is read only when it is used."""

    def __init__(self, checkpoint: Checkpoint):
        self.directory, self.headers = checkpoint.path, checkpoint.headers

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it. Raises `DarwinError` if it is missing."""
        if name not in self.headers:
            raise DarwinError(f"expected a tensor {name}, found none; the directory is incomplete, export it again")
        return self.headers[name].shape

    def read(self, name: str) -> Tensor:
        """Read a tensor, in the precision in which it is stored."""
        return read_parameter(self.directory, self.headers[name])


@dataclass(frozen=True)
class Written:
    """A tensor of the file. Its shape is known beforehand, its values are made only when it is written.

    Attributes:
        source: the path of the linear module whose weights these are, or the first of several.
        others: the further ones, which read the same inputs.
        columns: what was done to its columns, and is done to figures of them, `[1, columns]`.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    source: str = ""
    columns: Callable[[Tensor], Tensor] | None = None
    others: tuple[str, ...] = ()


def tensors(model: Description, weights: Weights) -> Iterator[Written]:
    """Every tensor of the file. Raises `DarwinError` if the directory lacks one that it is made from."""
    family, graph = model.family, model.graph
    embedding = f"{family.embedding}.weight"
    logits = 1.0 / model.multiplier("logits_scaling")
    yield _stored("token_embd.weight", weights, embedding, model.multiplier("embedding_multiplier"))
    for path in model.around:
        if f"{path}.bias" in weights:
            yield from _norm(_named(model, path), model, weights, path)
        else:
            yield _stored(f"{_named(model, path)}.weight", weights, f"{path}.weight")
    yield from _norm("output_norm", model, weights, family.final_norm)
    bias = f"{family.output_embedding}.bias"
    if bias in weights:
        yield _stored("output.bias", weights, bias)
    if not model.config.tie_word_embeddings:
        output = _stored("output.weight", weights, f"{family.output_embedding}.weight", logits)
        yield replace(output, source=family.output_embedding)
    elif graph.output or logits != 1.0 or model.multiplier("embedding_multiplier") != 1.0:
        yield _stored("output.weight", weights, embedding, logits)
    if model.rope().get("rope_type") == "llama3":
        yield Written("rope_freqs.weight", (model.head_dim // 2,), partial(_rope_factors, model.config))
    elif model.graph.by_kind:
        yield Written("rope_freqs.weight", (model.head_dim // 2,), partial(_rope_part, model))
    for index in range(len(model.sizes)):
        block = _Block(model, weights, index)
        yield from block.attention()
        yield from block.mlp()
        yield from block.rest()


@dataclass(frozen=True)
class _Rows:
    """The rows of a projection, or the part of them that `take` gives of what is stored under a path."""

    path: str
    take: Callable[[Tensor], Tensor]


class _Block:
    """One block. Where it has less than the graph has room for, the rest are zeros, which add nothing."""

    def __init__(self, model: Description, weights: Weights, index: int):
        self.model, self.weights, self.index = model, weights, index
        self.graph, self.family = model.graph, model.family
        self.size, self.room = model.sizes[index], model.room[index]
        self.source, self.target = model.family.block(index), f"blk.{index}"
        self.width = model.width(index)

    def attention(self) -> Iterator[Written]:
        if not self.room.query_heads:
            return
        model, family, present = self.model, self.family, bool(self.size.query_heads)
        yield from self._norms(family.attention_norms, present)
        yield from self._norms(family.shared_norms, True)
        inputs = self._inputs()
        if self.graph.fused:
            yield from self._fused(inputs)
        else:
            for name, rows in inputs.items():
                yield from self._heads(name, rows)
        if self.graph.head_norms or self.graph.joint_norms:
            factor = model.query_factor if self.graph.head_norms else 1.0
            norms = family.head_norms[: len(inputs)]
            for name, path, scale in zip(INPUTS, norms, (factor, 1.0), strict=False):
                yield from self._head_norm(name, path, present, scale)
        yield from self._output(
            "attn_output", family.attention_output, present, lambda part: self._spread(part.T, query=True).T
        )

    def mlp(self) -> Iterator[Written]:
        family, present = self.family, bool(self.size.intermediate)
        yield from self._norms(family.mlp_norms, present)
        names = ("ffn_gate", "ffn_up") if self.graph.gated else ("ffn_up",)
        count, room = self.size.intermediate, self.room.intermediate
        beside = self.graph.gate_beside
        for place, (name, path) in enumerate(zip(names, family.mlp_inputs, strict=True)):
            first = place if path in family.mlp_inputs[:place] else 0
            rows = _Rows(f"{self.source}.{path}", partial(_slice, start=first * count, count=count))
            if not beside:
                yield from self._linear(name, rows, room, present, lambda part: _padded(part, room))
        if beside:
            whole = _Rows(f"{self.source}.{family.mlp_inputs[0]}", lambda stored: stored)
            both = lambda part: torch.cat([_padded(half, room) for half in part.chunk(2)])  # noqa: E731
            yield from self._linear("ffn_up", whole, 2 * room, present, both)
        yield from self._output("ffn_down", family.mlp_output, present, lambda part: _padded(part, room, axis=1))

    def rest(self) -> Iterator[Written]:
        """What the block has beside its units, which stays as it is."""
        if not self.graph.by_kind:
            return
        for name in GIVEN:
            source = f"{self.source}.{name}"
            if source in self.weights:
                target = _named(self.model, source.removesuffix(".weight"))
                yield _stored(f"{target}.weight", self.weights, source)

    def _inputs(self) -> dict[str, _Rows]:
        """Where the rows of query, key and value lie."""
        family, size, starts = self.family, self.size, dict[str, int]()
        result = {}
        counts = [size.query_heads, size.key_value_heads, size.key_value_heads]
        own = 1 if self.model.reads(self.index) else 2 if self.index in family.values_of_keys else 3
        for number, (path, heads) in enumerate(zip(family.projections[:own], counts, strict=False)):
            start = starts.get(path, 0)
            starts[path] = start + heads * self.width
            take = partial(_slice, start=start, count=heads * self.width)
            if self.graph.joint_norms and number < 2:  # norms over all heads need all of them
                take = _whole
            if family.by_head:
                take = partial(_of_groups, number=number, groups=size.key_value_heads, width=self.width)
            result[INPUTS[number]] = _Rows(f"{self.source}.{path}", take)
        return result

    def _spread(self, part: Tensor, query: bool) -> Tensor:
        """Rows of heads `[heads * width, ...]`, with zeros for the heads that the block lacks."""
        places = self._places(query)
        total = self.room.query_heads if query else self.room.key_value_heads
        if places is not None:
            rows = part.unflatten(0, (len(places), -1))
            return rows.new_zeros(total, *rows.shape[1:]).index_copy(0, places, rows).flatten(0, 1)
        return _grown(part, self.size, self.room) if query else _padded(part, total * self.width)

    def _places(self, query: bool) -> Tensor | None:
        """Which of the room's heads the block has, where that matters."""
        family, width = self.family, self.width
        if self.graph.slopes:
            name, width = f"{self.source}.{family.attention}.{HEADS}.index", 1
        elif self.graph.joint_norms:
            name = f"{self.source}.{family.head_norms[0 if query else 1]}.index"
        else:
            return None
        return self.weights.read(name)[::width] // width if name in self.weights else None

    def _heads(self, name: str, rows: _Rows) -> Iterator[Written]:
        room = self._room_of(name)
        yield from self._linear(name, rows, room, bool(self.size.query_heads), self._change(name))

    def _room_of(self, name: str) -> int:
        """How many rows the graph has of query, key or value."""
        heads = self.room.query_heads if name == INPUTS[0] else self.room.key_value_heads
        return heads * self.width

    def _change(self, name: str) -> Callable[[Tensor], Tensor]:
        """What makes the graph's rows from those of query, key or value."""
        query, joint = name == INPUTS[0], self.graph.joint_norms and name != INPUTS[2]
        permuted = self.graph.pairs and name != INPUTS[2]
        factor = self.model.query_factor if query and not self.graph.head_norms else 1.0

        def change(part: Tensor) -> Tensor:
            grown = part if joint else self._spread(part, query)
            grown = grown if factor == 1.0 else grown.float() * factor
            heads = self.room.query_heads if query else self.room.key_value_heads
            return _permuted(grown, heads) if permuted else grown

        return change

    def _linear(
        self, name: str, rows: _Rows, room: int, present: bool, change: Callable[[Tensor], Tensor]
    ) -> Iterator[Written]:
        """A projection into a unit: rows, which `change` brings to the number of the room, and their biases."""
        yield self._part(f"{name}.weight", rows, "weight", (room, self.model.config.hidden_size), present, change)
        if self._has_bias(rows.path):
            yield self._part(f"{name}.bias", rows, "bias", (room,), present, change)

    def _part(
        self, name: str, rows: _Rows, kind: str, shape: tuple[int, ...], present: bool,
        change: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor] | None = None,
    ) -> Written:  # fmt: skip
        name, source = f"{self.target}.{name}", f"{rows.path}.{kind}"
        if not present or (source not in self.weights and kind == "bias"):
            return _constant(name, shape, 0.0)
        self.weights.shape(source)
        path = rows.path if kind == "weight" else ""
        return Written(name, shape, lambda: change(rows.take(self.weights.read(source))), path, columns)

    def _output(self, name: str, path: str, present: bool, change: Callable[[Tensor], Tensor]) -> Iterator[Written]:
        """The projection out of a unit, whose columns `change` brings to the number of the room."""
        hidden, source = self.model.config.hidden_size, f"{self.source}.{path}"
        factor = self.model.multiplier("residual_multiplier")
        width = self.room.query_heads * self.width if name == "attn_output" else self.room.intermediate

        def scaled(part: Tensor) -> Tensor:
            return part if factor == 1.0 else part.float() * factor

        rows = _Rows(source, _whole)
        made = lambda part: scaled(change(part))  # noqa: E731
        yield self._part(f"{name}.weight", rows, "weight", (hidden, width), present, made, columns=change)
        if self._has_bias(source):
            yield self._part(f"{name}.bias", rows, "bias", (hidden,), present, scaled)

    def _has_bias(self, path: str) -> bool:
        """Whether a projection has biases, of zeros where the graph wants them and the model has none."""
        return self.graph.biases or f"{path}.bias" in self.weights

    def _fused(self, inputs: dict[str, _Rows]) -> Iterator[Written]:
        parts = {name: [*self._heads(name, rows)] for name, rows in inputs.items()}
        for each in zip(*parts.values(), strict=True):  # the weights, and the biases if there are some
            name = each[0].name.replace(INPUTS[0], "attn_qkv")
            shape = (sum(part.shape[0] for part in each), *each[0].shape[1:])
            first, *others = dict.fromkeys(part.source for part in each)
            yield Written(name, shape, partial(_joined, each), first, others=tuple(others))

    def _norms(self, sources: Sequence[str], present: bool) -> Iterator[Written]:
        for source in sources:
            path = f"{self.source}.{source}"
            yield from _norm(_named(self.model, path), self.model, self.weights, path, present)

    def _head_norm(self, name: str, source: str, present: bool, factor: float) -> Iterator[Written]:
        """The norm of the heads of query or key, or over all of them."""
        width = self._room_of(name) if self.graph.joint_norms else self.width
        path = f"{self.source}.{source}"
        if f"{path}.module.weight" in self.weights:  # of which an export selects outputs
            path = f"{path}.module"
        yield from _norm(f"{self.target}.{name}_norm", self.model, self.weights, path, present, factor, width)


def _norm(
    name: str,
    model: Description,
    weights: Weights,
    path: str,
    present: bool = True,
    factor: float = 1.0,
    width: int | None = None,
) -> Iterator[Written]:
    """A norm, of ones where its block has lost what it is for: of heads that are not there, or a unit of zeros."""
    shift = 1.0 if model.graph.shifted else 0.0

    def made(source: str) -> Tensor:
        return (weights.read(source).float() + shift) * factor

    if not present:
        yield _constant(f"{name}.weight", (width or model.config.hidden_size,), 1.0)
    else:
        yield Written(f"{name}.weight", weights.shape(f"{path}.weight"), partial(made, f"{path}.weight"))
    if model.graph.layer_norms and (model.graph.biases or f"{model.family.final_norm}.bias" in weights):
        there = present and f"{path}.bias" in weights
        shape = (model.config.hidden_size,)
        yield _stored(f"{name}.bias", weights, f"{path}.bias") if there else _constant(f"{name}.bias", shape, 0.0)


def _stored(name: str, weights: Weights, source: str, factor: float = 1.0) -> Written:
    shape = weights.shape(source)
    if factor == 1.0:
        return Written(name, shape, partial(weights.read, source))
    return Written(name, shape, lambda: weights.read(source).float() * factor)


def _constant(name: str, shape: tuple[int, ...], value: float) -> Written:
    return Written(name, shape, partial(torch.full, shape, value))


def _padded(part: Tensor, count: int, axis: int = 0) -> Tensor:
    """A tensor with zeros after its last row or column."""
    missing = count - part.shape[axis]
    return part if not missing else pad(part, (0, 0) * (part.dim() - 1 - axis) + (0, missing))


def _grown(part: Tensor, size: BlockSizes, room: BlockSizes) -> Tensor:
    """The rows of query heads `[heads · width, ...]`, with zeros for the heads that KV groups lack, and for groups."""
    if (size.query_heads, size.key_value_heads) == (room.query_heads, room.key_value_heads):
        return part
    rows = part.unflatten(0, (size.key_value_heads, size.query_heads // size.key_value_heads, -1))
    readers = room.query_heads // room.key_value_heads
    return _padded(_padded(rows, readers, axis=1), room.key_value_heads).flatten(0, 2)


def _whole(stored: Tensor) -> Tensor:
    return stored


def _slice(stored: Tensor, start: int, count: int) -> Tensor:
    return stored[start : start + count]


def _of_groups(stored: Tensor, number: int, groups: int, width: int) -> Tensor:
    """The rows of query, key or value, 0 to 2, of a projection that has those of one KV group after another."""
    parts = stored.unflatten(0, (groups, -1, width))
    return (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])[number].flatten(0, 2)


def _joined(parts: Sequence[Written]) -> Tensor:
    return torch.cat([part.make() for part in parts])


def _named(model: Description, path: str) -> str:
    """What llama.cpp calls a module of transformers. Raises `DarwinError` if it has no such one."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[model.graph.name], len(model.sizes))
    found = names.get_name(path) or names.get_name(path.partition(".")[2])
    if found is None:
        raise DarwinError(f"expected a place for {path} in {model.graph.name}, found none; {USE_DIRECTORY}")
    return found


def _permuted(tensor: Tensor, heads: int) -> Tensor:
    """Return rows in the order in which llama.cpp rotates them: 0, d/2, 1, d/2 + 1 and so on of each head."""
    rows, *rest = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(rows, *rest)


def _rope_factors(config: Any) -> Tensor:
    """Return the factors by which llama.cpp divides the rotary frequencies, `[head_dim / 2]`."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    dimension = head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dimension, 2, dtype=torch.float64) / dimension)
    return (plain / scaled.double()).float()


def _rope_part(model: Description) -> Tensor:
    """Return the factors, `[head_dim / 2]`, by which a part of a head is rotated."""
    rotated = int(model.rope().get("partial_rotary_factor", 1.0) * model.head_dim // 2)
    return torch.cat([torch.ones(rotated), torch.full((model.head_dim // 2 - rotated,), UNROTATED)])
