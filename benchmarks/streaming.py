"""The database of two blocks of a large model, streamed from bfloat16 shards, beside what `darwinlm plan` expects.

python benchmarks/streaming.py [llama-2-7b] [qwen2.5-14b] [--tokens 4096]

Weights and tokens are random, so the models say nothing; sizes, seconds and bytes are those of the real shapes.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
from database import memory
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from darwinlm.commands.plan.rates import measure_rates
from darwinlm.commands.plan.work import plan
from darwinlm.config.run import CalibrationConfig, DatabaseConfig
from darwinlm.database.calibrate import calibrate
from darwinlm.database.store import Database, add_unit
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_units
from darwinlm.runtime.device import DTYPES
from darwinlm.runtime.progress import quiet_transformers
from darwinlm.types import Structure

Precision = Literal["float32", "bfloat16"]
BLOCKS = 2
FULL_TOKENS = 131_072  # what `compress` calibrates on by default
SHAPES: dict[str, tuple[PreTrainedConfig, Structure]] = {
    "llama-2-7b": (
        LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32, vocab_size=32000
        ),
        "kv_group",
    ),
    "qwen2.5-14b": (
        Qwen2Config(
            hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=8,
            num_hidden_layers=48, vocab_size=152064, use_sliding_window=False, layer_types=["full_attention"] * 48,
        ),
        "head",
    ),
}  # fmt: skip


def first_blocks(shape: str) -> PreTrainedConfig:
    """The config of the shape's first blocks."""
    config = copy.copy(SHAPES[shape][0])
    config.num_hidden_layers = BLOCKS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:BLOCKS]
    config.dtype = torch.bfloat16
    return config


def write_blocks(path: Path, shape: str) -> None:
    """A random checkpoint of those blocks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(first_blocks(shape), dtype=torch.bfloat16)
    with quiet_transformers():
        model.save_pretrained(path, max_shard_size="500MB")


def expect(shape: str, tokens: int, dtype: Precision) -> dict[str, float]:
    """What `darwinlm plan` says of these blocks."""
    settings = CalibrationConfig(tokens=tokens, dtype=dtype), DatabaseConfig(structure=SHAPES[shape][1])
    found = plan(first_blocks(shape), *settings, 5.0, measure_rates(DTYPES[dtype]))
    return {
        "calibration": found.calibration_seconds,
        "elimination": found.elimination_seconds,
        "memory": found.memory_bytes / 1e9,
        "disk": found.disk_bytes / 1e9,
    }


def measure(path: Path, shape: str, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds, peak memory above the interpreter with torch, and bytes of the database of the checkpoint's blocks."""
    before = memory("VmRSS")
    checkpoint, config = Checkpoint(path), DatabaseConfig(structure=SHAPES[shape][1])
    units = find_units(checkpoint.skeleton(), checkpoint.config, config.structure)
    grid = level_grid(units, config.levels, config.granularity)
    token_ids = torch.randint(32000, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    database = Database(path / "database", grid, {})
    calibration = elimination = 0.0
    start = time.monotonic()
    for statistics in calibrate(
        checkpoint, token_ids, batch_size=8, device=torch.device("cpu"), units=units, dtype=dtype
    ):
        calibrated = time.monotonic()
        calibration += calibrated - start
        add_unit(database, statistics, config, checkpoint.dtype)
        start = time.monotonic()
        elimination += start - calibrated
        print(
            f"  {statistics.unit.name}: {start - calibrated:.1f} s, peak {memory('VmHWM') - before:.2f} GB",
            file=sys.stderr,
        )
    stored = sum(file.stat().st_size for file in (path / "database").iterdir()) / 1e9
    return {
        "calibration": calibration,
        "elimination": elimination,
        "memory": memory("VmHWM") - before,
        "disk": stored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measured = measure(
            Path(arguments.child), arguments.shapes[0], arguments.tokens, getattr(torch, arguments.dtype)
        )
        print(json.dumps(measured))
        return
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as directory:
            write_blocks(Path(directory), shape)
            # A process of its own: making the checkpoint must not count.
            command = [sys.executable, __file__, shape, "--tokens", str(arguments.tokens), "--dtype", arguments.dtype]
            answer = subprocess.run([*command, "--child", directory], check=True, stdout=subprocess.PIPE, text=True)
        measured, expected = json.loads(answer.stdout), expect(shape, arguments.tokens, arguments.dtype)
        print(f"{shape}, {BLOCKS} blocks, {arguments.tokens:,} tokens, {arguments.dtype} forward")
        for name, unit in (("calibration", "s"), ("elimination", "s"), ("memory", "GB"), ("disk", "GB")):
            ratio = expected[name] / measured[name]
            print(f"  {name:12} {measured[name]:7.2f} {unit:2}  planned {expected[name]:7.2f} {unit:2}  {ratio:.2f}")
        share = SHAPES[shape][0].num_hidden_layers / BLOCKS
        calibration = measured["calibration"] * share * FULL_TOKENS / arguments.tokens
        elimination = measured["elimination"] * share
        print(
            f"  the whole model, {FULL_TOKENS:,} tokens: calibration {calibration / 3600:.1f} h, elimination "
            f"{elimination / 60:.0f} min, {measured['disk'] * share:.1f} GB"
        )


if __name__ == "__main__":
    main()
