"""The database of levels on disk: one safetensors file a unit, written once, resumed, verified, read by memory map.

The manifest says what the database was made from. A unit's file holds the order of removal, the errors, and for every
level between dense and empty the consumer's re-solved weights. The structures that a level keeps follow from the
order; nothing is inferred from zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darwinlm.config.run import DatabaseConfig
from darwinlm.database import eliminate
from darwinlm.database.cholesky import dampen
from darwinlm.database.levels import Elimination, Level, UnitStatistics
from darwinlm.genome import Grid
from darwinlm.runtime import parallel
from darwinlm.runtime.files import (
    DamagedError,
    as_json,
    read_notes,
    read_record,
    read_tensors,
    write_record,
    write_tensors,
)
from darwinlm.types import DarwinError, UsageError

MANIFEST = "database.json"


class Database:
    """The levels of every unit of one model, computed from one set of calibration tokens.

    Args:
        cure: what to do if `path` holds a database of another provenance.

    Raises:
        UsageError: if `path` holds a database of another provenance.
        DarwinError: if its manifest is damaged or of another format version.
    """

    def __init__(self, path: Path, grid: Grid, provenance: dict[str, Any], cure: str = "choose another --out"):
        self.path = path
        self.grid = grid
        self.provenance = provenance
        self._units: dict[int, dict[str, Tensor]] = {}  # verified, and mapped into memory
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).exists():
            stored = read_record(path / MANIFEST, "provenance")["provenance"]
            if stored != provenance:
                changed = [key for key in provenance if stored.get(key) != provenance[key]]
                raise UsageError(f"{path} holds a database made from another {' and '.join(changed)}; {cure}")
        elif parallel.first():
            write_record(path / MANIFEST, {}, provenance)

    def finished(self) -> set[str]:
        """Names of the units that are in the database."""
        return {unit.name for unit in self.grid.units if self._file(unit.name).exists()}

    def add(self, elimination: Elimination, levels: list[Level], dtype: torch.dtype, first_token: float = 0.0) -> None:
        """Write a unit's levels, with weights rounded to `dtype`, as one file that appears only when it is complete.

        Args:
            first_token: as in `UnitStatistics`, to be noted in the file.
        """
        tensors = {f"weight.{level.level}": level.weight.to(dtype).contiguous().cpu() for level in levels}
        tensors["order"] = elimination.order.to(torch.int32).cpu()
        tensors["errors"] = elimination.errors.double().cpu()
        write_tensors(self._file(elimination.unit.name), tensors, self.provenance, first_token=first_token)

    def level(self, index: int, level: int) -> Level:
        """Unit `index` at a level that is neither dense nor empty.

        Raises:
            UsageError: if there is no such level.
            DarwinError: if the unit's file is missing, or was truncated or altered since it was written.
        """
        if not 0 < level < self.grid.highest(index):
            raise UsageError(
                f"level out of range: {self.grid.units[index].name} has levels 1 to {self.grid.highest(index) - 1} "
                f"in the database, found {level}"
            )
        unit, removed, tensors = self.grid.units[index], self.grid.removed[index][level], self._tensors(index)
        kept = tensors["order"][removed:].long().sort().values
        return Level(unit, level, kept, tensors[f"weight.{level}"], float(tensors["errors"][removed - 1]))

    def errors(self, index: int) -> list[float]:
        """The squared output error of unit `index` at each level from 0 to the highest."""
        errors = [0.0, *self._tensors(index)["errors"].tolist()]
        return [errors[count] for count in self.grid.removed[index]]

    def first_token(self) -> dict[str, float]:
        """The share of each unit's Hessian that comes from the first token of each sequence, by the unit's name."""
        shares = {}
        for unit in self.grid.units:
            with self._whole(unit.name) as file:
                shares[unit.name] = read_notes(file, "first_token")["first_token"]
        return shares

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """A unit's tensors, whose checksum is verified when they are first read."""
        if index not in self._units:
            name = self.grid.units[index].name
            with self._whole(name) as file:
                record, tensors = read_tensors(file)
            if record["provenance"] != as_json(self.provenance):
                raise DarwinError(
                    f"{file} is of another database: expected what {self.path / MANIFEST} says it was made from, found "
                    "another; delete that file and run the command again, it alone is rebuilt"
                )
            self._units[index] = tensors
        return self._units[index]

    @contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """The file of a unit, to be read. Raises `DarwinError` if it is missing, or proves to be damaged."""
        file = self._file(name)
        if not file.exists():
            raise DarwinError(f"{self.path} lacks the unit {name}: the database is unfinished; run the command again")
        try:
            yield file
        except DamagedError:
            raise DarwinError(
                f"damaged database: {file} was truncated, altered or renamed after it was written; delete it and run "
                "the command again, it alone is rebuilt"
            ) from None

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def reused_database(path: Path, grid: Grid, provenance: dict[str, Any]) -> Database:
    """Open the finished database of another run. Raises `UsageError` if it is unfinished, or of another provenance."""
    if not (path / MANIFEST).exists():
        raise UsageError(f"--reuse: expected a database in {path}, found none; name a run that has built one")
    database = Database(path, grid, provenance, "give the same settings, or leave --reuse out")
    missing = len(grid.units) - len(database.finished())
    if missing:
        raise UsageError(f"--reuse: the database in {path} lacks {missing} units; run its own command to the end first")
    return database


def add_unit(database: Database, statistics: UnitStatistics, config: DatabaseConfig, dtype: torch.dtype) -> None:
    """Eliminate one unit's structures and write its levels: the step from calibration to database (section 3.1)."""
    unit = statistics.unit
    index = database.grid.units.index(unit)
    hessian = dampen(statistics.hessian, config.damping)
    elimination = eliminate.eliminate(unit, statistics.weight, hessian)
    levels = eliminate.solve_levels(unit, statistics.weight, hessian, elimination, database.grid.removed[index])
    database.add(elimination, levels, dtype, statistics.first_token)
