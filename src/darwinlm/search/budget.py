"""The budget of a search: the most that a genome may cost, in one measure or in several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from darwinlm.genome import Grid
from darwinlm.search.costs import PICO, Costs
from darwinlm.types import Genome, UsageError

Measure = Literal["params", "flops", "kv-cache", "latency", "memory", "decode", "prefill"]
TIMED = ("latency", "decode", "prefill")  # what has to be measured on the device
BELOW = 0.01  # how far below the limit a result may be, as a share of the limit


_NUMBERS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


_BYTES: dict[str, float] = {
    f"{prefix}{i}B": (1024 if i else 1000) ** power for power, prefix in enumerate("KMGT", 1) for i in ("", "i")
}


_RATES: dict[str, float] = {"": 1.0, "tok/s": 1.0, "t/s": 1.0}


_UNITS: dict[str, dict[str, float]] = {
    "params": _NUMBERS,
    "flops": _NUMBERS,
    "kv-cache": _NUMBERS,
    "latency": {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0},
    "memory": {"": 1.0} | _BYTES,
    "decode": _RATES,
    "prefill": _RATES,
}


_TARGET = re.compile(r"(?P<measure>[a-z-]+)=(?P<number>[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)(?P<unit>[A-Za-z/]*)")


@dataclass(frozen=True)
class Target:
    """The size that `--target` asks for: a share of the dense model's cost, or an amount.

    Attributes:
        share: whether `amount` is a share of the dense model's cost, above 0 and below 1.
    """

    measure: Measure
    amount: float
    share: bool

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `params=0.6`, `params=4.7B`, `kv-cache=12K` (bytes a token), `latency=20ms`, `memory=3GB`.

        A rate is an amount (`decode=20tok/s`) or a multiple of the dense model's (`decode=1.5x`).

        Raises:
            UsageError: if the text is not of this form.
        """
        match = _TARGET.fullmatch(text.replace(" ", ""))
        measure = match["measure"] if match else ""
        number, unit = (float(match["number"]), match["unit"]) if match else (0.0, "")
        times = unit == "x" and measure in ("decode", "prefill") and number > 1
        if number <= 0 or not (times or unit in _UNITS.get(measure, {})):
            raise UsageError(
                f"--target: expected {', '.join(get_args(Measure))}, an equals sign, and a share of the dense model "
                "below 1 or an amount (params=0.6, params=4.7B, memory=3GB, latency=20ms, decode=20tok/s, "
                f"decode=1.5x), several with commas, found {text!r}; give another value"
            )
        if times:
            return cls(measure, 1 / number, share=True)  # pyright: ignore[reportArgumentType]
        amount = number * _UNITS[measure][unit]
        share = not unit and amount < 1 and _UNITS[measure] is not _RATES
        return cls(measure, amount, share)  # pyright: ignore[reportArgumentType]

    @classmethod
    def parse_all(cls, text: str) -> tuple[Target, ...]:
        """Read several targets with commas between them.

        Raises:
            UsageError: if one is not of this form, or two are of one measure.
        """
        targets = tuple(map(cls.parse, text.split(",")))
        if len({target.measure for target in targets}) < len(targets):
            raise UsageError(f"--target: expected every measure once, found {text!r}; leave one out")
        return targets

    def limit(self, costs: Costs, grid: Grid) -> float:
        """Return the most that a genome may cost."""
        if self.share:
            return self.amount * costs.of(grid.dense())
        if costs.rate:
            return PICO / self.amount
        return self.amount * 1e9 if self.measure == "latency" else self.amount  # costs of latency are nanoseconds


@dataclass(frozen=True)
class Bound:
    """The most that a genome may cost in one measure.

    Attributes:
        floor: the least that a genome should cost, so that the budget is used.
    """

    costs: Costs
    limit: float
    floor: float = 0.0

    @property
    def text(self) -> str:
        """The limit and its measure, for messages."""
        return f"{self.costs.shown(self.limit)} {self.costs.measure}"


