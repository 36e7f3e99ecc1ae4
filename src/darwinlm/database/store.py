"""The database of levels on disk: one safetensors file a unit, written once, resumed, verified, read by memory map.

The manifest says what the database was made from. A unit's file holds the order of removal, the errors, and for every
level between dense and empty the consumer's re-solved weights; a record beside it holds its hash. What is kept at a
level follows from the order; nothing is inferred from zeros.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from darwinlm.config.run import DatabaseConfig
from darwinlm.database import eliminate
from darwinlm.genome import Grid
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_json, write_json
from darwinlm.types import DarwinError, Elimination, Level, UnitStatistics, UsageError

MANIFEST = "database.json"


class Database:
    """Levels of every unit of one model, made from one set of calibration tokens.

    Raises:
        UsageError: if `path` holds a database that was made from something else.
    """

    def __init__(self, path: Path, grid: Grid, provenance: dict[str, Any]):
        self.path = path
        self.grid = grid
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).exists():
            stored = read_json(path / MANIFEST, "provenance")["provenance"]
            if stored != provenance:
                changed = [key for key in provenance if stored.get(key) != provenance[key]]
                raise UsageError(
                    f"{path} holds a database made from another {' and '.join(changed)}; choose another --out"
                )
        elif parallel.first():
            write_json(path / MANIFEST, {"provenance": provenance})
        self._levels = cache(self._read)

    def finished(self) -> set[str]:
        """Names of the units that are in the database."""
        return {unit.name for unit in self.grid.units if all(file.exists() for file in self._files(unit.name))}

    def add(self, elimination: Elimination, levels: list[Level], dtype: torch.dtype) -> None:
        """Write a unit's levels, weights rounded to `dtype`, under their final name only once they are whole."""
        tensors = {f"weight.{level.level}": level.weight.to(dtype).contiguous().cpu() for level in levels}
        tensors["order"] = elimination.order.to(torch.int32).cpu()
        tensors["errors"] = elimination.errors.double().cpu()
        file, record = self._files(elimination.unit.name)
        temporary = file.with_suffix(".partial")
        save_file(tensors, temporary)
        digest = _sha256(temporary)
        temporary.rename(file)
        write_json(record, {"sha256": digest})  # one a unit: several processes write at a time

    def level(self, index: int, level: int) -> Level:
        """Unit `index` at a level that is neither dense nor empty.

        Raises:
            DarwinError: if the unit's file is missing, truncated, or was altered since it was written.
        """
        if not 0 < level < self.grid.highest(index):
            raise UsageError(
                f"level out of range: {self.grid.units[index].name} has levels 1 to {self.grid.highest(index) - 1} "
                f"in the database, found {level}"
            )
        return self._levels(index, level)

    def errors(self, index: int) -> list[float]:
        """Squared output error of unit `index` at each level from 0 to the highest."""
        with safe_open(self._verified(index), framework="pt") as file:
            errors = [0.0, *file.get_tensor("errors").tolist()]
        return [errors[count] for count in self.grid.removed[index]]

    def _read(self, index: int, level: int) -> Level:
        unit, removed = self.grid.units[index], self.grid.removed[index][level]
        with safe_open(self._verified(index), framework="pt") as file:
            kept = file.get_tensor("order")[removed:].long().sort().values
            error = float(file.get_tensor("errors")[removed - 1])
            return Level(unit, level, kept, file.get_tensor(f"weight.{level}"), error)

    def _verified(self, index: int) -> Path:
        name = self.grid.units[index].name
        file, record = self._files(name)
        if not record.exists():
            raise DarwinError(f"{self.path} lacks the unit {name}: the database is unfinished; run the command again")
        _verify(file, read_json(record, "sha256")["sha256"])
        return file

    def _files(self, name: str) -> tuple[Path, Path]:
        """A unit's weights, and the record that is written once they are whole."""
        return self.path / f"{name}.safetensors", self.path / f"{name}.json"


@cache
def _verify(file: Path, digest: str) -> None:
    if not file.exists() or _sha256(file) != digest:
        state = "is missing" if not file.exists() else "was truncated or altered after it was written"
        raise DarwinError(
            f"damaged database: {file} {state}; delete that file and run the command again, it alone is rebuilt"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def add_unit(database: Database, statistics: UnitStatistics, config: DatabaseConfig, dtype: torch.dtype) -> None:
    """Eliminate one unit's structures and write its levels: the step from calibration to database (section 3.1)."""
    unit = statistics.unit
    index = database.grid.units.index(unit)
    hessian = eliminate.dampen(statistics.hessian, config.damping)
    elimination = eliminate.eliminate(unit, statistics.weight, hessian)
    levels = eliminate.solve_levels(unit, statistics.weight, hessian, elimination, database.grid.removed[index])
    database.add(elimination, levels, dtype)
