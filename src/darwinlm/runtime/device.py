"""The device and the precision of computations, by the names that users give."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from darwinlm.runtime import parallel
from darwinlm.types import UsageError

RESERVE = 2 << 30  # bytes of a GPU for the driver, its libraries and their kernels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """The device of this name; `auto` is the GPU if there is one.

    Raises:
        UsageError: if there is no such device, or it is one GPU and several processes would share it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        device = torch.device("meta")
    # No such device, or torch's own `meta`, which computes nothing, or one that lacks float64.
    if device.type in ("meta", "mps"):
        raise UsageError(f"no device {name!r}: expected auto, cpu, or cuda on a machine that has it; check --device")
    if parallel.neighbours() > 1 and name.startswith("cuda:"):
        raise UsageError(
            f"--device {name}: expected cuda, of which each process takes its own, found one for all; give cuda"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of this name; `auto` is bfloat16 if the device is fast at it, else float32.

    All processes call this. Of a CPU the first one measures it, once: some have instructions for bfloat16 and multiply
    it half as fast.

    Raises:
        UsageError: if there is no such precision.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _is_fast_at_bfloat16() else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown precision {name!r}: expected auto, {' or '.join(DTYPES)}; check --dtype")
    return DTYPES[name]


@cache
def _is_fast_at_bfloat16() -> bool:
    """Whether the CPU of the first process multiplies in bfloat16 at least a quarter faster than in float32."""

    def fast() -> str:
        if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
            return "no"
        single, half = (product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
        return "yes" if 1.25 * half < single else "no"

    return parallel.from_first(fast) == "yes"


@torch.no_grad()
def product_seconds(dtype: torch.dtype) -> float:
    """The least of several times that a product like those of a model's linear modules takes."""
    states, weight = (torch.ones(512, 1024, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        began = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        times.append(time.perf_counter() - began)
    return min(times)


def memory_limit(device: torch.device, given: int | None = None) -> int | None:
    """The bytes of a device that may be used: those given, or what a GPU has but a reserve for its libraries."""
    if given is not None or device.type != "cuda":
        return given
    return _memory_of(device) - RESERVE


@contextmanager
def memory_held_to(limit: int | None, device: torch.device) -> Iterator[None]:
    """Let torch give back what it keeps of a GPU for later before it takes more than `limit` bytes of it."""
    if limit is None or device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / _memory_of(device)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def processor_name() -> str:
    """The processor's model name where Linux gives it, or else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep float32 matrix products at float32, whatever the process allows: no TF32 on a GPU, no bfloat16 on a CPU.

    TF32 keeps 10 bits of each factor. A Hessian that is summed or factorised so need not be positive definite any more,
    and other structures would leave than on a CPU. Convolutions, which have a setting of their own, are left alone.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    settings = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # torch 2.9 and newer
    before = [backend.fp32_precision for backend in settings]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say where both ways of setting it were used
        overall = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(overall)
        for backend, precision in zip(settings, before, strict=True):
            backend.fp32_precision = precision
