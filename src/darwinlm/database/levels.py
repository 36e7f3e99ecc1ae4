"""What the database is made from and made of: statistics of units, the order of elimination, and levels."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from darwinlm.types import Unit


@dataclass(frozen=True)
class UnitStatistics:
    """A unit's statistics from calibration: `hessian = 2/tokens * sum x x^T` over its consumer's inputs, undamped.

    `first_token` is the share of the Hessian's trace that comes from the first token of each sequence.
    """

    unit: Unit
    weight: Float[Tensor, "d_out d_in"]
    hessian: Float[Tensor, "d_in d_in"]
    tokens: int
    first_token: float = 0.0


@dataclass(frozen=True)
class Elimination:
    """The greedy order in which a unit loses its structures, and the accumulated error after each removal.

    `order[i]` is the structure that is removed as number `i + 1`; `errors[i]` is the squared output error of the unit,
    `tr((W - W') H (W - W')^T)`, once it is gone. Both have length `structures`.
    """

    unit: Unit
    order: Int[Tensor, " structures"]
    errors: Float[Tensor, " structures"]


@dataclass(frozen=True)
class Level:
    """A unit with some structures removed: the consumer's surviving columns and their re-solved weights.

    `kept` lists surviving structures in ascending order; `weight` has `len(kept) * structure_width` columns.
    """

    unit: Unit
    level: int
    kept: Int[Tensor, " kept_structures"]
    weight: Float[Tensor, "d_out kept"]
    error: float
