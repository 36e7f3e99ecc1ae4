"""A run directory: what is in it, whose it is, and how to read it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import PreTrainedModel

from darwinlm.config.evaluation import CompareConfig
from darwinlm.config.files import read_settings
from darwinlm.config.frontier import FrontierConfig
from darwinlm.config.run import RunConfig
from darwinlm.genome import Grid
from darwinlm.model import reading
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.hub import HUB_ERRORS, fetch_model
from darwinlm.runtime.files import FORMAT_VERSION, check_record, read_record, sweep, write_record, write_text
from darwinlm.runtime.names import hub_model
from darwinlm.runtime.seal import export_damage, seal_export
from darwinlm.training.directory import Training
from darwinlm.types import DarwinError, Genome, SearchResult, UsageError

SETTINGS, TRAIN_SETTINGS, GRADUAL_SETTINGS = "run.yaml", "train.yaml", "recipe.yaml"
FRONTIER_SETTINGS = "frontier.yaml"
GIVEN_MODEL, GIVEN_TEXT = "given-model", "given-text.jsonl"  # a model and texts that were given in memory
MARK = f"# Settings of darwinlm, format {FORMAT_VERSION}\n"  # above them; 0.1.0 wrote none


# Settings that may change when something is resumed: it may be moved, and may need less memory or another disk.
FREE = (
    "out",
    "verify",
    "memory",
    "reuse",
    "report_to",
    "cache",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.report_to",
)


PRECISION = "precision.json"
THRIFT = "give it less --memory, or while the database is built, another --out with a lower --calibration.batch-size"
AS_A_LIST = "search one on this model and these levels, or give its levels as a JSON list"
ARCHIVE = ("PytorchStreamReader", "PytorchStreamWriter", "inline_container")  # torch's own words for a bad file


class Run:
    """The directory that a run writes, and its results.

    Attributes:
        path: the directory.
        dense: where a model that is no directory of safetensors is converted to one.
        search, refit, exported: where its stages keep their artifacts.
        history_path: the search's, a line of JSON for each generation.
        seal_path: the digests of the export's files.
        stages_path: the time and memory that its stages took.
        table_path, report_path, page_path: what it ends with; the last one is the report as HTML.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.dense = self.path / "dense"
        self.search = self.path / "search"
        self.history_path = self.search / "history.jsonl"
        self.refit = self.path / "refit"
        self.exported = self.path / "model"
        self.seal_path = self.path / "model.json"
        self.stages_path = self.path / "stages.json"
        self.table_path = self.path / "table.json"
        self.report_path = self.path / "report.md"
        self.page_path = self.path / "report.html"

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run. Raises `UsageError` if the directory holds none."""
        if not (Path(path) / SETTINGS).is_file():
            raise UsageError(f"no run in {path}: expected {SETTINGS} in it; name a directory that compress wrote")
        return cls(path)

    @property
    def database(self) -> Path:
        """Where its database is, or that of the run which it reuses."""
        reused = self.config.reuse if (self.path / SETTINGS).exists() else None
        return self.path / "database" if reused is None else Run.open(reused).database

    def abandon(self) -> None:
        """Leave the directory to another run if this one has done nothing yet: its arguments were wrong."""
        if not (self.path / "database").exists() and not self.history_path.exists():
            sweep(self.path)
            (self.path / SETTINGS).unlink(missing_ok=True)
            (self.path / GIVEN_TEXT).unlink(missing_ok=True)
            for directory in (self.dense, self.search, self.path / GIVEN_MODEL):
                shutil.rmtree(directory, ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do. The report is what a run writes last."""
        return all(path.exists() for path in (self.exported, self.table_path, self.report_path))

    @property
    def begun_in(self) -> str | None:
        """The precision in which its search began, which a search that is resumed keeps; None if it has not begun."""
        file = self.search / PRECISION
        return read_record(file, "dtype")["dtype"] if file.exists() else None

    def note_precision(self, dtype: torch.dtype) -> None:
        """Write down the precision of the search, unless that was done before."""
        if self.begun_in is None:
            write_record(self.search / PRECISION, {"dtype": str(dtype).removeprefix("torch.")}, {})

    @property
    def searched(self) -> bool:
        """Whether the search has found its genome."""
        return self._result_path.is_file()

    @cached_property
    def config(self) -> RunConfig:
        """The settings that the run was started with; what it was given in memory is where the run is now."""
        config = read_settings(self.path / SETTINGS)
        given = {name: str(self.path / file) for name, file in _given(asdict(config)).items()}
        return replace(config, **given)

    @property
    def genome(self) -> Genome:
        """The genome that the search found. Raises `DarwinError` if it has not finished."""
        return Genome(tuple(self._result()["levels"]))

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model, loaded from the run's export.

        Raises:
            DarwinError: if there is none yet, or it is damaged.
        """
        if not self.exported.exists():
            raise DarwinError(f"the run in {self.path} has no model yet; run darwinlm compress again to go on")
        self.check_export()
        return reading.load(self.exported)

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows of `table.json`: dense, uniform and searched, with their measurements.

        Raises:
            DarwinError: if the run has not been evaluated yet, or the file is damaged.
        """
        return read_record(self.table_path, "rows")["rows"]

    @property
    def recipe(self) -> str:
        """All settings, as YAML."""
        return (self.path / SETTINGS).read_text(encoding="utf-8")

    @property
    def sealed(self) -> dict[str, str]:
        """The SHA-256 of every file of the export. Raises `DarwinError` if that record is missing or damaged."""
        return read_record(self.seal_path, "files")["files"]

    def save_search(self, result: SearchResult, grid: Grid, provenance: dict[str, Any]) -> None:
        """Write the genome that the search found, with the names of its units and what it was made from."""
        levels = dict(zip((unit.name for unit in grid.units), result.best.levels, strict=True))
        content = {"fitness": result.fitness, "levels": result.best.levels, "level_of": levels}
        write_record(self._result_path, content, provenance)

    def check_database(self) -> None:
        """Raise `DarwinError` unless the database has every unit of the genome that was found."""
        for unit in self._result()["level_of"]:
            file = self.database / f"{unit}.safetensors"
            if not file.exists():
                raise DarwinError(f"{file} is missing; run darwinlm compress again, which measures that unit alone")

    def seal_export(self) -> None:
        """Note what the files of the export hold, so that damage to them is found."""
        seal_export(self.exported, self.seal_path, {"genome": self.genome.levels})

    @property
    def damage(self) -> str | None:
        """The first file of the export, other than its card, that is not what was written, or None if all are.

        Raises:
            DarwinError: if the record of what was written is missing or damaged.
        """
        return export_damage(self.exported, self.seal_path)

    def check_export(self) -> None:
        """Raise `DarwinError` if a file of the export, other than its model card, is not what was written."""
        damage = self.damage
        if damage is not None:
            raise DarwinError(
                f"the model in {self.exported} is damaged: expected the {damage} that the run wrote, found another or "
                f"none; delete {self.exported} and {self.report_path}, and run darwinlm compress again"
            )

    @property
    def _result_path(self) -> Path:
        return self.search / "result.json"

    def _result(self) -> dict[str, Any]:
        if not self.searched:
            raise DarwinError(f"the search in {self.path} has not finished; run darwinlm compress again to go on")
        return read_record(self._result_path, "levels", "level_of")


