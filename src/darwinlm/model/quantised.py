"""Quantised checkpoints, whose weights are made floats again: what they stand for, not what they were made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darwinlm.model.families import find_family
from darwinlm.model.reading import read_config, skeleton
from darwinlm.model.rewriting import write_model
from darwinlm.model.shards import FLOATS, Header, read_headers, read_tensor
from darwinlm.runtime.files import new_directory, read_json
from darwinlm.runtime.progress import say
from darwinlm.types import DarwinError, UsageError

Parts = Mapping[str, Tensor]  # the tensors of a module by the ends of their names
Settings = Mapping[str, Any]
# Scales of activations and of a cache, which weights do not need.
UNUSED = ("input_scale", "activation_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale")
CONFIGS = ("quantization_config", "compression_config")
# What the codes of floats of 4 bits stand for: a sign, two bits of exponent, one of mantissa.
E2M1 = [sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight columns lies in a word
CURE = "name the model that it was quantised from"


def is_quantised(directory: Path) -> bool:
    """Whether the config of a model directory, if it has one, says that its weights are quantised."""
    file = directory / "config.json"
    fields = read_json(file) if file.is_file() else None
    return isinstance(fields, dict) and any(fields.get(name) for name in CONFIGS)


def dequantise(directory: Path, out: Path) -> None:
    """Write a quantised model as one of plain floats, of the precision that its config names, to the new `out`.

    Raises:
        UsageError: if weights are quantised in a way that is not known here, or its family cannot be pruned.
        DarwinError: if a part of a weight is missing, or a file is damaged.
    """
    fields, config = read_json(directory / "config.json", "model_type"), read_config(directory)
    settings = next(filter(None, [fields.pop(name, None) for name in CONFIGS]))
    method = str(settings.get("quant_method", "unnamed"))
    config.quantization_config = None
    find_family(skeleton(config))
    make = _method(directory, method, settings)
    named = str(fields.get("dtype") or fields.get("torch_dtype")).removeprefix("torch.")
    dtype = getattr(torch, named) if named in ("float16", "bfloat16", "float32") else torch.bfloat16
    headers = read_headers(directory)
    modules = _modules(headers)
    say(f"{directory.name}: {len(modules)} weights are dequantised ({method}) to {str(dtype).removeprefix('torch.')}")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        taken = {name for names in modules.values() for name in names.values()}
        for name, header in headers.items():
            if name not in taken and name.rpartition(".")[2] not in UNUSED:
                yield name, read_tensor(directory, header.file, name)
        for module, names in modules.items():
            parts = {part: read_tensor(directory, headers[name].file, name) for part, name in names.items()}
            try:
                weight = make(parts)
            except (KeyError, RuntimeError, ValueError, IndexError, ArithmeticError) as error:
                raise DarwinError(
                    f"{module} in {directory} cannot be dequantised ({error}): expected the parts of {method}, found "
                    f"{', '.join(sorted(parts))}; fetch the model again, or {CURE}"
                ) from None
            yield f"{module}.weight", weight.to(dtype)

    with new_directory(out) as partial_directory:
        write_model(partial_directory, fields | {"dtype": str(dtype).removeprefix("torch.")}, tensors(), [directory])


def _method(directory: Path, method: str, settings: Settings) -> Callable[[Parts], Tensor]:
    """How a weight is made from its parts. Raises `UsageError` if that is not known."""
    known = {"fp8": _scaled, "fbgemm_fp8": _scaled, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}
    wrong = None
    if method not in known:
        wrong = f"quant_method {method}"
    elif method in ("gptq", "awq") and settings.get("bits") not in ((2, 4, 8) if method == "gptq" else (4,)):
        wrong = f"{method} of {settings.get('bits')} bits"
    elif method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        wrong = f"awq of version {settings['version']}"
    elif settings.get("transform_config"):
        wrong = "rotated weights (transform_config)"
    if wrong:
        raise UsageError(f"{directory} is quantised: expected {', '.join(known)}, found {wrong}; {CURE}")
    return partial(known[method], settings)


def _modules(headers: Mapping[str, Header]) -> dict[str, dict[str, str]]:
    """The quantised modules, and the names of their tensors by what they end in."""
    found: dict[str, dict[str, str]] = {}
    for name in headers:
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = name
    kept = ("bias", *UNUSED)
    return {
        module: {part: name for part, name in parts.items() if part not in kept}
        for module, parts in found.items()
        if any(re.fullmatch("qweight|weight_.*", part) for part in parts)
        or ("weight" in parts and headers[parts["weight"]].precision not in FLOATS)
    }


def _scaled(settings: Settings, parts: Parts) -> Tensor:
    """Small numbers times a scale for each of a grid of blocks, `[rows of blocks, columns of blocks]`, or for all."""
    if parts["weight"].dtype not in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        raise ValueError(f"a weight of {parts['weight'].dtype}")
    weight, scale = parts["weight"].float(), _scale(parts)
    if "weight_zero_point" in parts:
        weight = weight - _spread(parts["weight_zero_point"].float(), weight.shape, settings)
    return weight * _spread(scale, weight.shape, settings)


def _scale(parts: Parts) -> Tensor:
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _spread(scale: Tensor, shape: torch.Size, settings: Settings) -> Tensor:
    """A grid of scales as one for each weight. The last blocks of a row or column of blocks may be smaller."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    scale = scale[:, None] if scale.dim() == 1 else scale
    for axis, block in enumerate(_block(settings)):
        size, blocks = shape[axis], scale.shape[axis]
        block = block if block and -(-size // block) == blocks else size // blocks
        if -(-size // block) != blocks:
            raise ValueError(f"{blocks} scales for {size} rows or columns")
        scale = scale.repeat_interleave(block, axis).narrow(axis, 0, size)
    return scale


def _block(settings: Settings) -> tuple[int | None, int | None]:
    """The rows and columns that share a scale, where a config names them."""
    groups = (settings.get("config_groups") or {}).values()
    named = [(group.get("weights") or {}).get("block_structure") for group in groups]
    block = settings.get("weight_block_size") or next(filter(None, named), None)
    rows, columns = block if isinstance(block, list) else (None, None)
    return rows, columns


def _compressed(settings: Settings, parts: Parts) -> Tensor:
    """A weight of the package compressed-tensors: small numbers, or words that hold several of 4 or 8 bits each."""
    if "weight_packed" not in parts:
        return _scaled(settings, parts)
    if parts["weight_packed"].dtype == torch.uint8:
        return _floats_of_4_bits(parts)
    rows, columns = parts["weight_shape"].tolist()
    packed, scale = parts["weight_packed"], parts["weight_scale"].float()
    bits = next(bits for bits in (4, 8) if packed.shape[1] == -(-columns * bits // 32))
    middle = 1 << (bits - 1)
    weight = (_unpacked(packed, bits)[:rows, :columns] - middle).float()
    zero = torch.zeros_like(scale)
    if "weight_zero_point" in parts:
        zero = (_unpacked(parts["weight_zero_point"].T, bits).T[:rows] - middle).float()
    size = -(-columns // scale.shape[1])
    group = torch.arange(columns) // size
    order = parts.get("weight_g_idx")
    group = group if order is None or (order < 0).any() else order.long()
    return (weight - zero[:, group]) * scale[:, group]


def _floats_of_4_bits(parts: Parts) -> Tensor:
    """MXFP4 and NVFP4: two floats a byte, the first one in its low bits, and a scale for each 32 or 16 of a row.

    The scales of NVFP4 are themselves stored larger than they are, all by one factor.
    """
    packed = parts["weight_packed"]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()
    scale = _scale(parts) / parts.get("weight_global_scale", torch.ones(1)).float()
    return torch.tensor(E2M1)[codes] * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


def _gptq(settings: Settings, parts: Parts) -> Tensor:
    """`qweight` holds several input channels a word, `qzeros` several outputs; scales are `[groups, out]`."""
    bits, scales = settings["bits"], parts["scales"].float()
    weight = _unpacked(parts["qweight"].T, bits).T  # [in, out]
    zeros = _unpacked(parts["qzeros"], bits)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1 & (1 << bits) - 1  # what is stored is one less
    group = torch.arange(len(weight)) // -(-len(weight) // len(scales))
    group = parts["g_idx"].long() if "g_idx" in parts else group
    return ((weight - zeros[group]).float() * scales[group]).T


def _awq(settings: Settings, parts: Parts) -> Tensor:
    """Words hold eight outputs each, in an order of their own; all is `[in or groups, out]`."""
    scales = parts["scales"].float()
    weight, zeros = (_unpacked(parts[name], 4).unflatten(1, (-1, 8)) for name in ("qweight", "qzeros"))
    weight, zeros = (words[..., list(AWQ_ORDER)].flatten(1) for words in (weight, zeros))
    group = torch.arange(len(weight)) // -(-len(weight) // len(scales))
    return ((weight - zeros[group]).float() * scales[group]).T


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The numbers that 32-bit words `[rows, words]` hold, lowest bits first: `[rows, 32 / bits · words]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None].int() >> shifts & (1 << bits) - 1).flatten(1)
