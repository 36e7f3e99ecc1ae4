"""The whole database of SmolLM2-135M on the reference's 32,768 tokens: its parts in seconds, memory and bytes.

python benchmarks/database.py [--dtype bfloat16] [--structure head] [--keep DIRECTORY] [--against DIRECTORY]

Nine levels and single heads, as published. The zero-storing form keeps every level of a consumer at full width.
`--against` compares with a database that another precision made: who is kept, and the held-out KL of uniform genomes.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from held_out import HeldOut

from darwinlm.config.run import DatabaseConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.database import calibrate as calibration
from darwinlm.database import eliminate
from darwinlm.database import store as store
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database, add_unit
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.families import find_units
from darwinlm.search.uniform import uniform_genome

TOKENS = Path(__file__).resolve().parents[2] / "shared" / "reference" / "smollm2_calibration_tokens.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--structure", default="head", choices=["head", "kv_group", "balanced"])
    parser.add_argument("--keep", type=Path, help="where the database stays, to compare with another")
    parser.add_argument("--against", type=Path, help="a database that was kept, to compare this one with")
    arguments = parser.parse_args()
    before = memory("VmRSS")
    tokens = torch.from_numpy(np.load(TOKENS)["tokens"]).long()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = find_checkpoint("smollm2-135m", Path(directory))
        config = DatabaseConfig(levels=9, structure=arguments.structure)
        units = find_units(checkpoint.skeleton(), checkpoint.config, config.structure)
        grid = level_grid(units, config.levels, config.granularity)
        database = Database(arguments.keep or Path(directory) / "database", grid, {})
        parts: dict[str, float] = {}
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of reading the GGUF file
        start = time.monotonic()
        with timed(parts):
            statistics = calibration.calibrate(
                checkpoint,
                tokens,
                batch_size=8,
                device=torch.device("cpu"),
                units=units,
                dtype=getattr(torch, arguments.dtype),
            )
            for unit in statistics:
                add_unit(database, unit, config, torch.float32)
        total = time.monotonic() - start
        peak = memory("VmHWM") - before
        stored = sum(file.stat().st_size for file in database.path.iterdir())
        if arguments.against:
            compare(checkpoint, database, Database(arguments.against, grid, {}))
    parts["forward and the rest"] = total - sum(parts.values())
    zeros = sum(4 * unit_size(unit, checkpoint.config.hidden_size) * config.levels for unit in units)
    for name, seconds in parts.items():
        print(f"{name:24} {seconds:6.1f} s")
    print(f"{'total':24} {total:6.1f} s, {arguments.dtype} forward, {torch.get_num_threads()} threads")
    print(f"{'peak memory':24} {peak:6.2f} GB above the interpreter with torch loaded")
    print(
        f"{'on disk':24} {stored / 1e6:6.0f} MB, {stored / zeros:.1%} of the zero-storing form's {zeros / 1e6:.0f} MB"
    )


def compare(checkpoint: Checkpoint, database: Database, other: Database) -> None:
    """Print how many levels keep the same structures, and the KL of uniform genomes on 16,384 held-out tokens."""
    grid = database.grid
    pairs = [
        (database.level(index, level).kept, other.level(index, level).kept)
        for index in range(len(grid.units))
        for level in range(1, grid.highest(index))
    ]
    same = sum(torch.equal(*pair) for pair in pairs)
    shared = mean(torch.isin(*pair).float().mean().item() for pair in pairs)
    print(f"{same} of {len(pairs)} levels keep the same structures, {shared:.1%} of all structures kept are the same")
    corpus = read_corpus("vital-wiki", checkpoint.tokenizer, 512, 0)
    dense = checkpoint.load(torch.float32, torch.device("cpu"))
    held_out = HeldOut(dense, {"articles": corpus.draw_held_out(16_384)})
    for level in (3, 5):
        genome = uniform_genome(grid, level, 9, Random(0))
        mine, its = (
            held_out(Stitcher(dense, checkpoint.family, each).stitch(genome))["articles"] for each in (database, other)
        )
        print(f"uniform at level {level}: held-out KL {mine:.4f}, of the other {its:.4f}")


def unit_size(unit: Any, hidden: int) -> int:
    """Weights in a unit's consumer."""
    return unit.structures * unit.structure_width * hidden


@contextlib.contextmanager
def timed(parts: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that go into each part."""
    with contextlib.ExitStack() as patches:
        for owner, name, part in (
            (calibration._Gram, "__call__", "Hessians"),
            (eliminate, "eliminate", "elimination"),
            (eliminate, "solve_levels", "level solves"),
            (store.Database, "add", "writing"),
        ):
            patches.enter_context(patch.object(owner, name, clocked(getattr(owner, name), part, parts)))
        yield


def clocked(function: Callable[..., Any], part: str, parts: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        result = function(*args, **kwargs)
        parts[part] = parts.get(part, 0.0) + time.monotonic() - start
        return result

    return call


def memory(figure: str) -> float:
    """GB that this process holds now (`VmRSS`), or has held at most (`VmHWM`).

    Not getrusage, whose peak a process inherits from the one that started it.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(figure))
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
