"""Tiny pruned models for several test files, and the oracle: a dense model whose removed structures are zero."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from darwinlm.config.run import DatabaseConfig
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import Stitcher, repeat_shared
from darwinlm.database.store import Database, add_unit
from darwinlm.export.hf import export_hf
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes, find_units, linear_at
from darwinlm.types import Genome, Structure

CPU = torch.device("cpu")
CONFIG = DatabaseConfig(levels=4, granularity=8)


def token_ids(seed: int = 0, sequences: int = 6) -> Tensor:
    return torch.randint(tiny.VOCAB, (sequences, 32), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pruned:
    """A checkpoint and its database."""

    checkpoint: Checkpoint
    database: Database

    @cached_property
    def dense(self) -> PreTrainedModel:
        return self.checkpoint.load(torch.float32, CPU)

    @cached_property
    def stitcher(self) -> Stitcher:
        return Stitcher(self.dense, self.checkpoint.family, self.database)

    def genomes(self) -> list[Genome]:
        """Random genomes, the dense one, one in which units vanish, and one in which all units nearly do."""
        rng, grid = Random(0), self.database.grid
        indices, kinds = range(len(grid.units)), grid.kinds()
        gone = (kinds["mixer"][0], kinds["attention"][-1], kinds["mlp"][-2]) if "mixer" in kinds else (2, 5)
        random = [Genome(tuple(rng.randint(0, grid.highest(i)) for i in indices)) for _ in range(6)]
        vanishing = Genome(tuple(grid.highest(i) if i in gone else min(1, grid.highest(i) - 1) for i in indices))
        return [*random, grid.dense(), vanishing, Genome(tuple(grid.highest(i) - 1 for i in indices))]


def prune(path: Path, out: Path, structure: Structure = "kv_group") -> Pruned:
    """Calibrate and eliminate a tiny checkpoint."""
    checkpoint = Checkpoint(path)
    units = find_units(checkpoint.skeleton(), checkpoint.config, structure)
    grid = level_grid(units, CONFIG.levels, CONFIG.granularity)
    database = Database(out, grid, {})
    for statistics in calibrate(checkpoint, token_ids(), batch_size=4, device=CPU, units=units):
        add_unit(database, statistics, CONFIG, torch.float32)
    return Pruned(checkpoint, database)


def zero_masked(dense: PreTrainedModel, database: Database, genome: Genome) -> PreTrainedModel:
    """The dense model with a removed structure's columns zero and the database's weights in the others."""
    model = copy.deepcopy(dense)
    for index, (unit, level) in enumerate(zip(database.grid.units, genome.levels, strict=True)):
        consumer = linear_at(model, unit.consumer)
        if level == database.grid.highest(index):
            consumer.weight.data.zero_()
            if consumer.bias is not None:
                consumer.bias.data.zero_()
        elif level:
            found = database.level(index, level)
            width = unit.structure_width
            columns = torch.cat([torch.arange(s * width, (s + 1) * width) for s in found.kept.tolist()])
            consumer.weight.data.zero_()
            consumer.weight.data[:, columns] = found.weight
    return model


def write_export(case: Pruned, genome: Genome, out: Path) -> Path:
    """The model of a genome as a directory."""
    sizes = block_sizes(case.database.grid, genome, case.dense.config)
    return export_hf(repeat_shared(case.stitcher.stitch(genome)), sizes, tiny.tokenizer(), out, "")
