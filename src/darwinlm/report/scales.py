"""Scales that pictures and charts share: titles and ranges of axes, what is on them, and numbers as ticks have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from darwinlm.genome import Grid
from darwinlm.types import Generation, Genome, Kind

MARGIN = 0.12  # of a range, above and below what is drawn
NEAR = 1.0  # heights of a range: a line that is farther from it gets a range of its own
TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
LEFT: dict[Kind, str] = {
    "attention": "attention heads left (%)",
    "mlp": "MLP channels left (%)",
    "mixer": "mixers left (%)",
}


Span = tuple[float, float]


def spans(values: Iterable[float], lines: Iterable[float]) -> list[Span]:
    """Return the range of the axis that shows `values`, and a second one above for level lines that lie far above.

    One range for both would leave the values a fraction of the picture.

    Args:
        values: what is to be read off; there is at least one.
        lines: the heights of level lines beside them.
    """
    drawn, heights = list(values), list(lines)
    low, high = min(drawn), max(drawn)
    height = (high - low) or abs(high) or 1.0
    far = [line for line in heights if line > high + NEAR * height]
    near = [line for line in heights if line not in far]
    result = [_with_margin(min([low, *near]), max([high, *near]))]
    return [*result, _with_margin(min(far), max(far))] if far else result


def _with_margin(low: float, high: float) -> Span:
    margin = MARGIN * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def percent_left(grid: Grid, genome: Genome, members: Sequence[int]) -> list[float]:
    """Return the share of structures that is left of each of these units, in per cent."""
    return [100 * (1 - grid.removed[i][genome.levels[i]] / grid.units[i].structures) for i in members]


def short(number: float) -> str:
    """Return a number with three significant digits, however small it is."""
    return f"{number:.3g}"


def elapsed(history: Sequence[Generation]) -> tuple[list[float], str]:
    """Return the time that a search had taken after each generation, and its unit."""
    seconds = list(accumulate(line.seconds for line in history))
    size, unit = next((pair for pair in TIME_UNITS if seconds[-1] >= 2 * pair[0]), TIME_UNITS[-1])
    return [second / size for second in seconds], unit