def base_of(config: CompareConfig | FrontierConfig) -> RunConfig:
    """The run in a comparison or a frontier whose database all its models share, with the settings that both have."""
    shared = {each.name for each in fields(RunConfig)} & {each.name for each in fields(config)}
    settings: dict[str, Any] = {name: getattr(config, name) for name in shared}
    settings["out"] = str(Path(config.out) / "base")
    return RunConfig(**settings)


def claim(path: Path, settings: str, config: Any, own: Sequence[str] = (), open_to: Sequence[str] = ()) -> None:
    """Claim a directory for a configuration, or check that it is that configuration's. This process must hold it.

    Args:
        settings: name of the file that holds the configuration.
        own: beginnings of the names of files that a refused command may have left, which this one takes over.
        open_to: settings that may still change, whole ones or parts (`training`); the file then takes the new ones.

    Raises:
        UsageError: if the directory holds other settings, a run of another version, or anything else.
    """
    file = path / settings
    if not file.exists():
        strangers = [entry.name for entry in path.iterdir() if not entry.name.startswith((".", settings, *own))]
        if strangers:
            raise UsageError(f"{path} is not empty and holds no run (found {strangers[0]}); choose another --out")
        _write_settings(file, config)
    old, new = _plain(read_settings(file, type(config))), _plain(config)
    if not file.read_text(encoding="utf-8").startswith(MARK):
        raise UsageError(
            f"{path} holds a run of darwinlm 0.1.0, whose files this version does not read; use another --out, or "
            "darwinlm 0.1.0"
        )
    if all(each.get("refit", {}).get("tokens") == 0 for each in (old, new)):
        new["refit"] = old["refit"]  # there is none, however it would be
    differences = _differences(old | _given(old), new | _given(new))
    changed = {name: how for name, how in differences.items() if name not in FREE}
    fixed = [how for name, how in changed.items() if not any(f"{name}.".startswith(f"{part}.") for part in open_to)]
    if fixed:
        raise UsageError(f"{path} holds another run ({'; '.join(fixed)}); choose another --out, or delete it")
    if changed:
        _write_settings(file, config)
    sweep(path)


