"""The machines that a plan is for: this one's processors, or GPUs by name from a table of data sheets."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig

from darwinlm.commands.plan.rates import BlockRates, Rates, block_rates, measure_rates
from darwinlm.runtime.device import DTYPES, RESERVE, resolve_dtype
from darwinlm.search.memory import HEADROOM
from darwinlm.types import UsageError

TABLE = Path(__file__).parent / "devices.yaml"
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """What a plan is for.

    Attributes:
        count: the number of GPUs, each with a process of its own; 1 for processors.
        memory: bytes of each GPU, or of this machine where there is none.
        rates: of building a database, calibration in its own precision.
        blocks: of decoder blocks in the search's precision.
        dtype: the search's precision.
        bandwidth: bytes a second that a model's weights are read at.
        host_link, peer_link: bytes a second to a GPU from the host, and from the other GPUs.
        aside: the rates of the host's processors, on which models are judged that a GPU has no room for.
        aside_bandwidth: bytes a second of the host's memory.
    """

    name: str
    gpu: bool
    count: int
    memory: int
    rates: Rates
    blocks: BlockRates
    dtype: torch.dtype
    bandwidth: float
    host_link: float
    peer_link: float
    aside: BlockRates
    aside_bandwidth: float

    @property
    def limit(self) -> int:
        """Bytes that may be used, as `runtime.device.memory_limit` says: a GPU keeps a reserve for its libraries."""
        return self.memory - RESERVE if self.gpu else self.memory

    @property
    def usable(self) -> int:
        """Bytes of the limit that tensors can take, for an allocator wastes some."""
        return int(HEADROOM * self.limit)

    def __str__(self) -> str:
        return f"{self.count} x {self.name}" if self.count > 1 else self.name


@cache
def table() -> dict[str, dict[str, Any]]:
    """The devices by name, the shares of their rates that are reached, and the host's rates, as the file has them."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def machine_of(text: str, config: PretrainedConfig, calibration: str) -> Machine:
    """Return the machine that `--device` names: `h100:8`, or this one (`auto`, `cpu`), whose rates are measured.

    Args:
        calibration: the precision of calibration, by name.

    Raises:
        UsageError: if there is no such device in the table, or no such number of them.
    """
    if text in ("auto", "cpu"):
        return _this_machine(config, calibration)
    match = re.fullmatch(r"([a-z0-9-]+?)(?::(\d{1,4}))?", text.lower())
    count = int(match[2] or 1) if match else 0
    if match is None or match[1] not in table()["devices"] or not count:
        raise UsageError(
            f"--device: expected cpu or one of {', '.join(table()['devices'])}, several as h100:8, found {text!r}; "
            "give another value"
        )
    return gpus(match[1], count, DTYPES[calibration])


def gpus(name: str, count: int, calibration: torch.dtype = torch.float32) -> Machine:
    """Return a machine with GPUs of the table, at the shares of their rates that are reached."""
    sheet, reached, host = (table()["devices"][name], table()["reached"], table()["host"])
    bfloat16, float32, float64 = (TERA * sheet[kind] for kind in ("bfloat16", "float32", "float64"))
    products = reached["float32"] * float32
    rates = Rates(
        products=products,
        forward=reached["forward"] * bfloat16 if calibration == torch.bfloat16 else products,
        solves=products,
        inverses=reached["float64"] * float64,
        sweeps=math.inf,
        fills=reached["bandwidth"] * GIGA * sheet["bandwidth"],
        loads=GIGA * host["loads"],
        disk=GIGA * host["disk"],
        channel=host["channel"],
        block=host["block"],
    )
    return Machine(
        name=name,
        gpu=True,
        count=count,
        memory=int(GIGA * sheet["memory"]),
        rates=rates,
        blocks=BlockRates(reached["forward"] * bfloat16, reached["training"] * bfloat16),
        dtype=torch.bfloat16,
        bandwidth=rates.fills,
        host_link=reached["links"] * GIGA * sheet["host"],
        peer_link=reached["links"] * GIGA * sheet["peers"],
        aside=BlockRates(GIGA * host["products"], GIGA * host["products"]),
        aside_bandwidth=GIGA * host["memory"],
    )


def _this_machine(config: PretrainedConfig, calibration: str) -> Machine:
    """Return this machine's processors, with rates measured in a few seconds."""
    dtype = resolve_dtype("auto", torch.device("cpu"))
    rates, blocks = measure_rates(DTYPES[calibration]), block_rates(config, dtype)
    return Machine(
        name="this machine's processors",
        gpu=False,
        count=1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        rates=rates,
        blocks=blocks,
        dtype=dtype,
        bandwidth=rates.fills,
        host_link=math.inf,
        peer_link=math.inf,
        aside=blocks,
        aside_bandwidth=rates.fills,
    )