@dataclass(frozen=True)
class Budget:
    """The bounds within which a genome is sought.

    Attributes:
        bounds: at least one; a genome keeps within all of them.
        ceilings: the highest level that each unit may take.
    """

    grid: Grid
    bounds: tuple[Bound, ...]
    ceilings: tuple[int, ...]

    @property
    def main(self) -> Bound:
        """The first bound, by whose costs genomes are compared in size."""
        return self.bounds[0]

    @property
    def text(self) -> str:
        """The limits, for messages."""
        return " and ".join(bound.text for bound in self.bounds)

    def cost(self, genome: Genome) -> int:
        """Return the cost of the whole model that a genome describes, in the measure of the main bound."""
        return self.main.costs.of(genome)

    def exceeded(self, genome: Genome) -> list[Bound]:
        """Return the bounds that the genome exceeds."""
        return [bound for bound in self.bounds if bound.costs.of(genome) > bound.limit]

    def fits(self, genome: Genome) -> bool:
        """Return whether the genome keeps within all bounds and no unit is above its ceiling."""
        within = all(0 <= level <= top for level, top in zip(genome.levels, self.ceilings, strict=True))
        return within and not self.exceeded(genome)

    def admits(self, genome: Genome) -> bool:
        """Return whether the genome fits, and costs no less than the floors."""
        return self.fits(genome) and all(bound.costs.of(genome) >= bound.floor for bound in self.bounds)

    def check(self, flag: str, value: str | None = None) -> None:
        """Raise `UsageError` if no genome is within some limit, or if the dense model already is within all.

        Args:
            flag: the flag that set the limits, for the message.
            value: what the flag was given, for the message; by default the limit that cannot be met.
        """
        unmet = next((bound for bound in self.bounds if bound.costs.of(self.least) > bound.limit), None)
        if unmet is None and self.exceeded(self.grid.dense()):
            return
        costs = (unmet or self.main).costs
        least, dense = costs.of(self.least), costs.of(self.grid.dense())
        ends = "from {} ({:.1%} of the dense model: all that can be pruned) to less than {} (dense)"
        if costs.rate:
            ends = "up to {} ({:.1%} of the dense model's time: all that can be pruned) and more than {} (dense)"
        raise UsageError(
            f"{flag}: expected {costs.measure} {ends.format(costs.shown(least), least / dense, costs.shown(dense))}, "
            f"found {value or costs.shown((unmet or self.main).limit)}; give another value, or another "
            "--database.structure"
        )

    def down_to(self, genome: Genome) -> Budget:
        """Return the same budget with floors that are at most the cost of the genome."""
        lowered = (replace(b, floor=min(b.floor, float(b.costs.of(genome)))) for b in self.bounds)
        return replace(self, bounds=tuple(lowered))

    @cached_property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The levels of each unit that save something: each costs less, by some bound, than every lower level.

        A unit whose cost does not depend on its level has only level 0.
        """
        return tuple(
            tuple(
                level
                for level in range(top + 1)
                if any(all(costs[level] < cost for cost in costs[:level]) for costs in self._costs_of(index))
            )
            for index, top in enumerate(self.ceilings)
        )

    def _costs_of(self, index: int) -> list[tuple[int, ...]]:
        """Return the costs of a unit at each level, by bound."""
        return [bound.costs.units[index] for bound in self.bounds]

    @cached_property
    def least(self) -> Genome:
        """The genome of least cost."""
        return Genome(tuple(steps[-1] for steps in self.steps))

    def worth(self, genome: Genome) -> Genome:
        """Return the genome with each unit at its highest level among `steps` that is not above the genome's level."""
        levels = zip(self.steps, genome.levels, strict=True)
        return Genome(tuple(max(step for step in steps if step <= level) for steps, level in levels))

    def cheaper(self, genome: Genome, index: int, costs: Sequence[int] | None = None) -> int | None:
        """Return the next higher level of a unit, at which it costs less, or None if there is none.

        Args:
            costs: the unit's, in the measure that counts; those of the main bound by default.
        """
        costs, now = costs or self.main.costs.units[index], genome.levels[index]
        return next((step for step in self.steps[index] if step > now and costs[step] < costs[now]), None)

    def dearer(self, genome: Genome, index: int) -> int | None:
        """Return the next lower level of a unit, at which it costs more, or None if there is none."""
        return next((step for step in reversed(self.steps[index]) if step < genome.levels[index]), None)


def limit_of(targets: Sequence[Target], costs: Sequence[Costs], grid: Grid, ceilings: tuple[int, ...]) -> Budget:
    """Return the budget that targets set, each with the costs of its measure. One alone has to be used up.

    Raises:
        UsageError: if no genome is within it, or if the dense model already is.
    """
    limits = [(each, target.limit(each, grid)) for target, each in zip(targets, costs, strict=True)]
    floor = 1 - BELOW if len(targets) == 1 else 0.0
    budget = Budget(grid, tuple(Bound(each, limit, floor * limit) for each, limit in limits), ceilings)
    budget.check("--target")
    return budget
