"""Where to compute, and in which precision."""

from __future__ import annotations

import torch

from darwinlm.types import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises `UsageError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"no device {name!r}: expected auto, cpu, or cuda on a machine that has it") from None
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it faster than float32. Raises `UsageError` for an unknown name."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown precision {name!r}: expected auto, {' or '.join(DTYPES)}")
    return DTYPES[name]
