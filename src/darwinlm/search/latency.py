"""How long every unit takes at every level on this device: measured once, kept as a table, a cost for the search."""

from __future__ import annotations

import copy
import platform
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from darwinlm.config.run import LatencyConfig
from darwinlm.database.eliminate import columns_of
from darwinlm.database.levels import Level
from darwinlm.database.stitch import Stitcher, repeat_shared
from darwinlm.database.store import Database
from darwinlm.genome import Grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import linear_at
from darwinlm.runtime.files import read_record, write_record
from darwinlm.runtime.progress import track
from darwinlm.search.budget import Costs
from darwinlm.types import Genome, Unit, UsageError

NANO = 1e9


def latency_costs(checkpoint: Checkpoint, grid: Grid, config: LatencyConfig, device: torch.device, path: Path) -> Costs:
    """Nanoseconds of one forward pass, from the table that was given or else from that at `path`, written if need be.

    Args:
        path: where the run keeps its table.

    Raises:
        UsageError: if a table is of another model, other levels, another device or another pass.
    """
    made_for = _made_for(checkpoint, grid, config, device)
    table = path if config.table is None else Path(config.table)
    if config.table is not None and not table.is_file():
        raise UsageError(f"--latency.table: expected a file that an earlier run wrote, found none at {table}; check it")
    if not table.exists():
        units, rest = measure(checkpoint, grid, config, device)
        write_record(path, {"units": units, "rest": rest}, made_for)
    found = read_record(table, "units", "rest")
    other = [name for name, value in made_for.items() if found["provenance"].get(name) != value]
    if config.table is None:
        other = [name for name in other if name != "threads"]  # a resumed run's own, which decided its budget
    if other:
        raise UsageError(
            f"the latency table in {table} is of another {other[0]}: expected {made_for[other[0]]}, found "
            f"{found['provenance'].get(other[0])}; leave --latency.table out and it is measured"
        )
    return Costs("ns a forward pass", tuple(map(tuple, found["units"])), found["rest"])


def _made_for(checkpoint: Checkpoint, grid: Grid, config: LatencyConfig, device: torch.device) -> dict[str, Any]:
    """What a table depends on, as JSON has it. Weights are not in it: a trained model is as fast as it was."""
    shape = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    return {
        "model": {name: getattr(checkpoint.config, name, None) for name in (*shape, "num_hidden_layers", "vocab_size")},
        "level grid": [list(removed) for removed in grid.removed],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {_processor()}",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "precision": str(checkpoint.dtype),
        "pass": {name: value for name, value in asdict(config).items() if name in ("batch", "tokens", "context")},
    }


def _processor() -> str:
    """Its model where Linux tells, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint, grid: Grid, config: LatencyConfig, device: torch.device
) -> tuple[list[list[int]], int]:
    """Nanoseconds of every unit at every level, and of all that is no unit.

    Units of one shape are measured once. A unit's time is that of a model of one block, which has that unit alone, less
    that of the same model without it. All take turns, so that what slows the machine for a while slows them all.
    """
    dense = checkpoint.load(checkpoint.dtype, device)
    stitcher = Stitcher(dense, checkpoint.family, _FirstStructures(dense, grid))
    first = {_shape(grid, index): index for index in reversed(range(len(grid.units)))}
    timed: dict[tuple[int, int] | str, PreTrainedModel] = {"dense": dense}
    for index in first.values():
        for level in range(grid.highest(index) + 1):
            genome = grid.dense().replace(_removed(grid, index) | {index: level})
            timed[index, level] = _one_block(stitcher, genome, grid.units[index].block)
    seconds = _alternate(timed, config)
    rows: dict[int, list[int]] = {}
    for index in first.values():
        without = seconds[index, grid.highest(index)]
        levels = [max(0.0, seconds[index, level] - without) for level in range(grid.highest(index))]
        rows[index] = [round(NANO * value) for value in [*_falling(levels), 0.0]]
    units = [rows[first[_shape(grid, index)]] for index in range(len(grid.units))]
    whole = round(NANO * seconds["dense"])
    return units, max(0, whole - sum(row[0] for row in units))


def _shape(grid: Grid, index: int) -> tuple[Any, ...]:
    unit = grid.units[index]
    return (
        unit.kind,
        unit.structures,
        unit.structure_width,
        unit.readers,
        unit.structure_parameters,
        grid.removed[index],
    )


def _removed(grid: Grid, kept: int) -> dict[int, int]:
    """The other unit of a unit's block, at its last level."""
    block = grid.units[kept].block
    others = [index for index, unit in enumerate(grid.units) if unit.block == block and index != kept]
    return {index: grid.highest(index) for index in others}


