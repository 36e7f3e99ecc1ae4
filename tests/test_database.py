"""The database on disk: resumed, verified, and never mistaken for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from darwinlm.config.run import DatabaseConfig
from darwinlm.database import eliminate
from darwinlm.database.cholesky import dampen
from darwinlm.database.levels import UnitStatistics
from darwinlm.database.store import Database, add_unit
from darwinlm.genome import level_grid
from darwinlm.types import DarwinError, Unit, UsageError

UNITS = tuple(Unit(f"block-{b:02d}-mlp", b, "mlp", f"{b}.down", (), 1, 64, 10, 0) for b in range(3))
GRID = level_grid(UNITS, 4, 8)
MADE_FROM = {"model": "a", "text": "b"}


def statistics(unit: Unit) -> UnitStatistics:
    generator = torch.Generator().manual_seed(unit.block)
    x = torch.randn(200, 64, generator=generator)
    return UnitStatistics(unit, torch.randn(16, 64, generator=generator), 2 / 200 * x.T @ x, 200)


def built(path: Path) -> Database:
    database = Database(path, GRID, MADE_FROM)
    for unit in UNITS:
        add_unit(database, statistics(unit), DatabaseConfig(levels=4, granularity=8), torch.float32)
    return database


def test_levels_read_back_equal_those_that_were_solved(tmp_path: Path) -> None:
    built(tmp_path)
    database = Database(tmp_path, GRID, MADE_FROM)
    for index, unit in enumerate(UNITS):
        given = statistics(unit)
        hessian = dampen(given.hessian)
        elimination = eliminate.eliminate(unit, given.weight, hessian)
        solved = eliminate.solve_levels(unit, given.weight, hessian, elimination, GRID.removed[index])
        assert [level.level for level in solved] == [1, 2, 3]
        for expected in solved:
            found = database.level(index, expected.level)
            assert torch.equal(found.weight, expected.weight)
            assert found.kept.tolist() == expected.kept.tolist()
            assert found.error == pytest.approx(expected.error)
        errors = database.errors(index)
        assert errors == sorted(errors)
        assert errors[2] == pytest.approx(database.level(index, 2).error)


def test_only_what_is_kept_is_stored(tmp_path: Path) -> None:
    database = built(tmp_path)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert stored < 0.45 * 5 * len(UNITS) * 16 * 64 * 4  # the zero-storing form: five levels of the whole weight
    assert [database.level(0, level).weight.shape[1] for level in (1, 2, 3)] == [48, 32, 16]


def test_a_unit_counts_as_finished_once_it_is_whole(tmp_path: Path) -> None:
    database = Database(tmp_path, GRID, MADE_FROM)
    assert database.finished() == set()
    add_unit(database, statistics(UNITS[1]), DatabaseConfig(levels=4, granularity=8), torch.float32)
    (tmp_path / "block-02-mlp.partial").write_bytes(b"half")
    assert Database(tmp_path, GRID, MADE_FROM).finished() == {"block-01-mlp"}
    (tmp_path / "block-01-mlp.safetensors").unlink()
    assert Database(tmp_path, GRID, MADE_FROM).finished() == set()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, alter])
def test_a_damaged_file_is_named_with_the_cure(tmp_path: Path, damage) -> None:
    built(tmp_path)
    damage(tmp_path / "block-01-mlp.safetensors")
    database = Database(tmp_path, GRID, MADE_FROM)
    database.level(0, 1)
    with pytest.raises(DarwinError, match=r"damaged database: .*block-01-mlp\.safetensors .* delete it"):
        database.level(1, 1)


def test_a_unit_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DarwinError, match="lacks the unit block-00-mlp"):
        Database(tmp_path, GRID, MADE_FROM).level(0, 1)
    built(tmp_path)
    (tmp_path / "block-01-mlp.safetensors").unlink()
    with pytest.raises(DarwinError, match="lacks the unit block-01-mlp"):
        Database(tmp_path, GRID, MADE_FROM).level(1, 1)


def test_a_database_made_from_something_else_is_refused(tmp_path: Path) -> None:
    built(tmp_path)
    with pytest.raises(UsageError, match="made from another model; choose another --out"):
        Database(tmp_path, GRID, {"model": "other", "text": "b"})


@pytest.mark.parametrize("level", [-1, 0, 4, 9])
def test_a_level_that_is_not_stored_is_refused(tmp_path: Path, level: int) -> None:
    with pytest.raises(UsageError, match=r"has levels 1 to 3 in the database"):
        built(tmp_path).level(0, level)


def test_weights_are_rounded_to_the_models_precision(tmp_path: Path) -> None:
    database = Database(tmp_path, GRID, MADE_FROM)
    add_unit(database, statistics(UNITS[0]), DatabaseConfig(levels=4, granularity=8), torch.bfloat16)
    assert database.level(0, 1).weight.dtype == torch.bfloat16
