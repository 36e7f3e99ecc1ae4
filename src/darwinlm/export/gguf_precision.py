"""The precision of every tensor of a GGUF file: the mixes of llama.cpp, and what takes their place in narrow rows."""

from __future__ import annotations

import re
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType as Precision

BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Mix:
    """A type of file.

    Attributes:
        most: the precision of most matrices.
        more: that of values and down projections in some blocks, of which llama.cpp takes the first and last eighth and
            every third between.
        fused: that of query, key and value in one.
        output: that of the output embedding, also where the input embedding serves as one.
    """

    most: Precision
    more: Precision | None = None
    fused: Precision | None = None
    output: Precision | None = None

    def of(self, name: str, blocks: int, tied: bool) -> Precision:
        """The precision that a matrix should have.

        Args:
            name: as the file has it.
            blocks: their number in the model.
            tied: whether the file has no output embedding of its own.
        """
        if name == OUTPUT or (name == EMBEDDING and tied):
            return self.output or self.most
        block = BLOCK.fullmatch(name)
        if block is None:
            return self.most if name == EMBEDDING else Precision.F16 if self.output else self.most
        if block[2] == "attn_qkv":
            return self.fused or self.most
        favoured = block[2] in ("attn_v", "ffn_down") and _has_more_bits(int(block[1]), blocks)
        return self.more if favoured and self.more is not None else self.most


def _has_more_bits(block: int, blocks: int) -> bool:
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


MIXES = {
    "f32": Mix(Precision.F32),
    "f16": Mix(Precision.F16),
    "bf16": Mix(Precision.BF16),
    "q8_0": Mix(Precision.Q8_0),
    "q6_k": Mix(Precision.Q6_K, output=Precision.Q6_K),
    "q5_k_m": Mix(Precision.Q5_K, more=Precision.Q6_K, fused=Precision.Q6_K, output=Precision.Q6_K),
    "q4_k_m": Mix(Precision.Q4_K, more=Precision.Q6_K, fused=Precision.Q5_K, output=Precision.Q6_K),
    "q4_0": Mix(Precision.Q4_0, output=Precision.Q6_K),
}
QUANTISED = ("q6_k", "q5_k_m", "q4_k_m", "q4_0")  # types that libgguf makes


# What llama.cpp takes where rows are no multiple of 256, and then where they are none of 32.
NARROWER = {Precision.Q4_K: Precision.Q5_0, Precision.Q5_K: Precision.Q5_1, Precision.Q6_K: Precision.Q8_0}


def bytes_of(precision: Precision, width: int) -> float:
    """Bytes of an element of a matrix that should have a precision, in rows of `width` elements."""
    elements, size = gguf.GGML_QUANT_SIZES[fitting(precision, width)]
    return size / elements


def fitting(precision: Precision, width: int) -> Precision:
    """The precision, or the one that takes its place in rows of `width` elements."""
    for choice in (precision, NARROWER.get(precision, Precision.F16)):
        if width % gguf.GGML_QUANT_SIZES[choice][0] == 0:
            return choice
    return Precision.F16
