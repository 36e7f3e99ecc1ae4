"""How fast this machine is, measured on a few seconds of the work that a plan prices."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig

from darwinlm.database import eliminate
from darwinlm.database.cholesky import dampen
from darwinlm.genome import Grid, level_grid
from darwinlm.model.checkpoint import is_finite
from darwinlm.model.families import find_family, lookups, modules_around
from darwinlm.model.reading import skeleton
from darwinlm.model.shards import WEIGHTS
from darwinlm.runtime.scratch import scratch_directory
from darwinlm.types import Unit


@dataclass(frozen=True)
class BlockRates:
    """Operations a second of a decoder block: forwards alone, and in training, forwards and backwards."""

    forward: float
    training: float


FLOAT = 4  # bytes of float32, in which statistics and elimination are
SMALLEST_PRODUCT = 192  # rows and columns
LONG_ENOUGH = 0.2  # seconds of a product, to be timed by


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second.

    Attributes:
        products: floating-point operations of large float32 matrix products.
        forward: the same in the precision of the forward pass.
        solves: floating-point operations of the level solves.
        inverses: floating-point operations of Hessians' factors and inverses.
        sweeps: matrix entries passed over between two products of an elimination of channels.
        fills: bytes of fresh memory that are written, as by every operation between two products.
        loads: bytes of stored weights that are read, checked and converted.
        disk: bytes written.
        channel, block: seconds, not a rate, in which a GPU waits for its host at every removal of a structure of one
            column, and of one of several.
    """

    products: float
    forward: float
    solves: float
    inverses: float
    sweeps: float
    fills: float
    loads: float
    disk: float
    channel: float = 0.0
    block: float = 0.0


def columns(unit: Unit) -> int:
    """Return the input columns of a unit's consumer."""
    return unit.structures * unit.structure_width


def elimination_operations(unit: Unit, d_out: int) -> int:
    """Return the operations of an elimination: the inverse, `W^T W`, and three symmetric updates for each column."""
    d = columns(unit)
    return 2 * d**3 + d_out * d**2


def solve_operations(grid: Grid, index: int, d_out: int) -> int:
    """Return the operations of a unit's level solves: one Cholesky factor, and for each level a product and a solve."""
    unit, d = grid.units[index], columns(grid.units[index])
    kept = [(unit.structures - removed) * unit.structure_width for removed in grid.removed[index][1:-1]]
    return d**3 // 3 + sum(d_out * (2 * k * (d - k) + k * k) for k in kept)


def measure_rates(dtype: torch.dtype = torch.float32, size: int = 3072) -> Rates:
    """Measure this machine's rates on a small matrix, in a few seconds of the real work."""
    products = _product_rate(torch.float32, size)
    forward = products if dtype == torch.float32 else _product_rate(dtype, size)
    d_out = size // 3
    unit = Unit("plan", 0, "mlp", "", (), 1, size, 0, 0)
    grid = level_grid((unit,), 10, 1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, size, generator=generator)
    inputs = torch.randn(2 * size, size, generator=generator)
    hessian = dampen(inputs.T @ inputs / size)
    start = time.perf_counter()
    elimination = eliminate.eliminate(unit, weight, hessian)
    swept = time.perf_counter() - start - elimination_operations(unit, d_out) / products
    solving = _seconds(lambda: eliminate.solve_levels(unit, weight, hessian, elimination, grid.removed[0]))
    return Rates(
        products=products,
        forward=forward,
        solves=solve_operations(grid, 0, d_out) / solving,
        inverses=products,
        sweeps=size**2 / max(swept, 1e-3),
        fills=_fill_rate(),
        loads=_load_rate(dtype),
        disk=_disk_rate(),
    )


def block_rates(config: PretrainedConfig, dtype: torch.dtype, length: int = 512, sequences: int = 4) -> BlockRates:
    """Measure a model's first block, for search and training run such blocks. Weights that train are float32."""
    decoder, weights = _first_block(config, dtype)
    tokens = torch.zeros(sequences, length, dtype=torch.long)
    operations = 2 * sum(weight.numel() for weight in weights) * length
    with torch.inference_mode():
        forward = sequences * operations / _seconds(lambda: decoder(input_ids=tokens, use_cache=False))
    decoder, weights = _first_block(config, torch.float32)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = decoder(input_ids=tokens[:1], use_cache=False).last_hidden_state
        states.backward(torch.ones_like(states))
        for weight in weights:
            weight.grad = None

    return BlockRates(forward, 3 * operations / _seconds(step))


def _first_block(config: PretrainedConfig, dtype: torch.dtype) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a decoder of one block and the last norm, which knows one token, and the block's weights."""
    model = skeleton(config, dtype)
    family = find_family(model)
    blocks: Any = model.get_submodule(family.blocks)
    del blocks[1:]
    for path in (family.blocks, family.final_norm, *modules_around(model, family)):
        module = model.get_submodule(path)
        module.to_empty(device="cpu")
        for weight in module.parameters():
            nn.init.constant_(weight, 1 / config.hidden_size)  # what memory holds may be no numbers, which are slow
    for path in lookups(family):
        embedding: Any = model.get_submodule(path)
        embedding.weight = nn.Parameter(torch.ones(1, embedding.weight.shape[1], dtype=dtype))
        embedding.padding_idx = None
    return model.get_decoder(), list(blocks.parameters())


def _product_rate(dtype: torch.dtype, size: int) -> float:
    """Return the operations a second of a square product, of a smaller one where such products take long.

    Without instructions for it, bfloat16 is far slower than float32, and the whole size would take minutes.
    """
    side = min(size, SMALLEST_PRODUCT)
    while True:
        matrix = torch.randn(side, side).to(dtype)
        seconds = _seconds(lambda matrix=matrix: matrix @ matrix)
        if side == size or seconds > LONG_ENOUGH:
            return 2 * side**3 / seconds
        side = min(size, 2 * side)


def _fill_rate(count: int = 1 << 25) -> float:
    numbers = torch.ones(count)
    return numbers.nbytes / _seconds(lambda: numbers * 2)


def _load_rate(dtype: torch.dtype, count: int = 1 << 26) -> float:
    weight = torch.ones(count, dtype=torch.bfloat16)
    with scratch_directory("plan") as directory:
        file = Path(directory) / WEIGHTS
        save_file({"weight": weight}, file)

        def load() -> torch.Tensor:
            with safe_open(file, framework="pt") as opened:
                tensor = opened.get_tensor("weight")
            assert is_finite(tensor)
            return tensor.to(dtype)

        return weight.nbytes / _seconds(load)


def _disk_rate(count: int = 1 << 28) -> float:
    with tempfile.NamedTemporaryFile() as file:
        content = os.urandom(1 << 20) * (count >> 20)
        return count / _seconds(lambda: (file.write(content), file.flush()))


def _seconds(work: Callable[[], object]) -> float:
    """Return the shorter of two timings; the first one warms up."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
