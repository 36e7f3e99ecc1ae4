"""Where the modules of a family are, by what each is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Fused = Literal["in order", "by head", "gated by head"]
"""Rows of query, key and value, or of gate and input, one after another; or of head after head; or, of head after head,
a query and the gate of what is attended to."""


@dataclass(frozen=True)
class Surroundings:
    """What a decoder has around its blocks, by paths in the model.

    Attributes:
        returns_more: whether blocks return a tuple, of which the hidden states are the first.
        given: the arguments of blocks that depend on what the tokens are, and not on their number alone.
        lookups: the embeddings that are looked up by token, beside that of the stream.
    """

    backbone: str
    embedding: str
    blocks: str
    final_norm: str
    output_embedding: str
    returns_more: bool
    given: frozenset[str]
    lookups: tuple[str, ...]

    def block(self, index: int) -> str:
        """The path of the decoder block with this index."""
        return f"{self.blocks}.{index}"


@dataclass(frozen=True)
class Family(Surroundings):
    """The module paths of a family. Paths of a unit's modules are relative to its decoder block.

    A module that is named by two consecutive fields is a fused projection: its output holds the rows of the first
    field, then those of the second. Where `query` or `key` names a norm, that norm is taken over all heads at once and
    must see all of them: its projection stays whole, and only the outputs of the norm are selected.

    Attributes:
        by_head: whether the fused projection of query, key and value holds the rows of one KV group after another.
        attention_norms, mlp_norms: the norms before and after the unit, which are removed together with it.
        projections: of query, key and value, which differ from `query` and `key` where those are norms.
        head_norms: the norms of query and key, empty if there are none.
        shared_norms: the norms before the attention that the MLP reads too.
        query_counts, key_value_counts: where the attention's methods read its numbers of heads from attributes, these:
            of the module, or of its config (`config.NAME`).
        query_widths: and these, where they read the width of all query heads.
        gate: the projection of the gates of what heads attend to, empty if there is none. It can be that of the query.
        biases: the arguments of the attention that hold something for each query head, such as slopes by position.
        attention_adds: whether the attention adds its second argument, the stream, to what it gives.
        mlp: the module of the MLP, empty if its linear modules lie in the block itself.
        mixer: what mixes tokens in the blocks without attention, or beside it: linear attention, a short convolution or
            a state-space layer. It is empty if the family has none.
        mixer_output: the linear module that gives its output.
        values_of_keys: the blocks whose values come from the projection of the keys, for they have none of their own.
        remains: whether a block without units still computes, for it scales the stream, or adds what it is given.
    """

    attention: str
    query: str
    key: str
    value: str
    gate: str
    by_head: bool
    attention_output: str
    attention_norms: tuple[str, ...]
    projections: tuple[str, ...]
    head_norms: tuple[str, ...]
    shared_norms: tuple[str, ...]
    query_counts: tuple[str, ...]
    key_value_counts: tuple[str, ...]
    query_widths: tuple[str, ...]
    biases: tuple[str, ...]
    attention_adds: bool
    mlp: str
    mlp_inputs: tuple[str, ...]
    mlp_output: str
    mlp_norms: tuple[str, ...]
    mixer: str = ""
    mixer_output: str = ""
    mixer_norms: tuple[str, ...] = ()
    values_of_keys: tuple[int, ...] = field(default=(), compare=False)
    remains: bool = False
