"""The budget of a search: the most that a genome may cost, in one measure or in several."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from darwinlm.genome import Grid
from darwinlm.search.costs import Costs
from darwinlm.types import Genome, UsageError

Measure = Literal["params", "flops", "kv-cache", "latency"]


BELOW = 0.01  # how far below the limit a result may be, as a share of the limit


_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "us": 1e-6, "ms": 1e-3, "s": 1.0}


_TARGET = re.compile(r"(?P<measure>[a-z-]+)=(?P<number>[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)(?P<prefix>[A-Za-z]*)")


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
        """Read `params=0.6`, `params=4.7B`, `flops=0.6`, `kv-cache=12K` (bytes a token) or `latency=20ms`.

        Raises:
            UsageError: if the text is not of this form.
        """
        match = _TARGET.fullmatch(text.replace(" ", ""))
        known = match is not None and match["measure"] in get_args(Measure) and match["prefix"] in _PREFIXES
        amount = float(match["number"]) * _PREFIXES[match["prefix"]] if match and known else 0.0
        if match is None or amount <= 0 or (match["prefix"].endswith("s") and match["measure"] != "latency"):
            raise UsageError(
                f"--target: expected {', '.join(get_args(Measure))}, an equals sign, and a share of the dense model "
                f"below 1 or an amount (params=0.6, params=4.7B, latency=20ms), found {text!r}; give another value"
            )
        measure: Measure = match["measure"]  # pyright: ignore[reportAssignmentType]
        return cls(measure, amount, share=not match["prefix"] and amount < 1)


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
        return f"{amount_of(self.limit)} {self.costs.measure}"


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

    def check(self, flag: str, value: str) -> None:
        """Raise `UsageError` if no genome is within the main limit, or if the dense model already is within all.

        Args:
            flag: the flag that set the limit, for the message.
            value: what the flag was given, for the message.
        """
        least, dense = self.cost(self.least), self.cost(self.grid.dense())
        if least > self.main.limit or not self.exceeded(self.grid.dense()):
            raise UsageError(
                f"{flag}: expected {self.main.costs.measure} from {amount_of(least)} ({least / dense:.1%} of the dense "
                f"model: all that can be pruned) to less than {amount_of(dense)} (dense), found {value}; give another "
                "value, or another --database.structure"
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

    def dearer(self, genome: Genome, index: int) -> int | None:
        """Return the next lower level of a unit, at which it costs more, or None if there is none."""
        return next((step for step in reversed(self.steps[index]) if step < genome.levels[index]), None)


def limit_of(target: Target, costs: Costs, grid: Grid, ceilings: tuple[int, ...]) -> Budget:
    """Return the budget that a target sets.

    Raises:
        UsageError: if no genome is within it, or if the dense model already is.
    """
    amount = target.amount * 1e9 if target.measure == "latency" else target.amount  # costs of latency are nanoseconds
    limit = target.amount * costs.of(grid.dense()) if target.share else amount
    budget = Budget(grid, (Bound(costs, limit, (1 - BELOW) * limit),), ceilings)
    budget.check("--target", amount_of(limit))
    return budget


def amount_of(cost: float | int) -> str:
    """Return an amount as `--target` reads it, for example 4.7B, without a unit."""
    for prefix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if cost >= scale:
            return f"{cost / scale:.4g}{prefix}"
    return f"{cost:.4g}"
