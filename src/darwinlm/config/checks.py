"""Checks that settings share: each refuses a value in one sentence that names the flag."""

from __future__ import annotations

import math

from darwinlm.types import UsageError


def expect(holds: bool, flag: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(f"--{flag.replace('_', '-')}: expected {expected}, found {found}; give another value")


def expect_at_least(config: object, section: str, **lowest: int) -> None:
    """Of the fields that are given; without a section flags are named by the field alone."""
    for name, least in lowest.items():
        found = getattr(config, name)
        expect(found is None or found >= least, f"{section}.{name}".lstrip("."), f"at least {least}", found)


def expect_positive(config: object, section: str, *names: str) -> None:
    for name in names:
        found = getattr(config, name)
        expect(0 < found < math.inf, f"{section}.{name}", "more than 0", found)


def expect_seed(seed: int) -> None:
    """Raise `UsageError` unless every generator takes the seed."""
    expect(0 <= seed < 2**32, "seed", "0 to 4294967295", seed)


def expect_named(config: object, *names: str) -> None:
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
    """A uniform level at which every unit has lost something, and not all."""
    expected = f"a level between 0 and {levels} (--database.levels), both excluded"
    expect(0 < level < levels, "target_level", expected, f"{level:g}")
