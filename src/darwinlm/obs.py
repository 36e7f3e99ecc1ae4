"""Optimal Brain Surgeon in structures: which ones leave a linear module, in what order, and what the others become.

Pure maths on a consumer's weight `W` `[d_out, d_in]` and its damped Hessian `H` `[d_in, d_in]`; no model and no files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from darwinlm.types import DarwinError, Elimination, Level, Unit

QUEUE = 128  # channels removed between two matrix products


def dampen(hessian: Float[Tensor, "d_in d_in"], damping: float = 0.01) -> Float[Tensor, "d_in d_in"]:
    """`H + damping * mean(diag H) * I`, which makes dead channels (zero rows of `H`) harmless.

    An all-zero Hessian, of a unit that never fired, gets `damping * I`.

    Raises:
        DarwinError: the Hessian has entries that are not finite.
    """
    if not bool(hessian.isfinite().all()):
        raise DarwinError(
            "expected a finite Hessian, found NaN or infinity in it: the model's activations overflow; "
            "calibrate in float32 or bfloat16, or on other text"
        )
    damped = hessian.clone()
    damped.diagonal().add_(damping * _scale(hessian))
    return damped


def eliminate(
    unit: Unit,
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    until: int | None = None,
    queue: int = QUEUE,
) -> Elimination:
    """The greedy order in which the unit's structures leave, and the squared output error after each.

    At every step the structure `J` of least `tr(W_J P_JJ^-1 W_J^T)`, `P = H^-1`, is removed and the rest makes up for it:
    `W <- W - W_J P_JJ^-1 P_J:`, `P <- P - P_:J P_JJ^-1 P_J:` (DESIGN, The method, 2). `W` itself is never touched:
    its Gram matrix `S = W^T W` says all that the scores need.

    Args:
        hessian: damped (`dampen`); its dtype, float32 or float64, is that of the computation.
        until: stop after so many removals; all of them by default. `order` and `errors` have this length.
        queue: how many single channels are removed between two matrix products; changes speed, not the result.

    Raises:
        DarwinError: the weight or the Hessian is not finite, or the Hessian is too far from positive definite.
    """
    d_in, width = hessian.shape[0], unit.structure_width
    assert width * unit.structures == d_in == weight.shape[1]
    until = unit.structures if until is None else until
    both = _inverse_and_gram(unit, weight, hessian)
    if width == 1:
        order, errors = _eliminate_channels(both, hessian.diagonal().reciprocal(), until, queue)
    else:
        order, errors = _eliminate_blocks(both, width, until)
    cumulative = torch.tensor(errors, dtype=torch.float64).cumsum(0).to(hessian.dtype)
    if not bool(cumulative.isfinite().all()):
        raise DarwinError(
            f"{unit.name}: elimination broke down; expected a better conditioned Hessian, raise the damping"
        )
    return Elimination(unit, torch.tensor(order, dtype=torch.int64), cumulative)


def solve_levels(
    unit: Unit,
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    elimination: Elimination,
    removed: Sequence[int],
) -> list[Level]:
    """The weights of every level that keeps some of the unit's structures, by least squares from its kept set `K` alone.

    `W_K + W_R L_RK L_KK^-1`, which equals `(W H)_{:,K} H_KK^-1`. With the columns in the reverse order of removal, every
    kept set is a leading block: one Cholesky factor `L L^T = H` serves all levels.

    Args:
        hessian: damped, the one that `elimination` had.
        removed: for each level, how many structures have left. Levels that keep all or none yield nothing.

    Raises:
        DarwinError: as `eliminate`.
    """
    width, structures = unit.structure_width, unit.structures
    wanted = [(level, count) for level, count in enumerate(removed) if 0 < count < structures]
    if not wanted:
        return []
    eliminated = elimination.order.tolist()
    assert max(count for _, count in wanted) <= len(eliminated)
    gone = set(eliminated)
    last_first = torch.tensor([s for s in range(structures) if s not in gone] + eliminated[::-1], device=hessian.device)
    columns = _columns(last_first, width)
    factor = _cholesky(unit, hessian[columns[:, None], columns])
    permuted = weight.to(hessian)[:, columns]
    levels = []
    for level, count in wanted:
        k = (structures - count) * width
        kept, ascending = last_first[: structures - count].sort()
        push = torch.linalg.solve_triangular(factor[:k, :k], permuted[:, k:] @ factor[k:, :k], upper=False, left=False)
        solved = push.add_(permuted[:, :k])[:, _columns(ascending, width)]
        levels.append(Level(unit, level, kept.cpu(), solved, float(elimination.errors[count - 1])))
    return levels


def _eliminate_channels(both: Tensor, floor: Tensor, until: int, queue: int) -> tuple[list[int], list[float]]:
    """Structures of one column. Removals queue up in `U` and `T`; only the diagonals of `P` and `S` are kept up to date.

    Removing `j`, with `p = P_jj` and `m = S_jj / p`: `u = P_j / sqrt(p)`, `t = S_j / sqrt(p) - m u / 2`, then
    `P <- P - u u^T`, `S <- S - u t^T - t u^T`. The living channels are always the leading `n` rows and columns.
    """
    _, n, _ = both.shape
    names = list(range(n))
    queued = both.new_empty(3 * queue, n)  # U, T, and U again: [U T] and [T U] are both views
    U, T, U_again = queued.split(queue)
    diagonals = both.diagonal(dim1=1, dim2=2).clone()
    diagonals[1] /= 2  # P_jj and S_jj / 2, so that one product updates both
    least = torch.stack([floor, torch.zeros_like(floor)])  # P_jj >= 1 / H_jj, S_jj >= 0
    gone = torch.stack([diagonals[0].max(), diagonals.new_tensor(math.inf)])
    scores = torch.empty_like(floor)
    order, errors, holes = [], [], []
    for step in range(until):
        q = len(holes)
        if q == queue:
            n_next = n - queue
            U_again.copy_(U)
            empty, full = _fill(holes, n_next, n)
            for matrix in (queued, diagonals, least):
                matrix[:, empty] = matrix[:, full]
            for hole, survivor in zip(empty.tolist(), full.tolist(), strict=True):
                names[hole] = names[survivor]
            both[:, empty, :n] = both[:, full, :n]
            both[:, :n, empty] = both[:, :n, full]
            n = n_next
            both[0, :n, :n].addmm_(U[:, :n].T, U[:, :n], alpha=-1)
            both[1, :n, :n].addmm_(queued[: 2 * queue, :n].T, queued[queue:, :n], alpha=-1)
            diagonals, least, scores, holes, q = diagonals[:, :n], least[:, :n], scores[:n], [], 0
            torch.maximum(diagonals, least, out=diagonals)
        torch.div(diagonals[1], diagonals[0], out=scores)
        j = int(scores.argmin())
        diagonal = diagonals[:, j]
        p, half_s = diagonal.tolist()
        half_m = max(half_s, 0.0) / p
        order.append(names[j])
        errors.append(2 * half_m)
        holes.append(j)

        new = queued[q : q + queue + 1 : queue, :n]
        coefficients = queued[:, j].view(3, queue)[:2, :q]
        torch.addmm(both[:, j, :n], coefficients, U[:q, :n], alpha=-1, out=new)
        new[1].addmv_(T[:q, :n].T, coefficients[0], alpha=-1)
        new.mul_(p**-0.5)
        new[1].sub_(new[0], alpha=half_m)
        diagonals.addcmul_(new[0], new, value=-1)
        diagonal.copy_(gone)
    return order, errors


def _fill(holes: list[int], n_next: int, n: int) -> tuple[Tensor, Tensor]:
    """Holes below `n_next`, and the survivors from there up to `n` that move into them."""
    taken = set(holes)
    survivors = [position for position in range(n_next, n) if position not in taken]
    return torch.tensor([hole for hole in holes if hole < n_next]).long(), torch.tensor(survivors).long()


def _eliminate_blocks(both: Tensor, width: int, until: int) -> tuple[list[int], list[float]]:
    """Structures of several columns: as `_eliminate_channels` in blocks, one matrix product a removal.

    With `C = chol(P_JJ)`: `U = P_:J C^-T`, `G = S_:J C^-T`, `M = C^-1 S_JJ C^-T`, `T = G - U M / 2`, score `tr M`.
    """
    n = both.shape[1]
    names = list(range(n // width))
    order, errors = [], []
    for _ in range(until):
        blocks = both[:, :n, :n].unflatten(2, (-1, width)).unflatten(1, (-1, width)).diagonal(dim1=1, dim2=3)
        P_JJ, S_JJ = blocks.permute(0, 3, 1, 2)
        factors = torch.linalg.cholesky(P_JJ)
        half = torch.linalg.solve_triangular(factors, S_JJ, upper=False)
        M = torch.linalg.solve_triangular(factors.mT, half, upper=True, left=False)
        scores = M.diagonal(dim1=1, dim2=2).sum(1).clamp_(min=0)
        j = int(scores.argmin())
        order.append(names[j])
        errors.append(float(scores[j]))

        P_J, S_J = both[:, j * width : (j + 1) * width, :n]
        U = torch.linalg.solve_triangular(factors[j], P_J, upper=False)
        T = torch.linalg.solve_triangular(factors[j], S_J, upper=False).addmm_(M[j], U, alpha=-0.5)
        hole, last = slice(j * width, (j + 1) * width), slice(n - width, n)
        for rows in (U, T):
            rows[:, hole] = rows[:, last]
        both[:, hole, :n] = both[:, last, :n].clone()
        both[:, :n, hole] = both[:, :n, last].clone()
        names[j] = names[-1]
        names.pop()
        n -= width
        U, T = U[:, :n], T[:, :n]
        both[0, :n, :n].addmm_(U.T, U, alpha=-1)
        both[1, :n, :n].addmm_(torch.cat([U, T]).T, torch.cat([T, U]), alpha=-1)
    return order, errors


def _inverse_and_gram(unit: Unit, weight: Tensor, hessian: Tensor) -> Float[Tensor, "2 d_in d_in"]:
    """`P = H^-1` and `S = W^T W`."""
    weight = weight.to(hessian)
    if not bool(weight.isfinite().all()):
        raise DarwinError(f"{unit.name}: expected a finite weight in {unit.consumer}, found NaN or infinity")
    both = hessian.new_empty(2, *hessian.shape)
    torch.cholesky_inverse(_cholesky(unit, hessian), out=both[0])
    torch.mm(weight.T, weight, out=both[1])
    return both


def _cholesky(unit: Unit, hessian: Tensor) -> Tensor:
    """The lower factor of the Hessian, damped further, with a warning, where rounding has left it indefinite."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    for damping in (0.1, 1.0, 10.0):
        if not int(info) and bool(factor.diagonal().isfinite().all()):
            return factor
        warnings.warn(f"{unit.name}: the Hessian is not positive definite, damping it by {damping}", stacklevel=4)
        factor, info = torch.linalg.cholesky_ex(dampen(hessian, damping))
    if int(info):
        raise DarwinError(
            f"{unit.name}: expected a positive definite Hessian, found one that no damping up to 10 mends"
        )
    return factor


def _scale(hessian: Tensor) -> float:
    """The mean of the diagonal, 1 where that is not positive."""
    mean = float(hessian.diagonal().mean())
    return mean if mean > 0 else 1.0


def _columns(structures: Tensor, width: int) -> Tensor:
    """The consumer's columns that these structures own."""
    return (structures[:, None] * width + torch.arange(width, device=structures.device)).flatten()