def _write_settings(file: Path, config: Any) -> None:
    write_text(file, MARK + yaml.safe_dump(_plain(config), sort_keys=False))


def _given(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that name what was given in memory, by its name within the run: the run may have been moved."""
    names = {"model": GIVEN_MODEL, "data": GIVEN_TEXT}
    return {
        setting: name for setting, name in names.items() if settings.get(setting) == str(Path(settings["out"]) / name)
    }


def find_export(path: Path) -> Path:
    """The model directory that a path names: the export of a run or of a training, or the path itself.

    Raises:
        UsageError: if there is no model there, or the run has none yet.
        DarwinError: if the export of a run or of a training is damaged.
    """
    inside = _is_run(path)
    owner = Training(path) if (path / TRAIN_SETTINGS).is_file() else Run(path)
    export = owner.exported if inside else path
    if inside and owner.seal_path.exists() and export.exists():
        owner.check_export()
    if not (export / "config.json").is_file():
        missing = "its run has not come to its export yet, run the same command again" if inside else "name one"
        raise UsageError(f"no model in {path}: expected config.json in {export}, found none; {missing}")
    return export


def open_model(name: str, workspace: Path) -> Checkpoint:
    """That of a run or training directory, or as `find_checkpoint`. Raises `UsageError` if there is none."""
    path = Path(name).expanduser()
    return Checkpoint(find_export(path)) if _is_run(path) else find_checkpoint(name, workspace)


def _is_run(path: Path) -> bool:
    return any((path / settings).is_file() for settings in (SETTINGS, TRAIN_SETTINGS))


def load(path: Path | str, dtype: str = "auto") -> PreTrainedModel:
    """Load the model of a run, an export, a dense model's directory or the hub. Code beside the weights is never run.

    Args:
        dtype: precision of the weights; auto is that in which they are stored.

    Raises:
        UsageError: if there is no such model, or the run has none yet.
    """
    name = hub_model(str(path))
    try:
        if name is None and not Path(path).exists():
            raise FileNotFoundError("it is neither there nor a name on the hub")
        return reading.load(find_export(Path(path)) if name is None else fetch_model(name), dtype)
    except HUB_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"no model {path}: expected a run, a model directory or a hub id ({reason})") from None


def read_genome(path: Path, grid: Grid, provenance: Mapping[str, Any], flag: str = "--genome") -> Genome:
    """A genome for this model and grid: a run's `search/result.json`, or a JSON list of levels.

    Args:
        provenance: what the result of a search on this model, with these levels, would say it was made from, as far as
            it must be the same.
        flag: which names the file.

    Raises:
        UsageError: if there is no such file, it holds no genome, or the genome is for another model or other levels.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag}: no genome in {path} ({error}); name a search/result.json") from None
    levels = found.get("levels") if isinstance(found, dict) else found
    if not isinstance(levels, list) or not all(type(level) is int for level in levels):
        raise UsageError(
            f"{flag}: no genome in {path}: expected a JSON list of whole numbers, one a unit, or a "
            "search/result.json that has them; name another file"
        )
    try:
        origin = check_record(path, found, cure=AS_A_LIST)["provenance"] if isinstance(found, dict) else {}
    except DarwinError as error:
        raise UsageError(f"{flag}: {error}") from None
    for what, key in (("model", "model"), ("level grid", "grid")):
        if key in origin and key in provenance and origin[key] != provenance[key]:
            raise UsageError(
                f"{flag}: the genome in {path} is for another {what}: expected {provenance[key]}, found "
                f"{origin[key]}; {AS_A_LIST}"
            )
    genome = Genome(tuple(levels))
    grid.check(genome)
    return genome


def versions_text() -> str:
    """The versions that made an artifact, for people."""
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def versions() -> dict[str, str]:
    """The versions that made an artifact."""
    return {name: version(name) for name in ("darwinlm", "torch", "transformers")}


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as YAML has it, with lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def _differences(old: Any, new: Any, name: str = "") -> dict[str, str]:
    """What differs, by its dotted name, for people."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {name: f"its {name} is {old}, not {new}"}
    differences = {}
    for key in dict.fromkeys([*old, *new]):
        differences |= _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    return differences


@contextmanager
def explain_failures(what: str, thrift: str) -> Iterator[None]:
    """Turn failures of the machine into a `DarwinError`: a full disk, a missing directory, too little memory.

    Args:
        what: has stopped.
        thrift: what to do to need less memory.
    """
    cure = "mend this and run the same command again"
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        raise DarwinError(f"{what} has stopped: {error}; {cure}") from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ARCHIVE):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DarwinError(
            f"{what} has stopped: a file of torch's could not be read or written ({reason}); {cure}"
        ) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise DarwinError(f"{what} has stopped: out of memory; {thrift}") from None
