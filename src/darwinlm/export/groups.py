"""Weights of four bits in groups, as compressed-tensors has them: which groups divide the rows of matrices."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

from torch import nn
from transformers import PreTrainedModel

from darwinlm.genome import Grid

GROUPS = (128, 64, 32)  # columns that share a scale: the usual number, and those that kernels take besides


def largest_group(widths: Iterable[int]) -> int:
    """The largest of `GROUPS` that divides all widths, 1 if none does."""
    widths = list(widths)
    return next((group for group in GROUPS if all(width % group == 0 for width in widths)), 1)


def group_note(model: PreTrainedModel) -> str:
    """A sentence on the groups that an export's matrices allow, for whoever quantises it to four bits."""
    matrices = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
    group = largest_group(matrix.in_features for matrix in matrices)
    other = [matrix.weight.numel() for matrix in matrices if matrix.in_features % GROUPS[0]]
    if not other:
        return f"4-bit weights: groups of {GROUPS[0]} divide the rows of all matrices"
    share = sum(other) / sum(matrix.weight.numel() for matrix in matrices)
    fits = f"groups of {group} do" if group > 1 else f"nor do groups of {GROUPS[-1]} all"
    return (
        f"4-bit weights: groups of {GROUPS[0]} do not divide the rows of {share:.0%} of the weights, {fits}; "
        "darwinlm plan names the settings that make larger ones fit"
    )


def group_row(grid: Grid, hidden: int) -> str:
    """What the levels of a grid allow, with the settings by which larger groups fit all of them.

    Args:
        hidden: the width of the stream, which all other matrices read.
    """
    widths = {"attention": set[int](), "mlp": set[int](), "mixer": set[int]()}
    for unit, counts in zip(grid.units, grid.removed, strict=True):
        widths[unit.kind] |= {(unit.structures - removed) * unit.structure_width for removed in counts[:-1]}
    found = largest_group({hidden, *widths["attention"], *widths["mlp"]})
    whole = {unit.structures * unit.structure_width for unit in grid.units if unit.kind != "mixer"}
    best = largest_group({hidden, *whole})
    row = f"groups of {found} fit every level" if found > 1 else f"groups of {GROUPS[-1]} do not fit every level"
    return row if found == best else f"{row}; {' '.join(_settings(grid, widths, best))} makes groups of {best} fit"


def _settings(grid: Grid, widths: dict[str, set[int]], group: int) -> list[str]:
    """The settings by which all levels of a unit have widths that a group divides."""
    settings = [f"--database.granularity {group}"] if largest_group(widths["mlp"]) < group else []
    if largest_group(widths["attention"]) < group:
        width = gcd(group, *(unit.structure_width for unit in grid.units if unit.kind == "attention"))
        settings.append(f"--database.divisible-by {group // width}")
    return settings