def _falling(values: list[float]) -> list[float]:
    """The values made to fall from level to level: halfway between the least change down and the least change up."""
    down = [min(values[: i + 1]) for i in range(len(values))]
    up = [max(values[i:]) for i in range(len(values))]
    return [(a + b) / 2 for a, b in zip(down, up, strict=True)]


class _FirstStructures(Database):
    """Levels that keep a unit's first structures, with the dense weights: which they are does not matter to time."""

    def __init__(self, dense: PreTrainedModel, grid: Grid):
        self.dense = dense
        self.grid = grid

    def level(self, index: int, level: int) -> Level:
        """A unit at a level that is neither dense nor empty."""
        unit, kept = self.grid.units[index], _first(self.grid.units[index], self.grid.removed[index][level])
        weight = linear_at(self.dense, unit.consumer).weight
        columns = columns_of(kept.to(weight.device), unit.structure_width)
        return Level(unit, level, kept, weight[:, columns], 0.0)


def _first(unit: Unit, removed: int) -> torch.Tensor:
    if not unit.in_turns:
        return torch.arange(unit.structures - removed)
    left = unit.readers - removed // unit.groups  # of each group
    return (torch.arange(unit.groups)[:, None] * unit.readers + torch.arange(left)).flatten()


def _one_block(stitcher: Stitcher, genome: Genome, block: int) -> PreTrainedModel:
    """A stitched model of which one block is left, as it would be exported."""
    model = repeat_shared(stitcher.stitch(genome))
    family = stitcher.family
    module: Any = model.get_submodule(family.block(block))
    attention = getattr(module, family.attention)
    attention.layer_idx = 0  # of the cache
    model.set_submodule(family.blocks, nn.ModuleList([module]))
    return model


def _alternate(models: dict[tuple[int, int] | str, PreTrainedModel], config: LatencyConfig) -> dict[Any, float]:
    """The median of each model's turns, in seconds; the first turn warms up."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = next(iter(models.values())).config.vocab_size
    ids = torch.randint(vocabulary, (config.batch, config.context + config.tokens), generator=generator)
    turns: dict[Any, list[float]] = {name: [] for name in models}
    caches = {name: _filled(model, ids[:, : config.context]) for name, model in models.items()}
    order = [(turn, name) for turn in range(config.repeats + 1) for name in models]
    for turn, name in track(order, "latency", len(order)):
        taken = _pass(models[name], ids[:, config.context :], copy.deepcopy(caches[name]), whole=name == "dense")
        if turn:
            turns[name].append(taken)
    return {name: median(times) for name, times in turns.items()}


def _filled(model: PreTrainedModel, ids: torch.Tensor) -> Cache | None:
    if not ids.shape[1]:
        return None
    return model.get_decoder()(ids.to(model.device), use_cache=True).past_key_values


def _pass(model: Any, ids: torch.Tensor, cache: Cache | None, whole: bool) -> float:
    """Seconds of a forward pass of the whole model, or of its one block."""
    ids = ids.to(model.device)
    began = _now(model.device)
    if whole:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    else:
        model.get_decoder()(ids, past_key_values=cache, use_cache=True)
    return _now(model.device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
