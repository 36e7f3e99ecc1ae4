"""The level grid, which says what the levels of a genome mean (section 3.1 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from darwinlm.types import KINDS, Genome, Kind, Unit, UsageError


@dataclass(frozen=True)
class Grid:
    """The number of structures that each unit has lost at each of its levels.

    `removed[u][i]` is the number for unit `u` at level `i`: 0 at level 0, all structures at the highest level.
    """

    units: tuple[Unit, ...]
    removed: tuple[tuple[int, ...], ...]

    def highest(self, index: int) -> int:
        """The highest level of a unit, at which the whole unit is removed."""
        return len(self.removed[index]) - 1

    def fewer(self, levels: int) -> tuple[str, ...]:
        """A sentence for each kind of unit that has fewer than the requested `levels`."""
        counts = {(unit.kind, self.highest(index)): unit for index, unit in enumerate(self.units)}
        return tuple(
            f"{kind} units have {count} levels instead of {levels}: they have {unit.structures} structures to lose"
            + (f", {unit.groups} at a time" if unit.in_turns else "")
            for (kind, count), unit in counts.items()
            if count < levels and unit.kind != "mixer"  # which leave as a whole
        )

    def kinds(self) -> dict[Kind, list[int]]:
        """The indices of the units of each kind that there is."""
        found = {unit.kind for unit in self.units}
        return {kind: [i for i, unit in enumerate(self.units) if unit.kind == kind] for kind in KINDS if kind in found}

    def dense(self) -> Genome:
        """The genome of the dense model."""
        return Genome((0,) * len(self.units))

    def left(self, genome: Genome) -> list[int]:
        """The structures of every unit that a genome leaves."""
        rows = zip(self.units, self.removed, genome.levels, strict=True)
        return [unit.structures - removed[level] for unit, removed, level in rows]

    def inputs(self, genome: Genome) -> list[int]:
        """The columns of every unit's consumer that a genome leaves."""
        return [left * unit.structure_width for left, unit in zip(self.left(genome), self.units, strict=True)]

    def check(self, genome: Genome) -> None:
        """Raise `UsageError` unless `genome` gives each unit of this model a level that exists."""
        if len(genome.levels) != len(self.units):
            raise UsageError(
                f"the genome is for another model: it has {len(genome.levels)} levels and this model "
                f"{len(self.units)} units; use a genome that was searched on this model"
            )
        for index, (unit, level) in enumerate(zip(self.units, genome.levels, strict=True)):
            if not 0 <= level <= self.highest(index):
                raise UsageError(
                    f"level out of range: {unit.name} has levels 0 to {self.highest(index)} and the genome asks for "
                    f"{level}; use a genome that was searched on this database"
                )


def level_grid(units: tuple[Unit, ...], levels: int, granularity: int, divisible_by: int = 1) -> Grid:
    """Spread `levels` equal steps over every unit's structures (section 3.1).

    A unit at level `i` of `N` has lost `Round(i * S / N)` of its `S` steps, where a step is one attention structure
    (one of every group, if structures leave in turns) or `granularity` MLP channels. A unit with fewer steps than
    levels has one level for each step. A unit that an earlier pruning has made smaller is at level 0 as it is; its
    further levels are those levels of the dense unit at which more structures are lost.

    Args:
        divisible_by: divides what every level has of query heads, KV heads and channels.

    Raises:
        UsageError: if `levels` is not positive, the granularity does not divide the number of MLP channels, or
            `divisible_by` not what the units have.
    """
    if levels < 1:
        raise UsageError(f"database.levels must be at least 1, found {levels}")
    for unit in units:
        _check_divisible(unit, divisible_by)
    return Grid(units, tuple(_removed(unit, levels, granularity, divisible_by) for unit in units))


def _check_divisible(unit: Unit, divisor: int) -> None:
    counts = {"channels": unit.structures} if unit.kind == "mlp" else {}  # a mixer leaves whole
    if unit.kind == "attention":
        counts = {"KV heads": unit.groups, "query heads": unit.structures}
    for what, count in counts.items():
        if count % divisor:
            raise UsageError(
                f"--database.divisible-by: expected a divisor of the {count} {what} of {unit.name}, found {divisor}; "
                "give another value"
            )


def _removed(unit: Unit, levels: int, granularity: int, divisible_by: int) -> tuple[int, ...]:
    step = granularity if unit.kind == "mlp" else unit.groups if unit.in_turns else 1
    step = step if unit.kind not in ("attention", "mlp") else lcm(step, divisible_by)
    if step < 1 or unit.structures % step:
        raise UsageError(
            f"database.granularity must divide the {unit.structures} channels of {unit.name}, found {step}"
        )
    steps = (unit.structures + unit.lost) // step
    count = min(levels, steps)
    # Round half up, unlike Python's round, so that equal fractions of different units round alike.
    of_dense = (step * ((2 * level * steps + count) // (2 * count)) for level in range(count + 1))
    return (0, *(removed - unit.lost for removed in of_dense if removed > unit.lost))


def prunable_parameters(grid: Grid, genome: Genome) -> int:
    """Parameters of all units at the genome's levels, without the embeddings, the final norm and the output matrix."""
    return sum(
        unit.parameters(removed[level])
        for unit, removed, level in zip(grid.units, grid.removed, genome.levels, strict=True)
    )
