"""A run directory: what is in it, whose it is, and how to read it again."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from darwinlm.artifact import read_json, write_json, write_text
from darwinlm.config import RunConfig, read_config
from darwinlm.genome import Grid
from darwinlm.modeling import load
from darwinlm.types import DarwinError, Genome, SearchResult, UsageError

SETTINGS = "run.yaml"


class Run:
    """The directory that a run writes, and its results.

    Attributes:
        path: the directory.
        database, search, exported: where its stages keep their artifacts.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.database = self.path / "database"
        self.search = self.path / "search"
        self.exported = self.path / "model"
        self.finished = (self.path / "table.json").exists()

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run. Raises `UsageError` if the directory holds none."""
        if not (Path(path) / SETTINGS).is_file():
            raise UsageError(f"no run in {path}: expected {SETTINGS} in it; name a directory that compress wrote")
        return cls(path)

    @classmethod
    def claim(cls, config: RunConfig) -> Run:
        """Make `config.out` this configuration's run, or resume it.

        Raises:
            UsageError: if the directory holds a run of other settings, or anything else.
        """
        run = cls(config.out)
        settings = run.path / SETTINGS
        if not settings.exists():
            strangers = [entry.name for entry in run.path.iterdir() if not entry.name.startswith(".")]
            if strangers:
                raise UsageError(
                    f"{run.path} is not empty and holds no run (found {strangers[0]}); choose another --out"
                )
            write_text(settings, yaml.safe_dump(_plain(config), sort_keys=False))
        changed = _differences(_plain(run.config) | {"out": config.out}, _plain(config))  # a run may be moved
        if changed:
            raise UsageError(f"{run.path} holds another run ({'; '.join(changed)}); choose another --out, or delete it")
        return run

    @cached_property
    def config(self) -> RunConfig:
        """The settings that the run was started with."""
        return read_config(self.path / SETTINGS)

    @property
    def genome(self) -> Genome:
        """The genome that the search found. Raises `DarwinError` if it has not finished."""
        return Genome(tuple(self._result()["levels"]))

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model, loaded from the run's export."""
        return load(self.exported)

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows of `table.json`: dense, uniform and searched, with their measurements."""
        return read_json(self.path / "table.json")

    def save_search(self, result: SearchResult, grid: Grid, made_from: dict[str, Any]) -> None:
        """Write the genome that the search found, with the names of its units and what it was made from."""
        levels = dict(zip((unit.name for unit in grid.units), result.best.levels, strict=True))
        found = {"fitness": result.fitness, "levels": result.best.levels, "level_of": levels, "made_from": made_from}
        write_json(self.search / "result.json", found)

    def _result(self) -> dict[str, Any]:
        if not (self.search / "result.json").exists():
            raise DarwinError(f"the search in {self.path} has not finished; run darwinlm compress again to go on")
        return read_json(self.search / "result.json")


def versions() -> dict[str, str]:
    """The versions that made an artifact."""
    return {name: version(name) for name in ("darwinlm", "torch", "transformers")}


def _plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as YAML has it, with lists for tuples."""
    return _lists(asdict(config))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"its {name} is {old}, not {new}"]
