"""The latency table: how long every unit takes at every level on this device, measured once, as costs for a search."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

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
from darwinlm.model.layers import is_pruned, layer_config, shares
from darwinlm.runtime import timing
from darwinlm.runtime.device import processor_name
from darwinlm.runtime.files import read_record, write_record
from darwinlm.runtime.progress import say
from darwinlm.search.costs import Costs
from darwinlm.types import Genome, Unit, UsageError

NANO = 1e9
TOLERANCE = 0.15  # of a whole pass, that the parts of the table may differ by


def latency_costs(checkpoint: Checkpoint, grid: Grid, config: LatencyConfig, device: torch.device, path: Path) -> Costs:
    """Return nanoseconds of one forward pass as costs, from the given table (`config.table`) or the run's own.

    Args:
        path: the run's own table, which is measured and written if it is needed and does not exist. The given one may
            be a directory, which has one of this name.

    Raises:
        UsageError: if a table is of another model, other levels, another device or another pass, or if blocks read
            keys and values of others, without which they cannot be timed.
    """
    if any(shares(checkpoint.config, block, "reuse") for block in range(checkpoint.config.num_hidden_layers)):
        raise UsageError(
            "--target latency: expected blocks that run alone, found some that read the keys and values of others; "
            "take params, flops, memory or kv-cache"
        )
    made_for = _made_for(checkpoint, grid, config, device)
    table = path if config.table is None else Path(config.table)
    table = table / path.name if table.is_dir() else table
    if config.table is not None and not table.is_file():
        raise UsageError(f"--latency.table: expected a file that an earlier run wrote, found none at {table}; check it")
    if not table.exists():
        units, rest = _consistent(lambda: measure(checkpoint, grid, config, device))
        write_record(path, {"units": units, "rest": rest}, made_for)
    record = read_record(table, "units", "rest")
    different = [name for name, value in made_for.items() if record["provenance"].get(name) != value]
    if config.table is None:
        # A resumed run keeps its own table, which determined its budget, whatever the number of threads is now.
        different = [name for name in different if name != "threads"]
    if different:
        raise UsageError(
            f"the latency table in {table} is of another {different[0]}: expected {made_for[different[0]]}, found "
            f"{record['provenance'].get(different[0])}; leave --latency.table out and it is measured"
        )
    return Costs("ns a forward pass", tuple(map(tuple, record["units"])), record["rest"])


def _consistent(measured: Callable[[], tuple[list[list[int]], int, float]]) -> tuple[list[list[int]], int]:
    """Return a table whose parts add up to a whole forward pass; it is measured twice if they do not at first.

    They do not on a machine that does other work meanwhile. If they never do, the user is told.
    """
    for last in (False, True):
        units, rest, error = measured()
        if abs(error) <= TOLERANCE:
            break
        say(
            f"latency: the parts of the dense model take {1 + error:.2f} times as long as a whole pass; "
            + ("other work keeps this machine busy: do not rely on --target latency" if last else "measured again")
        )
    return units, rest


def _made_for(checkpoint: Checkpoint, grid: Grid, config: LatencyConfig, device: torch.device) -> dict[str, Any]:
    """Return everything that a table depends on, in the form that JSON gives back; weights do not change times."""
    shape = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    model = checkpoint.config if is_pruned(checkpoint.config) else layer_config(checkpoint.config, 0)
    return {
        "model": {name: getattr(model, name, None) for name in (*shape, "num_hidden_layers", "vocab_size")},
        "level grid": [list(removed) for removed in grid.removed],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {processor_name()}",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "precision": str(checkpoint.dtype),
        "pass": {name: value for name, value in asdict(config).items() if name in ("batch", "tokens", "context")},
    }


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint, grid: Grid, config: LatencyConfig, device: torch.device
) -> tuple[list[list[int]], int, float]:
    """Return the nanoseconds of every unit at every level, and those of everything that belongs to no unit.

    The third result is by which share of a whole pass the parts of the dense model add up to more or less than that.
    Units of one shape are measured once. A unit's time is that of a model of one block that has only this unit, minus
    that of the same model without the unit. All of these models take turns.
    """
    dense = checkpoint.load(checkpoint.dtype, device)
    stitcher = Stitcher(dense, checkpoint.family, _FirstStructures(dense, grid))
    first = {_shape(grid, index): index for index in reversed(range(len(grid.units)))}
    ends = _no_block(stitcher)
    timed: dict[Any, _Pass] = {
        "dense": _Pass(dense, whole=True),
        "no block": _Pass(ends, whole=True),
        "no block's decoder": _Pass(ends),
    }
    for index in first.values():
        for level in range(grid.highest(index) + 1):
            genome = grid.dense().replace(_others_removed(grid, index) | {index: level})
            timed[index, level] = _Pass(_one_block(stitcher, genome, grid.units[index].block))
    seconds = _medians(timed, config)
    rows: dict[int, list[int]] = {}
    for index in first.values():
        without = seconds[index, grid.highest(index)]
        levels = [max(0.0, seconds[index, level] - without) for level in range(grid.highest(index))]
        rows[index] = [round(NANO * value) for value in [*_falling(levels), 0.0]]
    units = [rows[first[_shape(grid, index)]] for index in range(len(grid.units))]
    whole = round(NANO * seconds["dense"])
    # Independently of the whole: the ends of the model, its units, and what a block without units costs.
    emptied = [seconds[i, grid.highest(i)] for i in first.values()]
    blocks = checkpoint.config.num_hidden_layers * max(0.0, median(emptied) - seconds["no block's decoder"])
    parts = seconds["no block"] + blocks + sum(row[0] for row in units) / NANO
    return units, max(0, whole - sum(row[0] for row in units)), parts / seconds["dense"] - 1


def _shape(grid: Grid, index: int) -> tuple[Any, ...]:
    """Return everything about a unit that its time depends on."""
    unit = grid.units[index]
    return (
        unit.kind,
        unit.structures,
        unit.structure_width,
        unit.readers,
        unit.structure_parameters,
        grid.removed[index],
    )


def _others_removed(grid: Grid, kept: int) -> dict[int, int]:
    """Return the last level of every other unit of a unit's block, by the index of the unit."""
    block = grid.units[kept].block
    others = [index for index, unit in enumerate(grid.units) if unit.block == block and index != kept]
    return {index: grid.highest(index) for index in others}


