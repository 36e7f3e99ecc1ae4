"""Cells of a table that takes hours: each is measured once and kept as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from darwinlm.runtime.files import read_json_lines


def cells(file: Path, wanted: Iterable[Mapping[str, Any]], measure: Callable[..., Mapping[str, Any]]) -> list[Any]:
    """The lines of `wanted`: its keys and what `measure` finds for them. Those in `file` are not measured again."""
    known: list[Any] = read_json_lines(file) if file.exists() else []
    chosen = []
    for keys in wanted:
        found = next((line for line in known if line.items() >= keys.items()), None)
        if found is None:
            found = {**keys, **measure(**keys)}
            known.append(found)
            file.write_text("".join(json.dumps(line) + "\n" for line in known))
        chosen.append(found)
    return chosen
