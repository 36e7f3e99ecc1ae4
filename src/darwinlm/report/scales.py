"""Scales that pictures and charts share: ranges of axes, and numbers as ticks have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from darwinlm.types import Generation

MARGIN = 0.12  # of a range, above and below what is drawn
NEAR = 1.0  # heights of a range: a line that is farther from it gets a range of its own
TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


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


def short(number: float) -> str:
    """Return a number with three significant digits, however small it is."""
    return f"{number:.3g}"


def elapsed(history: Sequence[Generation]) -> tuple[list[float], str]:
    """Return the time that a search had taken after each generation, and its unit."""
    seconds = list(accumulate(line.seconds for line in history))
    size, unit = next((pair for pair in TIME_UNITS if seconds[-1] >= 2 * pair[0]), TIME_UNITS[-1])
    return [second / size for second in seconds], unit
