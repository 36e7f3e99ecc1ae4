"""Budgets: what a genome costs in parameters, operations, cache or seconds, and the most that it may cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from transformers import PretrainedConfig

from darwinlm.genome import Grid
from darwinlm.model.families import head_dim, key_value_heads
from darwinlm.types import Genome, Unit, UsageError

Measure = Literal["params", "flops", "kv-cache", "latency"]


BELOW = 0.01  # share of the limit that a result may stay below it


_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "us": 1e-6, "ms": 1e-3, "s": 1.0}


_TARGET = re.compile(r"(?P<measure>[a-z-]+)=(?P<number>[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)(?P<prefix>[A-Za-z]*)")


@dataclass(frozen=True)
class Target:
    """What `--target` asks for: a share of what the dense model costs, or an amount.

    Attributes:
        share: whether `amount` is a share, above 0 and below 1.
    """

    measure: Measure
    amount: float
    share: bool

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `params=0.6`, `params=4.7B`, `flops=0.6`, `kv-cache=12K` (bytes a token) or `latency=20ms`.

        Raises:
            UsageError: if the text is no target.
        """
        found = _TARGET.fullmatch(text.replace(" ", ""))
        known = found is not None and found["measure"] in get_args(Measure) and found["prefix"] in _PREFIXES
        amount = float(found["number"]) * _PREFIXES[found["prefix"]] if found and known else 0.0
        if found is None or amount <= 0 or (found["prefix"].endswith("s") and found["measure"] != "latency"):
            raise UsageError(
                f"--target: expected {', '.join(get_args(Measure))}, an equals sign, and a share of the dense model "
                f"below 1 or an amount (params=0.6, params=4.7B, latency=20ms), found {text!r}; give another value"
            )
        measure: Measure = found["measure"]  # pyright: ignore[reportAssignmentType]
        return cls(measure, amount, share=not found["prefix"] and amount < 1)


@dataclass(frozen=True)
class Costs:
    """What each unit costs at each level, and what the rest of the model costs whatever the genome, in one measure.

    Whole numbers, so that sums are exact and two ways to one genome agree.

    Attributes:
        measure: its name and unit, for people.
        units: `units[u][level]`.
        fixed: embeddings, norms and the head.
    """

    measure: str
    units: tuple[tuple[int, ...], ...]
    fixed: int

    def of(self, genome: Genome) -> int:
        """The cost of a whole model."""
        return self.fixed + sum(costs[level] for costs, level in zip(self.units, genome.levels, strict=True))


def parameter_costs(grid: Grid, dense_parameters: int) -> Costs:
    """Parameters as they are exported: where groups became uneven, every query head has keys and values of its own.

    Args:
        dense_parameters: of the whole dense model.
    """
    units = _tabulate(grid, _exported_parameters)
    return Costs("parameters", units, dense_parameters - sum(costs[0] for costs in units))


def flop_costs(grid: Grid, config: PretrainedConfig, context: int) -> Costs:
    """Floating-point operations for one token: two a weight, and causal attention over `context` tokens.

    A token of a whole sequence of `context` tokens sees half of them on average.
    """

    def flops(unit: Unit, removed: int) -> int:
        weights = max(0, _exported_parameters(unit, removed) - unit.fixed_parameters)
        columns = (unit.structures - removed) * unit.structure_width if unit.kind == "attention" else 0
        return 2 * weights + 2 * columns * context

    return Costs("FLOPs a token", _tabulate(grid, flops), 2 * config.vocab_size * config.hidden_size)


def cache_costs(grid: Grid, config: PretrainedConfig, bytes_each: int) -> Costs:
    """Bytes of keys and values that each token leaves in the cache."""

    def cached(unit: Unit, removed: int) -> int:
        remaining = unit.structures - removed
        if unit.kind != "attention" or not remaining:
            return 0
        queries = remaining * unit.structure_width // head_dim(config)
        return 2 * key_value_heads(unit, remaining, queries) * head_dim(config) * bytes_each

    return Costs("bytes of cache a token", _tabulate(grid, cached), 0)


