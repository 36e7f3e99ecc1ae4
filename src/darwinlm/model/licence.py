"""The licence of a model, which what is made from it carries on."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import metadata_load
from yaml import YAMLError

_FILES = ("licen[cs]e*", "copying*", "notice*", "*use_policy*", "*use-policy*", "*terms_of_use*", "*terms-of-use*")
_FIELDS = ("license", "license_name", "license_link")


def _any_case(pattern: str) -> str:
    """A pattern that heeds no case: `notice*` becomes `[nN][oO]...`; brackets may hold several letters already."""
    inside, result = False, ""
    for letter in pattern:
        inside = letter == "[" or (inside and letter != "]")
        either = letter + letter.upper()
        result += either if inside and letter.isalpha() else f"[{either}]" if letter.isalpha() else letter
    return result


# Names of the licence, notice and policy files beside a model, as the hub's client and `Path.glob` read them.
LICENCE_PATTERNS = tuple(map(_any_case, _FILES))


def licence_files(directory: Path) -> list[Path]:
    """The licence, notice and use-policy files that lie beside a model."""
    found = {file for pattern in LICENCE_PATTERNS for file in directory.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.suffix not in (".py", ".json", ".safetensors"))


def licence_of(directory: Path) -> dict[str, str]:
    """What the card of a model, its README.md, says of its licence: `license` and, if any, its name and address."""
    card = directory / "README.md"
    try:
        fields = (metadata_load(card) or {}) if card.is_file() else {}
    except (ValueError, YAMLError):  # a card whose metadata cannot be read says nothing
        fields = {}
    return {name: str(fields[name]) for name in _FIELDS if fields.get(name)}