def _falling(values: list[float]) -> list[float]:
    """Return the values made to fall from level to level, as measured times do not always do.

    Each is the mean of the smallest value so far and the largest still to come: both sequences fall.
    """
    lowest = [min(values[: i + 1]) for i in range(len(values))]
    highest = [max(values[i:]) for i in range(len(values))]
    return [(low + high) / 2 for low, high in zip(lowest, highest, strict=True)]


class _FirstStructures(Database):
    """Levels that keep a unit's first structures with the dense weights: other structures would take as long."""

    def __init__(self, dense: PreTrainedModel, grid: Grid):
        self.dense = dense
        self.grid = grid

    def level(self, index: int, level: int) -> Level:
        """Return a unit at a level that is neither dense nor empty."""
        unit, kept = self.grid.units[index], _first(self.grid.units[index], self.grid.removed[index][level])
        weight = linear_at(self.dense, unit.consumer).weight
        columns = columns_of(kept.to(weight.device), unit.structure_width)
        return Level(unit, level, kept, weight[:, columns], 0.0)


def _first(unit: Unit, removed: int) -> torch.Tensor:
    """Return the first structures of a unit, of all or of each group, as many as are left of it."""
    if not unit.in_turns:
        return torch.arange(unit.structures - removed)
    left = unit.readers - removed // unit.groups  # of each group
    return (torch.arange(unit.groups)[:, None] * unit.readers + torch.arange(left)).flatten()


def _one_block(stitcher: Stitcher, genome: Genome, block: int) -> PreTrainedModel:
    """Return a stitched model of which only one block is left, in the form in which it would be exported."""
    model = repeat_shared(stitcher.stitch(genome))
    family = stitcher.family
    module = copy.deepcopy(model.get_submodule(family.block(block)), {id(each): each for each in model.parameters()})
    for part in module.modules():
        if isinstance(getattr(part, "layer_idx", None), int):
            vars(part)["layer_idx"] = 0  # of the cache
    model.set_submodule(family.blocks, nn.ModuleList([module]))
    types = getattr(model.config, "layer_types", None) or []
    if len(set(types)) > 1:
        first = stitcher.grid.units[next(iter(stitcher.grid.kinds()["attention"]))].block
        config = copy.deepcopy(model.config)
        config.layer_types = [types[block], types[first]]  # caches take their length from a layer with attention
        for part in (model, model.get_submodule(family.backbone)):
            vars(part)["config"] = config
    return model


def _no_block(stitcher: Stitcher) -> PreTrainedModel:
    """Return the dense model without its blocks."""
    model = stitcher.stitch(stitcher.grid.dense())
    model.set_submodule(stitcher.family.blocks, nn.ModuleList())
    return model


class _Pass(NamedTuple):
    """A forward pass of the whole model with its last logits, or of its decoder alone."""

    model: PreTrainedModel
    whole: bool = False


def _medians(passes: dict[Any, _Pass], config: LatencyConfig) -> dict[Any, float]:
    """Return the median seconds of each forward pass over the same random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = next(iter(passes.values())).model.config.vocab_size
    ids = torch.randint(vocabulary, (config.batch, config.context + config.tokens), generator=generator)
    context, tokens = ids[:, : config.context], ids[:, config.context :]
    works = {
        name: partial(_seconds, model, tokens.to(model.device), _filled(model, context), whole)
        for name, (model, whole) in passes.items()
    }
    return {name: median(seconds) for name, seconds in timing.alternate(works, config.repeats, "latency").items()}


def _filled(model: PreTrainedModel, ids: torch.Tensor) -> Cache | None:
    """Return the cache that a forward pass over a context leaves; None for an empty context."""
    if not ids.shape[1]:
        return None
    return model.get_decoder()(ids.to(model.device), use_cache=True).past_key_values


def _seconds(model: Any, ids: torch.Tensor, filled: Cache | None, whole: bool) -> float:
    """Return the seconds of a forward pass of the whole model with its last logits, or of its decoder alone."""
    cache = copy.deepcopy(filled)  # which the pass extends
    start = timing.now(model.device)
    if whole:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    else:
        model.get_decoder()(ids, past_key_values=cache, use_cache=True)
    return timing.now(model.device) - start
