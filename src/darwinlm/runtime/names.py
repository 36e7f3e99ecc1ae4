"""Names of models and data sets on the Hugging Face hub: `NAME[:CONFIG[:SPLIT]][@REVISION]`, one grammar for both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# A configuration may be empty where a split follows. A revision is a branch, a tag, a commit or a `refs/...`.
_GRAMMAR = re.compile(
    r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)"
    r"(?::(?P<config>[^:@/]+)|:(?P<config_of_split>[^:@/]*):(?P<split>[\w.-]+))?"
    r"(?:@(?P<revision>[^\s:@]+))?"
)


@dataclass(frozen=True)
class HubName:
    """What a user names on the hub.

    Attributes:
        repository: `OWNER/NAME`, or `NAME` for one of the first data sets, which have no owner.
        config: the configuration of a data set; None for its default.
        split: of a data set; None for the default, `train`.
        revision: a branch, tag or commit; None for the newest.
    """

    repository: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def hub_name(text: str) -> HubName | None:
    """What a text means on the hub, or None if it is a path or nothing that the hub could have.

    What exists on this machine is a path, whatever is in its name, and so is what begins with `.`, `~` or `/`.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None or text.startswith(".") or Path(text).exists():
        return None
    config = match["config"] or match["config_of_split"] or None
    return HubName(match["repository"], config, match["split"], match["revision"])


def hub_model(text: str) -> HubName | None:
    """What a text means on the hub as the name of a model, `OWNER/NAME[@REVISION]`, or None if it is none."""
    name = hub_name(text)
    return None if name is None or "/" not in name.repository or name.config or name.split else name


def short_name(model: str) -> str:
    """The last part of a model's name or path, without its revision."""
    name = hub_name(model)
    return Path(model if name is None else name.repository).name
