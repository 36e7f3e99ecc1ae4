"""Checks of settings. Each refuses a value in one sentence that names its flag."""

from __future__ import annotations

import math
import re
from typing import get_type_hints

from darwinlm.types import UsageError

# The most that a count may be: some times what anybody has asked for. More is a slip, and would fill memory or disk.
LARGEST = {
    "tokens": 10**14,
    "skip": 10**14,
    "training_tokens": 10**12,
    "fitness_tokens": 10**10,
    "evaluation_tokens": 10**10,
    "mask_tokens": 10**10,
    "limit": 10**9,
    "warmup_steps": 10**9,
    "log_every": 10**9,
    "evaluate_every": 10**9,
    "save_every": 10**9,
    "levels": 1 << 12,
    "offspring": 10**5,
    "repeats": 10**4,
}


MOST = 1 << 20  # of anything else that is counted: sequences, tokens of a prompt, channels


def expect(holds: bool, flag: str, expected: str, found: object) -> None:
    """Raise `UsageError` unless a condition on the value of a flag holds."""
    if not holds:
        raise UsageError(f"--{flag.replace('_', '-')}: expected {expected}, found {found}; give another value")


def expect_counts(config: object, section: str, **lowest: int) -> None:
    """Raise `UsageError` if a field is no whole number, below its lowest value, or above what `LARGEST` allows.

    Args:
        section: the name of the settings that have the fields; empty for those of a command.
    """
    types = get_type_hints(type(config))
    for name, least in lowest.items():
        value = getattr(config, name)
        if value is not None or types[name] is int:
            expect_count(value, f"{section}.{name}".lstrip("."), least, LARGEST.get(name, MOST))


def expect_count(value: object, flag: str, least: int, most: int, what: str = "") -> None:
    """Raise `UsageError` unless a value is a whole number within bounds.

    Args:
        what: is counted, if the flag does not say so.
    """
    if type(value) is not int:
        raise UsageError(f"--{flag.replace('_', '-')}: expected a whole number{what}, found {value!r}; give one")
    expect(value >= least, flag, f"at least {least}{what}", value)
    expect(value <= most, flag, f"at most {most:,}{what}", f"{value:,}")


def expect_positive(config: object, section: str, *names: str) -> None:
    """Raise `UsageError` unless every named field is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        positive = isinstance(value, int | float) and 0 < value < math.inf
        expect(positive, f"{section}.{name}", "a number above 0", value)


def expect_seed(seed: int) -> None:
    """Raise `UsageError` unless every random generator accepts the seed."""
    expect(type(seed) is int and 0 <= seed < 2**32, "seed", "0 to 4294967295", seed)


def expect_size(text: str | None, flag: str) -> None:
    """Raise `UsageError` unless a size of memory is not given, or can be read."""
    if text is not None:
        expect(bytes_of(text) is not None, flag, "a size such as 24GB or 22GiB", repr(text))


def bytes_of(text: str) -> int | None:
    """The bytes that a size such as `24GB` (10^9) or `22.5GiB` (2^30) means, or None if it is no size."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG])(i?)B", text)
    if match is None or not float(match[1]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("MG".index(match[2]) + 2))


def expect_named(config: object, *names: str) -> None:
    """Raise `UsageError` if a field is empty, or could not be written to a file of settings."""
    for name in names:
        value = getattr(config, name)
        expect(isinstance(value, str) and bool(value), name, "a name", repr(value) if value else "nothing")
        expect(is_utf8(value), name, "a name in UTF-8", ascii(value))


def is_utf8(text: str) -> bool:
    """Whether a text can be written to a file; names of files that are no UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode() == text


def expect_one_size(target: str | None, target_level: float | None) -> None:
    """Raise `UsageError` if a size is given in both ways."""
    if target is not None and target_level is not None:
        raise UsageError(
            f"--target and --target-level: expected one of them, found both ({target} and level {target_level:g}); "
            "leave one out"
        )


def expect_level(level: float, levels: int) -> None:
    """Raise `UsageError` unless at a uniform level every unit has lost something, but not everything."""
    expected = f"a level between 0 and {levels} (--database.levels), both excluded"
    expect(0 < level < levels, "target_level", expected, f"{level:g}")
