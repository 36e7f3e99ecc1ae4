"""Cholesky factors of damped Hessians, and what is done where rounding has left a Hessian without one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from darwinlm.model.checkpoint import is_finite
from darwinlm.runtime.progress import say
from darwinlm.types import DarwinError, Unit

EXTRA_DAMPING = (0.1, 1.0, 10.0)  # tried in turn on a Hessian that is not positive definite


@torch.no_grad()
def dampen(hessian: Float[Tensor, "d_in d_in"], damping: float = 0.01) -> Float[Tensor, "d_in d_in"]:
    """`H + damping * mean(diag H) * I`, which makes dead channels (zero rows of `H`) harmless.

    An all-zero Hessian, of a unit that never fired, gets `damping * I`.

    Raises:
        DarwinError: if the Hessian has entries that are not finite.
    """
    if not is_finite(hessian):
        raise DarwinError(
            "expected a finite Hessian, found NaN or infinity in it: the model's activations overflow; "
            "calibrate in float32 or bfloat16, or on other text"
        )
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean_diagonal(hessian))
    return damped


def ever_safer(unit: Unit, hessian: Float[Tensor, "d_in d_in"]) -> Iterator[Float[Tensor, "d_in d_in"]]:
    """Yield the Hessian, then what to take instead where rounding swamps a computation on it, and say so.

    That is the same in float64, and then, where the Hessian itself is at fault, with 0.1, 1 and 10 of the mean of its
    diagonal added to the diagonal.

    Raises:
        DarwinError: if more is asked for; it names the unit.
    """
    yield hessian
    trouble = f"{unit.name}: rounding leaves the Hessian indefinite"
    if hessian.dtype != torch.float64:
        say(f"{trouble}, so it is computed on in float64")
        yield hessian.double()
    for damping in EXTRA_DAMPING:
        say(f"{trouble}, so {damping} of its mean is added to its diagonal")
        yield dampen(hessian, damping)
    raise DarwinError(
        f"{unit.name}: expected a positive definite Hessian, found one that damping by {EXTRA_DAMPING[-1]} does not "
        "mend; calibrate on more tokens, or raise the damping"
    )


def cholesky(unit: Unit, hessian: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """The lower factor of the first of `ever_safer` that has one, in the precision of `hessian`."""
    factors = (factor_of(matrix) for matrix in ever_safer(unit, hessian))
    return next(factor for factor in factors if factor is not None).to(hessian.dtype)


def factor_of(hessian: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"] | None:
    """The lower Cholesky factor, stored by columns as LAPACK wants it, or None if `hessian` is not positive definite.

    The entries above the diagonal are undefined. On another device than a CPU the factor is float64: cuSOLVER's in
    float32 is four times as far off as LAPACK's, and other structures would be removed than on a CPU.
    """
    precision = hessian.dtype if hessian.device.type == "cpu" else torch.float64
    factor = hessian.mT.to(precision, copy=True, memory_format=torch.contiguous_format).mT
    failures = torch.stack(_factorise(factor))
    return None if bool(failures.any()) else factor


def _factorise(matrix: Tensor) -> list[Tensor]:
    """Overwrite the lower triangle by its Cholesky factor, in halves.

    That is twice as fast as LAPACK on one thread of a CPU, and on a GPU it loses less to rounding than cuSOLVER.

    Returns a number for each block that was factorised whole, which is 0 if it was positive definite. The entries above
    the diagonal become undefined.
    """
    half = len(matrix) // 2
    if half < 128:
        factor, failure = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return [failure]
    failures = _factorise(matrix[:half, :half])
    below = matrix[half:, :half]
    below.copy_(torch.linalg.solve_triangular(matrix[:half, :half].mT, below, upper=True, left=False))
    matrix[half:, half:].addmm_(below, below.T, alpha=-1)
    return failures + _factorise(matrix[half:, half:])


def mean_diagonal(hessian: Tensor) -> float:
    """The mean of the diagonal, or 1 if that is not positive."""
    mean = float(hessian.diagonal().mean())
    return mean if mean > 0 else 1.0
