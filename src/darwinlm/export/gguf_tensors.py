"""The tensors of a GGUF file, made from those of a model directory as the graph of the file wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from darwinlm.export.gguf_graphs import Description
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import head_dim
from darwinlm.model.reading import read_parameter
from darwinlm.types import BlockSizes, DarwinError


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
    """A tensor of the file. Its shape is known beforehand, its values are made only when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def tensors(model: Description, weights: Weights) -> Iterator[Written]:
    """Every tensor of the file. Raises `DarwinError` if the directory lacks one that it is made from."""
    family, graph = model.family, model.graph
    embedding = f"{family.embedding}.weight"
    logits = 1.0 / model.multiplier("logits_scaling")
    yield _stored("token_embd.weight", weights, embedding, model.multiplier("embedding_multiplier"))
    yield from _norm("output_norm", model, weights, family.final_norm)
    if not model.config.tie_word_embeddings:
        yield _stored("output.weight", weights, f"{family.output_embedding}.weight", logits)
    elif graph.output or logits != 1.0 or model.multiplier("embedding_multiplier") != 1.0:
        yield _stored("output.weight", weights, embedding, logits)
    if model.rope()["rope_type"] == "llama3":
        yield Written("rope_freqs.weight", (model.head_dim // 2,), partial(_rope_factors, model.config))
    for index in range(len(model.sizes)):
        block = _Block(model, weights, index)
        yield from block.attention()
        yield from block.mlp()


@dataclass(frozen=True)
class _Rows:
    """The rows of a projection, or a part of them: `start` to `start + count` of what is stored under a path."""

    path: str
    start: int
    count: int


class _Block:
    """One block. Where it has less than the graph has room for, the rest are zeros, which add nothing."""

    def __init__(self, model: Description, weights: Weights, index: int):
        self.model, self.weights, self.index = model, weights, index
        self.graph, self.family = model.graph, model.family
        self.size, self.room = model.sizes[index], model.room[index]
        self.source, self.target = model.family.block(index), f"blk.{index}"

    def attention(self) -> Iterator[Written]:
        if not self.room.query_heads:
            return
        model, family, present = self.model, self.family, bool(self.size.query_heads)
        yield from self._norms(self.graph.attention_norms, family.attention_norms, present)
        inputs = self._inputs()
        if self.graph.fused:
            yield self._fused(inputs)
        else:
            for name, rows in inputs.items():
                yield from self._heads(name, rows)
        if self.graph.head_norms or self.graph.joint_norms:
            factor = model.query_factor if self.graph.head_norms else 1.0
            yield from self._head_norm("q_norm", present, factor)
            yield from self._head_norm("k_norm", present, 1.0)
        yield from self._output(
            "attn_output", family.attention_output, present, partial(_columns, size=self.size, room=self.room)
        )

    def mlp(self) -> Iterator[Written]:
        family, present = self.family, bool(self.size.intermediate)
        yield from self._norms(self.graph.mlp_norms, family.mlp_norms, present)
        names = ("ffn_gate", "ffn_up") if self.graph.gated else ("ffn_up",)
        count, room = self.size.intermediate, self.room.intermediate
        for place, (name, path) in enumerate(zip(names, family.mlp_inputs, strict=True)):
            start = place * count if path in family.mlp_inputs[:place] else 0
            rows = _Rows(f"{self.source}.{path}", start, count)
            yield from self._linear(name, rows, room, present, lambda part: _padded(part, room))
        yield from self._output("ffn_down", family.mlp_output, present, lambda part: _padded(part, room, axis=1))

    def _inputs(self) -> dict[str, _Rows]:
        """Where the rows of query, key and value lie. A norm over all heads is not where they come from."""
        family, width, starts = self.family, self.model.head_dim, dict[str, int]()
        result = {}
        for name, short, path, heads in (
            ("attn_q", "q_proj", family.query, self.size.query_heads),
            ("attn_k", "k_proj", family.key, self.size.key_value_heads),
            ("attn_v", "v_proj", family.value, self.size.key_value_heads),
        ):
            path = f"{family.attention}.{short}" if self.graph.joint_norms else path
            start = starts.get(path, 0)
            starts[path] = start + heads * width
            result[name] = _Rows(f"{self.source}.{path}", start, heads * width)
        return result

    def _heads(self, name: str, rows: _Rows) -> Iterator[Written]:
        size, room, query = self.size, self.room, name == "attn_q"
        heads = room.query_heads if query else room.key_value_heads
        permuted = self.graph.pairs and name != "attn_v"
        factor = self.model.query_factor if query and not self.graph.head_norms else 1.0

        def change(part: Tensor) -> Tensor:
            grown = _grown(part, size, room) if query else _padded(part, heads * self.model.head_dim)
            grown = grown if factor == 1.0 else grown.float() * factor
            return _permuted(grown, heads) if permuted else grown

        yield from self._linear(name, rows, heads * self.model.head_dim, bool(size.query_heads), change)

    def _linear(
        self, name: str, rows: _Rows, room: int, present: bool, change: Callable[[Tensor], Tensor]
    ) -> Iterator[Written]:
        """A projection into a unit: rows, which `change` brings to the number of the room, and their biases."""
        yield self._part(f"{name}.weight", rows, "weight", (room, self.model.config.hidden_size), present, change)
        if self._has_bias(rows.path):
            yield self._part(f"{name}.bias", rows, "bias", (room,), present, change)

    def _part(
        self, name: str, rows: _Rows, kind: str, shape: tuple[int, ...], present: bool,
        change: Callable[[Tensor], Tensor],
    ) -> Written:  # fmt: skip
        name, source = f"{self.target}.{name}", f"{rows.path}.{kind}"
        if not present or (source not in self.weights and kind == "bias"):
            return _constant(name, shape, 0.0)
        self.weights.shape(source)
        end = rows.start + rows.count
        return Written(name, shape, lambda: change(self.weights.read(source)[rows.start : end]))

    def _output(self, name: str, path: str, present: bool, change: Callable[[Tensor], Tensor]) -> Iterator[Written]:
        """The projection out of a unit, whose columns `change` brings to the number of the room."""
        hidden, source = self.model.config.hidden_size, f"{self.source}.{path}"
        factor = self.model.multiplier("residual_multiplier")
        width = self.room.query_heads * self.model.head_dim if name == "attn_output" else self.room.intermediate

        def scaled(part: Tensor) -> Tensor:
            return part if factor == 1.0 else part.float() * factor

        rows = _Rows(source, 0, hidden)
        yield self._part(f"{name}.weight", rows, "weight", (hidden, width), present, lambda part: scaled(change(part)))
        if self._has_bias(source):
            yield self._part(f"{name}.bias", rows, "bias", (hidden,), present, scaled)

    def _has_bias(self, path: str) -> bool:
        """Whether a projection has biases, of zeros where the graph wants them and the model has none."""
        return self.graph.layer_norms or f"{path}.bias" in self.weights

    def _fused(self, inputs: dict[str, _Rows]) -> Written:
        name, width, hidden = f"{self.target}.attn_qkv.weight", self.model.head_dim, self.model.config.hidden_size
        shape = ((self.room.query_heads + 2 * self.room.key_value_heads) * width, hidden)
        if not self.size.query_heads:
            return _constant(name, shape, 0.0)
        names = [f"{rows.path}.weight" for rows in inputs.values()]
        for source in names:
            self.weights.shape(source)
        return Written(name, shape, lambda: torch.cat([self.weights.read(source) for source in names]))

    def _norms(self, targets: Sequence[str], sources: Sequence[str], present: bool) -> Iterator[Written]:
        for target, source in zip(targets, sources, strict=True):
            yield from _norm(f"{self.target}.{target}", self.model, self.weights, f"{self.source}.{source}", present)

    def _head_norm(self, name: str, present: bool, factor: float) -> Iterator[Written]:
        path = f"{self.source}.{self.family.attention}.{name}"
        yield from _norm(f"{self.target}.attn_{name}", self.model, self.weights, path, present, factor)


def _norm(
    name: str, model: Description, weights: Weights, path: str, present: bool = True, factor: float = 1.0
) -> Iterator[Written]:
    """A norm, of ones where its block has lost what it is for: of heads that are not there, or a unit of zeros."""
    shift = 1.0 if model.graph.shifted else 0.0

    def made(source: str) -> Tensor:
        return (weights.read(source).float() + shift) * factor

    if not present:
        width = model.head_dim if name.endswith(("q_norm", "k_norm")) else model.config.hidden_size
        yield _constant(f"{name}.weight", (width,), 1.0)
    else:
        yield Written(f"{name}.weight", weights.shape(f"{path}.weight"), partial(made, f"{path}.weight"))
    if model.graph.layer_norms:
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


def _columns(part: Tensor, size: BlockSizes, room: BlockSizes) -> Tensor:
    """The columns of a projection `[hidden, heads · width]` that reads the heads, as `_grown` its rows."""
    return _grown(part.T, size, room).T


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
