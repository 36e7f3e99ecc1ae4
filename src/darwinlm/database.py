"""The database of levels on disk: one safetensors file a unit, written once, resumed, verified, read by memory map.

A unit's file holds the order of removal, the errors, and for every level between dense and empty the consumer's
re-solved weights. What is kept at a level follows from the order; nothing is inferred from zeros.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from darwinlm import obs
from darwinlm.artifact import read_json, write_json
from darwinlm.config import DatabaseConfig
from darwinlm.genome import Grid
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
        self._units: dict[str, dict[str, Any]] = {}
        if (path / MANIFEST).exists():
            manifest = read_json(path / MANIFEST)
            if manifest["made_from"] != provenance:
                changed = [key for key in provenance if manifest["made_from"].get(key) != provenance[key]]
                raise UsageError(
                    f"{path} holds a database made from another {' and '.join(changed)}; choose another --out"
                )
            self._units = manifest["units"]
        self._provenance = provenance
        self._levels = cache(self._read)

    def finished(self) -> set[str]:
        """Names of the units that are in the database."""
        return {name for name, entry in self._units.items() if (self.path / entry["file"]).exists()}

    def add(self, elimination: Elimination, levels: list[Level], dtype: torch.dtype) -> None:
        """Write a unit's levels, weights rounded to `dtype`, under their final name only once they are whole."""
        name = elimination.unit.name
        tensors = {f"weight.{level.level}": level.weight.to(dtype).contiguous().cpu() for level in levels}
        tensors["order"] = elimination.order.to(torch.int32).cpu()
        tensors["errors"] = elimination.errors.double().cpu()
        file = self.path / f"{name}.safetensors"
        temporary = file.with_suffix(".partial")
        save_file(tensors, temporary)
        digest = _sha256(temporary)
        temporary.rename(file)
        self._units[name] = {"file": file.name, "sha256": digest}
        write_json(self.path / MANIFEST, {"made_from": self._provenance, "units": self._units})

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
        if name not in self._units:
            raise DarwinError(f"{self.path} lacks the unit {name}: the database is unfinished; run the command again")
        file = self.path / self._units[name]["file"]
        _verify(file, self._units[name]["sha256"])
        return file


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
    hessian = obs.dampen(statistics.hessian, config.damping)
    elimination = obs.eliminate(unit, statistics.weight, hessian)
    levels = obs.solve_levels(unit, statistics.weight, hessian, elimination, database.grid.removed[index])
    database.add(elimination, levels, dtype)
