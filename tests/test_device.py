"""The precision that `auto` means on a CPU: what is measured decides, not what the processor says that it can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runs
from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import Run
from darwinlm.commands.work import open_work
from darwinlm.runtime import device
from darwinlm.runtime.device import resolve_dtype


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was measured before does not count, and what is measured here does not later."""
    device._is_fast_at_bfloat16.cache_clear()
    yield
    device._is_fast_at_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "half", "expected"),
    [
        (True, 0.4, torch.bfloat16),
        (True, 0.9, torch.float32),  # too little to lose precision for
        (True, 1.8, torch.float32),  # a Xeon without AMX does that
        (False, 0.4, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_products_are_faster(
    instructions: bool, half: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(device, "product_seconds", lambda dtype: half if dtype == torch.bfloat16 else 1.0)
    assert resolve_dtype("auto", torch.device("cpu")) == expected


def test_products_are_timed_once_and_in_no_time() -> None:
    first = resolve_dtype("auto", torch.device("cpu"))
    assert device._is_fast_at_bfloat16.cache_info().currsize == 1
    assert resolve_dtype("auto", torch.device("cpu")) == first
    assert 0 < device.product_seconds(torch.float32) < 5


@pytest.mark.parametrize("fast", [True, False])
def test_a_search_keeps_the_precision_in_which_it_began(
    fast: bool, checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(runs.short(checkpoints["llama-mha"], text, tmp_path / "run"), dtype="auto", device="cpu")
    monkeypatch.setattr(device, "_is_fast_at_bfloat16", lambda: fast)
    this = run(config, until="search")
    monkeypatch.setattr(device, "_is_fast_at_bfloat16", lambda: not fast)
    began = torch.bfloat16 if fast else torch.float32
    assert open_work(Run(this.path), config, "search").dtype == began
    assert this.begun_in == str(began).removeprefix("torch.")
