"""Uniform allocation: every unit loses the same share. It is the baseline, and the paper's start of the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from darwinlm.config.run import RunConfig
from darwinlm.genome import Grid
from darwinlm.runtime.progress import say
from darwinlm.search.budget import BELOW, Bound, Budget, Target, limit_of
from darwinlm.search.costs import Costs, amount_of, level_costs, parameter_costs
from darwinlm.search.mutation import restore, spread, spread_within_kinds
from darwinlm.types import Genome, MovesName, UsageError

FILLINGS = 32  # random ways to give back single levels, of which the one that uses most of the budget is taken


def uniform(
    grid: Grid, costs: Costs, config: RunConfig, dense_parameters: int, further: Sequence[Costs] = ()
) -> tuple[Genome, Budget]:
    """Return the uniform genome at a run's target, and the budget within which a search looks for others.

    For a target level, what the genome of that level costs is the limit: with moves within kinds, the levels that each
    kind has left (section 3.5 of the paper), and otherwise the parameters of its export. For `--target`, and where that
    genome removes attention that must stay, the uniform genome is the largest one that fits, with single levels given
    back. In any case an export has fewer parameters than the dense model.

    Args:
        costs: what levels cost in the measure of `config.target`, in parameters where there is none.
        dense_parameters: parameters of the whole dense model.
        further: what they cost in the measures of further targets.

    Raises:
        UsageError: if the target cannot be reached, or is no smaller than the dense model.
    """
    tops, exported = ceilings(grid, config.keep_attention), parameter_costs(grid, dense_parameters)
    if config.target is not None:
        budget = limit_of(Target.parse_all(config.target), (costs, *further), grid, tops)
        genome, budget = _largest(_smaller_than_dense(_tightest_first(budget, config), exported), config)
        check_export(exported.of(genome), dense_parameters, config)
        return genome, budget
    genome = uniform_genome(grid, config.level, config.database.levels, Random(config.seed))
    limit = exported.of(genome)
    budget = Budget(grid, (Bound(exported, float(limit), (1 - BELOW) * limit),), tops)
    budget.check("--target-level", f"{config.level:g}, at which it has {amount_of(limit)}")
    if config.search.moves == "within_kinds":
        budget = _smaller_than_dense(replace(budget, bounds=_levels_left(grid, genome)), exported)
    return (genome, budget) if budget.fits(genome) else _largest(budget, config)


def _levels_left(grid: Grid, genome: Genome) -> tuple[Bound, ...]:
    """Return a bound for each kind that holds it to the sum of levels that the genome has (section 3.5)."""
    by_kind = (level_costs(grid, kind) for kind in grid.kinds())
    return tuple(Bound(costs, float(costs.of(genome)), float(costs.of(genome))) for costs in by_kind)


def _smaller_than_dense(budget: Budget, exported: Costs) -> Budget:
    """Return the budget with a bound on the size of the export, where another bound does not imply it."""
    dense = exported.of(budget.grid.dense())
    implied = budget.main.costs.measure == exported.measure or not any(unit.uneven for unit in budget.grid.units)
    return budget if implied else replace(budget, bounds=(*budget.bounds, Bound(exported, float(dense - 1))))


def check_export(parameters: int, dense_parameters: int, config: RunConfig) -> None:
    """Raise `UsageError` if an export would have as many parameters as the dense model, or more."""
    if parameters >= dense_parameters:
        raise UsageError(
            f"expected an export of less than the dense model's {dense_parameters:,} parameters, found {parameters:,}: "
            f"with --database.structure {config.database.structure}, K and V are repeated for every query head that is "
            "left; prune more, or give --database.structure kv_group or balanced"
        )


def _tightest_first(budget: Budget, config: RunConfig) -> Budget:
    """Return the budget with the bound first that the largest uniform genome within all of them uses most of.

    By it genomes are compared in size, and a start is made that the other bounds then make smaller.
    """
    genome = _first_within(budget, config)
    return replace(budget, bounds=tuple(sorted(budget.bounds, key=lambda each: -each.costs.of(genome) / each.limit)))


def _largest(budget: Budget, config: RunConfig) -> tuple[Genome, Budget]:
    start = _first_within(budget, config)
    return fullest(lambda rng: restore(start, budget, rng), budget, config.seed)


def _first_within(budget: Budget, config: RunConfig) -> Genome:
    """Return the largest uniform genome within a budget."""
    grid, levels = budget.grid, config.database.levels
    count = len(grid.units)
    # From the dense model towards smaller ones, by one unit's level at a time.
    targets = (step / count for step in range(1, levels * count))
    genomes = (uniform_genome(grid, target, levels, Random(config.seed), config.keep_attention) for target in targets)
    return next((genome for genome in map(budget.worth, genomes) if budget.fits(genome)), budget.least)


def fullest(draw: Callable[[Random], Genome], budget: Budget, seed: int) -> tuple[Genome, Budget]:
    """Return the most expensive of several random genomes within the budget, and the budget, as `_dearest` does.

    Args:
        draw: draws one genome that fits the budget.
    """
    return _dearest(_drawn(draw, seed), budget)


def _drawn(draw: Callable[[Random], Genome], seed: int) -> list[Genome]:
    return [draw(Random(f"{seed} {way}")) for way in range(FILLINGS)]


def _dearest(genomes: Sequence[Genome], budget: Budget) -> tuple[Genome, Budget]:
    """Return the most expensive of several genomes that fit the budget, and the budget.

    Where that genome costs less than the budget's floor, the floor is lowered to its cost, and the user is told so.
    """
    genome = max(genomes, key=budget.cost)
    if not budget.admits(genome):
        closest = budget.cost(genome)
        say(
            f"the level grid is too coarse to come within {BELOW:.0%} of {budget.main.text}: {amount_of(closest)} is "
            "the closest found below it; raise --database.levels"
        )
    return genome, budget.down_to(genome)


def later_start(earlier: Genome, uniform: Genome, budget: Budget, moves: MovesName, seed: int) -> tuple[Genome, Budget]:
    """Return the start of a search for a smaller model from an earlier result (section 4.1), and the budget.

    With moves within kinds, which keep each kind's sum of levels, the start has the sums of `uniform`, unless rounding
    to whole structures makes every such genome too large. Otherwise units of any kind lose levels until it fits.
    """
    if moves == "within_kinds":
        drawn = _drawn(lambda rng: spread_within_kinds(earlier, uniform, budget, rng), seed)
        fitting = [genome for genome in drawn if budget.fits(genome)]
        if fitting:
            return _dearest(fitting, budget)
    return fullest(lambda rng: spread(earlier, budget, rng), budget, seed)


def ceilings(grid: Grid, keep_attention: bool = False) -> tuple[int, ...]:
    """Return the highest level that each unit may take.

    Every unit may be removed whole, except the attention of the first block, on which every cache relies.

    Args:
        keep_attention: whether no attention may be removed whole.
    """
    attentions = [i for i, unit in enumerate(grid.units) if unit.kind == "attention"]
    kept = attentions if keep_attention else attentions[:1]
    return tuple(grid.highest(i) - (i in kept) for i in range(len(grid.units)))


def uniform_genome(grid: Grid, target_level: float, levels: int, rng: Random, keep_attention: bool = False) -> Genome:
    """Return the genome in which every unit has lost the same fraction of its levels.

    The fraction is `target_level / levels`; a unit with fewer levels takes the same fraction of its own. Where that is
    between two levels, random units of the kind get the higher one. Their number is fixed, so the sum of levels does
    not depend on the seed. Mixers, of which no fraction can go, lose nothing.

    Raises:
        UsageError: if `target_level` is not strictly between 0 and `levels`.
    """
    if not 0 < target_level < levels:
        raise UsageError(
            f"target level out of range: expected more than 0 and less than {levels}, found {target_level:g}"
        )
    result: dict[int, int] = {}
    top = ceilings(grid, keep_attention)
    for kind, members in grid.kinds().items():
        if kind == "mixer":
            result.update(dict.fromkeys(members, 0))
            continue
        total = sum(target_level / levels * grid.highest(i) for i in members)
        floors = {i: int(target_level / levels * grid.highest(i)) for i in members}
        missing = round(total - sum(floors.values()))  # levels that rounding down has lost
        raisable = [i for i in members if floors[i] < top[i]]
        raised = set(rng.sample(raisable, min(missing, len(raisable))))
        result.update({i: min(floors[i] + (i in raised), top[i]) for i in members})
    return Genome(tuple(result[i] for i in range(len(grid.units))))
