"""Checks of settings. Each refuses a value in one sentence that names its flag."""

from __future__ import annotations

import math

from darwinlm.types import UsageError


def expect(holds: bool, flag: str, expected: str, found: object) -> None:
    """Raise `UsageError` unless a condition on the value of a flag holds."""
    if not holds:
        raise UsageError(f"--{flag.replace('_', '-')}: expected {expected}, found {found}; give another value")


def expect_at_least(config: object, section: str, **lowest: int) -> None:
    """Raise `UsageError` if a field that is not None is below its lowest value.

    Args:
        section: the name of the settings that have the fields; empty for those of a command.
    """
    for name, least in lowest.items():
        value = getattr(config, name)
        expect(value is None or value >= least, f"{section}.{name}".lstrip("."), f"at least {least}", value)


def expect_positive(config: object, section: str, *names: str) -> None:
    """Raise `UsageError` unless every named field is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        expect(0 < value < math.inf, f"{section}.{name}", "more than 0", value)


def expect_seed(seed: int) -> None:
    """Raise `UsageError` unless every random generator accepts the seed."""
    expect(0 <= seed < 2**32, "seed", "0 to 4294967295", seed)


def expect_named(config: object, *names: str) -> None:
    """Raise `UsageError` if a field is empty."""
    for name in names:
        expect(bool(getattr(config, name)), name, "a name", "nothing")


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
