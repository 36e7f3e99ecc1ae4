"""What a genome costs in parameters, operations, cache or seconds, and the budget: the most that it may cost."""

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
class Costs:
    """The cost, in one measure, of each unit at each level and of the rest of the model.

    Costs are whole numbers, so that sums are exact and do not depend on their order.

    Attributes:
        measure: name and unit of the measure, as messages show it.
        units: the cost of unit `u` at a level is `units[u][level]`.
        fixed: the cost of what no genome removes, such as embeddings and the final norm.
    """

    measure: str
    units: tuple[tuple[int, ...], ...]
    fixed: int

    def of(self, genome: Genome) -> int:
        """Return the cost of the whole model that a genome describes."""
        return self.fixed + sum(costs[level] for costs, level in zip(self.units, genome.levels, strict=True))


def parameter_costs(grid: Grid, dense_parameters: int) -> Costs:
    """Return the costs in parameters of an export.

    Where KV groups differ in size, an export gives every query head a KV head of its own, which these costs include.

    Args:
        dense_parameters: parameters of the whole dense model.
    """
    units = _tabulate(grid, _exported_parameters)
    return Costs("parameters", units, dense_parameters - sum(costs[0] for costs in units))


def flop_costs(grid: Grid, config: PretrainedConfig, context: int) -> Costs:
    """Return the costs in floating-point operations for one token of a sequence of `context` tokens.

    They are two for each weight, and those of causal attention, in which a token sees half the sequence on average.
    """

    def flops(unit: Unit, removed: int) -> int:
        weights = max(0, _exported_parameters(unit, removed) - unit.fixed_parameters)
        columns = (unit.structures - removed) * unit.structure_width if unit.kind == "attention" else 0
        return 2 * weights + 2 * columns * context

    return Costs("FLOPs a token", _tabulate(grid, flops), 2 * config.vocab_size * config.hidden_size)


def cache_costs(grid: Grid, config: PretrainedConfig, bytes_each: int) -> Costs:
    """Return the costs in bytes of keys and values that each token adds to the cache.

    Args:
        bytes_each: bytes of one number in the cache.
    """

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
    """The bounds within which a genome is sought.

    Attributes:
        limit: the most that a genome may cost.
        floor: the least that a genome should cost, so that the budget is used.
        ceilings: the highest level that each unit may take.
    """

    grid: Grid
    costs: Costs
    limit: float
    floor: float
    ceilings: tuple[int, ...]

    def cost(self, genome: Genome) -> int:
        """Return the cost of the whole model that a genome describes."""
        return self.costs.of(genome)

    def fits(self, genome: Genome) -> bool:
        """Return whether the genome costs no more than the limit and no unit is above its ceiling."""
        within = all(0 <= level <= top for level, top in zip(genome.levels, self.ceilings, strict=True))
        return within and self.cost(genome) <= self.limit

    def admits(self, genome: Genome) -> bool:
        """Return whether the genome fits, and does not cost less than the floor."""
        return self.fits(genome) and self.cost(genome) >= self.floor

    def check(self, flag: str, value: str) -> None:
        """Raise `UsageError` if no genome is within the limit, or if the dense model already is.

        Args:
            flag: the flag that set the limit, for the message.
            value: what the flag was given, for the message.
        """
        least, dense = self.cost(self.least), self.cost(self.grid.dense())
        if not least <= self.limit < dense:
            raise UsageError(
                f"{flag}: expected {self.costs.measure} from {amount_of(least)} ({least / dense:.1%} of the dense "
                f"model: all that can be pruned) to less than {amount_of(dense)} (dense), found {value}; give another "
                "value, or another --database.structure"
            )

    def down_to(self, genome: Genome) -> Budget:
        """Return the same budget with a floor that is at most the cost of the genome."""
        return replace(self, floor=min(self.floor, float(self.cost(genome))))

    @cached_property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The levels of each unit that save something: each costs less than every lower level.

        A unit whose cost does not depend on its level has only level 0.
        """
        return tuple(
            tuple(level for level in range(top + 1) if all(costs[level] < cost for cost in costs[:level]))
            for costs, top in zip(self.costs.units, self.ceilings, strict=True)
        )

    @cached_property
    def least(self) -> Genome:
        """The genome of least cost."""
        return Genome(tuple(steps[-1] for steps in self.steps))

    def worth(self, genome: Genome) -> Genome:
        """Return the genome with each unit at its highest level among `steps` that is not above the genome's level."""
        levels = zip(self.steps, genome.levels, strict=True)
        return Genome(tuple(max(step for step in steps if step <= level) for steps, level in levels))

    def cheaper(self, genome: Genome, index: int) -> int | None:
        """Return the next higher level of a unit, at which it costs less, or None if there is none."""
        return next((step for step in self.steps[index] if step > genome.levels[index]), None)

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
    budget = Budget(grid, costs, limit, (1 - BELOW) * limit, ceilings)
    budget.check("--target", amount_of(limit))
    return budget


def amount_of(cost: float | int) -> str:
    """Return an amount as `--target` reads it, for example 4.7B, without a unit."""
    for prefix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if cost >= scale:
            return f"{cost / scale:.4g}{prefix}"
    return f"{cost:.4g}"