def _tabulate(grid: Grid, cost: Callable[[Unit, int], int]) -> tuple[tuple[int, ...], ...]:
    rows = zip(grid.units, grid.removed, strict=True)
    return tuple(tuple(cost(unit, removed) for removed in levels) for unit, levels in rows)


def _exported_parameters(unit: Unit, removed: int) -> int:
    remaining = unit.structures - removed
    if unit.uneven and removed and remaining:
        return remaining * (unit.structure_parameters + unit.shared_parameters) + unit.fixed_parameters
    return unit.parameters(removed)


@dataclass(frozen=True)
class Budget:
    """The most that a genome may cost, the least, and the highest level that each unit may take."""

    grid: Grid
    costs: Costs
    limit: float
    floor: float
    ceilings: tuple[int, ...]

    def cost(self, genome: Genome) -> int:
        """The cost of the whole model."""
        return self.costs.of(genome)

    def fits(self, genome: Genome) -> bool:
        """Whether the genome is cheap enough and no unit is above its ceiling."""
        within = all(0 <= level <= top for level, top in zip(genome.levels, self.ceilings, strict=True))
        return within and self.cost(genome) <= self.limit

    def admits(self, genome: Genome) -> bool:
        """Whether the genome fits, and is not smaller than was asked for."""
        return self.fits(genome) and self.cost(genome) >= self.floor

    def check(self, flag: str, found: str) -> None:
        """Raise `UsageError` if no genome is within the limit, or the dense model is."""
        least, dense = self.cost(self.least), self.cost(self.grid.dense())
        if not least <= self.limit < dense:
            raise UsageError(
                f"{flag}: expected {self.costs.measure} from {amount_of(least)} ({least / dense:.1%} of the dense "
                f"model: all that can be pruned) to less than {amount_of(dense)} (dense), found {found}; give another "
                "value, or another --database.structure"
            )

    def down_to(self, genome: Genome) -> Budget:
        """The same budget, whose floor the genome does not fall below."""
        return replace(self, floor=min(self.floor, float(self.cost(genome))))

    @cached_property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The levels of each unit that are worth their cost: each is cheaper than all that lose less.

        A unit whose cost does not depend on its level has only level 0.
        """
        return tuple(
            tuple(level for level in range(top + 1) if all(costs[level] < cost for cost in costs[:level]))
            for costs, top in zip(self.costs.units, self.ceilings, strict=True)
        )

    @cached_property
    def least(self) -> Genome:
        """The cheapest genome that there is."""
        return Genome(tuple(steps[-1] for steps in self.steps))

    def worth(self, genome: Genome) -> Genome:
        """The genome with each unit at the highest level worth its cost that is not above the genome's."""
        levels = zip(self.steps, genome.levels, strict=True)
        return Genome(tuple(max(step for step in steps if step <= level) for steps, level in levels))

    def cheaper(self, genome: Genome, index: int) -> int | None:
        """The next level at which a unit costs less, if there is one."""
        return next((step for step in self.steps[index] if step > genome.levels[index]), None)

    def dearer(self, genome: Genome, index: int) -> int | None:
        """The next level at which a unit loses less, if there is one."""
        return next((step for step in reversed(self.steps[index]) if step < genome.levels[index]), None)


def limit_of(target: Target, costs: Costs, grid: Grid, ceilings: tuple[int, ...]) -> Budget:
    """The budget that a target sets.

    Raises:
        UsageError: if no genome is within it, or the dense model is.
    """
    amount = target.amount * 1e9 if target.measure == "latency" else target.amount  # latencies are nanoseconds
    limit = target.amount * costs.of(grid.dense()) if target.share else amount
    budget = Budget(grid, costs, limit, (1 - BELOW) * limit, ceilings)
    budget.check("--target", amount_of(limit))
    return budget


def amount_of(cost: float | int) -> str:
    """An amount for people, as `--target` reads it: 4.70B, 12.3ms (no unit is written where there is none to write)."""
    for prefix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if cost >= scale:
            return f"{cost / scale:.4g}{prefix}"
    return f"{cost:.4g}"
