"""Files of settings in YAML: read as plain data, so that nothing that they name is ever imported or run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from darwinlm.config.run import RunConfig
from darwinlm.types import UsageError

Settings = TypeVar("Settings")


MOST = 1 << 20  # bytes of a file, and values in it once what it repeats by reference is written out


def read_settings(path: Path, kind: type[Settings] = RunConfig) -> Settings:
    """Read settings from a YAML file that holds all of them, such as the `run.yaml` of a run directory.

    Raises:
        UsageError: if the file does not hold such settings.
    """
    cure = "restore it or use another directory"
    try:
        plain = read_plain(path)
        check_known("the file", plain, kind)
        if isinstance(plain.get("refit"), dict):
            plain["refit"].setdefault("rank", 0)  # earlier versions trained consumers alone
        parser = settings_parser(kind)
        settings = parser.parse_object(plain)
    except (ArgumentError, UsageError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} does not hold the settings of a run ({reason}); {cure}") from None
    return kind(**parser.instantiate(settings).as_dict())


@cache
def settings_parser(kind: type) -> ArgumentParser:
    """The parser of settings of a kind, which is slow to build."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


def read_plain(path: Path, flag: str | None = None) -> dict[str, Any]:
    """What a YAML file holds: dicts, lists and single values.

    Args:
        flag: which names the file, if one does.

    Raises:
        UsageError: if it cannot be read, has tags, is far too large, or holds no names with values.
    """
    name = str(path) if flag is None else f"{flag}: {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MOST + 1)
        plain = yaml.safe_load(data) if len(data) <= MOST else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} cannot be read as YAML ({reason}); check the name and the file") from None
    if len(data) > MOST or not _is_small(plain):
        raise UsageError(f"{name} is too large for settings: expected at most {MOST:,} bytes and values; check it")
    if not isinstance(plain, dict):
        found = "nothing" if plain is None else type(plain).__name__
        raise UsageError(f"{name}: expected settings by their names, found {found}; check the file")
    return plain


def _is_small(plain: Any) -> bool:
    """Whether a value has at most `MOST` values in it, however often it refers to the same ones."""
    waiting, seen = [plain], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        waiting += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        if seen + len(waiting) > MOST:
            return False
    return True


def check_known(
    section: str, values: Mapping[Any, Any], *kinds: type, others: Sequence[str] = (), within: str = ""
) -> None:
    """Check that settings have names that are known, down to the last section: the parser would import a class.

    Args:
        section: what has the values, for the message.
        kinds: dataclasses whose fields are known.
        others: further names that are.
        within: what stands before a name in the section: `search.` for stages.

    Raises:
        UsageError: if a name is unknown, or a section holds anything but names with values.
    """
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for name, value in values.items():
        if name not in hints and name not in others:
            known = ", ".join(dict.fromkeys([*hints, *others]))
            raise UsageError(f"{section}: expected settings among {known}, found {name!r}; check its name")
        hint = hints.get(name, str)
        items = [item for item in get_args(hint) if dataclasses.is_dataclass(item)]
        if dataclasses.is_dataclass(hint):
            _check_section(f"{within}{name}", value, hint)
        elif items and isinstance(value, list | tuple):
            for each in value:
                _check_section(f"{within}{name}", each, items[0])


def _check_section(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}: expected a dict of settings or their dataclass, found {value!r}; give one")
    check_known(name, value, kind, within=f"{name}.")
