"""Weights as others quantise and store them, number by number: what `darwinlm.model.quantised` has to undo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GROUP = 16  # input channels that share a scale


def fp8_blocks(weight: Tensor, block: int = 24) -> tuple[dict[str, Tensor], Tensor]:
    """As DeepSeek and Qwen store it: blocks of numbers of 8 bits, and a scale of each. The last blocks are smaller."""
    rows, columns = weight.shape
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block), -(-columns // block))
    meant = torch.empty(rows, columns)
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            part = weight[top : top + block, left : left + block]
            scale = part.abs().max() / 448
            place = (slice(top, top + block), slice(left, left + block))
            stored[place] = (part / scale).to(torch.float8_e4m3fn)
            scales[top // block, left // block] = scale
            meant[place] = stored[place].float() * scale
    return {"weight": stored, "weight_scale_inv": scales}, meant


def fp8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As FBGEMM and compressed-tensors store it: a scale of each row."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.ones(1)}, stored.float() * scale


def fp8_whole(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As Mistral stores it: one scale."""
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale, "activation_scale": torch.ones(())}, stored.float() * scale


def int8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors stores 8 bits: a scale of each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def gptq(
    weight: Tensor, bits: int = 4, group_of: Sequence[int] | None = None, first: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """As GPTQ stores it, with a zero point of its own for each group.

    Args:
        group_of: the group of each input channel, where they were sorted by activation.
        first: what is taken from a zero point before it is stored, nothing in version 2.
    """
    outputs, inputs = weight.shape
    groups = list(group_of) if group_of is not None else [channel // GROUP for channel in range(inputs)]
    values, zeros, scales, meant = _affine(weight, groups, (1 << bits) - 1)
    per = 32 // bits
    words = np.zeros((inputs // per, outputs), np.uint32)
    for channel in range(inputs):
        words[channel // per] |= values[:, channel] << np.uint32(channel % per * bits)
    stored = np.zeros((len(zeros[0]), outputs // per), np.uint32)
    for output in range(outputs):
        stored[:, output // per] |= (zeros[output] - first & (1 << bits) - 1) << np.uint32(output % per * bits)
    parts = {"qweight": _words(words), "qzeros": _words(stored), "scales": scales.T.contiguous().half()}
    return parts | {"g_idx": torch.tensor(groups, dtype=torch.int32)}, meant


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As AWQ stores 4 bits: eight outputs a word, the even ones before the odd ones."""
    outputs, inputs = weight.shape
    values, zeros, scales, meant = _affine(weight, [channel // GROUP for channel in range(inputs)], 15)
    packed = {}
    for name, numbers in (("qweight", values), ("qzeros", zeros)):
        words = np.zeros((numbers.shape[1], outputs // 8), np.uint32)
        for word in range(outputs // 8):
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, word] |= numbers[8 * word + column] << np.uint32(4 * place)
        packed[name] = _words(words)
    return packed | {"scales": scales.T.contiguous().half()}, meant


def packed(weight: Tensor, bits: int = 4, symmetric: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors packs it: several input channels a word, zero points several outputs."""
    outputs, inputs = weight.shape
    middle = 1 << bits - 1
    values, zeros, scales, meant = _affine(
        weight, [channel // GROUP for channel in range(inputs)], 2 * middle - 1, middle if symmetric else None
    )
    per = 32 // bits
    words = np.zeros((outputs, -(-inputs // per)), np.uint32)
    for channel in range(inputs):
        words[:, channel // per] |= values[:, channel] << np.uint32(channel % per * bits)
    parts = {"weight_packed": _words(words), "weight_scale": scales.half(), "weight_shape": torch.tensor(weight.shape)}
    if not symmetric:
        stored = np.zeros((-(-outputs // per), zeros.shape[1]), np.uint32)
        for output in range(outputs):
            stored[output // per] |= zeros[output] << np.uint32(output % per * bits)
        parts["weight_zero_point"] = _words(stored)
    return parts, meant


def mxfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors stores MXFP4: a power of two for each 32 input channels."""
    scale = torch.exp2(torch.floor(torch.log2(weight.unflatten(1, (-1, 32)).abs().amax(2))) - 2)
    packed, meant = _fp4(weight, scale)
    exponents = (scale.log2() + 127).to(torch.uint8)
    return {"weight_packed": packed, "weight_scale": exponents}, meant


def nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors stores NVFP4: a number of 8 bits for each 16 channels, all of which one factor enlarged."""
    factor = 448 * 6 / weight.abs().max()
    stored = (weight.unflatten(1, (-1, 16)).abs().amax(2) / 6 * factor).to(torch.float8_e4m3fn)
    packed, meant = _fp4(weight, stored.float() / factor)
    return {"weight_packed": packed, "weight_scale": stored, "weight_global_scale": factor.reshape(1)}, meant


def _fp4(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest floats of 4 bits, two a byte, and what they mean."""
    known = {code: (-1) ** (code >> 3) * value for code, value in enumerate([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2)}
    meant, codes = torch.empty(weight.shape), np.zeros(weight.shape, np.uint8)
    group = weight.shape[1] // scales.shape[1]
    for row, column in np.ndindex(*weight.shape):
        scale = float(scales[row, column // group])
        code = min(known, key=lambda code: abs(known[code] * scale - float(weight[row, column])))
        codes[row, column], meant[row, column] = code, known[code] * scale
    return torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4), meant


def _affine(
    weight: Tensor, groups: list[int], most: int, zero: int | None = None
) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Whole numbers from 0 to `most`, zero points, scales in float16, and what all of them mean."""
    outputs, inputs = weight.shape
    values = np.zeros((outputs, inputs), np.uint32)
    zeros = np.zeros((outputs, max(groups) + 1), np.uint32)
    scales, meant = torch.zeros(zeros.shape), torch.zeros(outputs, inputs)
    for output in range(outputs):
        for group in set(groups):
            chosen = [channel for channel in range(inputs) if groups[channel] == group]
            row = weight[output, chosen]
            scale = ((row.max() - row.min()) / most).half().float()
            point = zero if zero is not None else int((-row.min() / scale).round().clamp(0, most))
            stored = (row / scale + point).round().clamp(0, most)
            values[output, chosen] = stored.numpy()
            zeros[output, group], scales[output, group] = point, scale
            meant[output, chosen] = (stored - point) * scale
    return values, zeros, scales, meant


def _words(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.view(np.int32).copy())
