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
PANEL = 1024  # rows of a symmetric matrix that are updated together


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
    pair = _Pair(unit, weight, hessian)
    if width == 1:
        order, errors = _eliminate_channels(pair, hessian.diagonal().reciprocal(), until, queue)
    else:
        order, errors = _eliminate_blocks(pair, width, until)
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


def _eliminate_channels(pair: _Pair, floor: Tensor, until: int, queue: int) -> tuple[list[int], list[float]]:
    """Structures of one column, whose updates queue up; only the diagonals of `P` and `S` are kept up to date.

    Removing `j` (`u = P_j / sqrt(p)`, `t = S_j / sqrt(p) - s u / 2p`, `P <- P - u u^T`, `S <- S - u t^T - t u^T`) is one
    step of the Cholesky factorisation of `P + e S` with `e^2 = 0`: `u + e t = (P_j + e S_j) / sqrt(p + e s)`. Here `e`
    is the imaginary unit times a number so small that its square vanishes in rounding, which halves the kernel launches.
    """
    n = pair.n
    names = list(range(n))
    diagonal = torch.complex(*pair.diagonals())
    largest_p, largest_s = (float(part.max()) for part in (diagonal.real, diagonal.imag))
    tiny = torch.finfo(floor.dtype).eps ** 2 * largest_p / (largest_s or 1.0)
    diagonal.imag.mul_(tiny)
    gone = torch.tensor(complex(largest_p, math.inf), dtype=diagonal.dtype, device=floor.device)
    queued = diagonal.new_empty(queue, n)
    parts = torch.view_as_real(queued)
    scores = torch.empty_like(floor)
    order, errors, holes = [], [], []
    for _ in range(until):
        q = len(holes)
        if q == queue:
            n -= queue
            hollow = sorted(hole for hole in holes if hole < n)
            taken = set(holes)
            solid = [position for position in range(n, n + queue) if position not in taken]
            for hole, survivor in zip(hollow, solid, strict=True):
                names[hole] = names[survivor]
            empty, full = (torch.tensor(some, dtype=torch.int64, device=floor.device) for some in (hollow, solid))
            floor, diagonal = (_moved(vector, empty, full)[:n] for vector in (floor, diagonal))
            diagonal.real.clamp_(min=floor)  # P_jj >= 1 / H_jj and S_jj >= 0, whatever rounding says
            diagonal.imag.clamp_(min=0)
            _moved(queued, empty, full)
            pair.shrink(n, empty, full)
            pair.subtract(queued.real[:, :n].contiguous(), queued.imag[:, :n].div(tiny))
            scores, holes, q = scores[:n], [], 0
            queued, parts = queued[:, :n], parts[:, :n]
        torch.div(diagonal.imag, diagonal.real, out=scores)
        j = int(scores.argmin())
        at_j = diagonal[j]
        pivot = complex(at_j.item())
        order.append(names[j])
        errors.append(max(pivot.imag, 0.0) / tiny / pivot.real)
        holes.append(j)

        pair.row(j, parts[q], tiny)
        new = queued[q]
        if q:
            new.addmv_(queued[:q].T, queued[:q, j], alpha=-1)
        new.mul_(pivot**-0.5)
        diagonal.addcmul_(new, new, value=-1)
        at_j.copy_(gone)
    return order, errors


def _eliminate_blocks(pair: _Pair, width: int, until: int) -> tuple[list[int], list[float]]:
    """Structures of several columns: one matrix product a removal, and all scores afresh from the diagonal blocks.

    With `C = chol(P_JJ)`: `U = P_:J C^-T`, `G = S_:J C^-T`, `M = C^-1 S_JJ C^-T`, `T = G - U M / 2`, score `tr M`.
    """
    names = list(range(pair.n // width))
    order, errors = [], []
    for _ in range(until):
        P_JJ, S_JJ = pair.blocks(width)
        C = torch.linalg.cholesky(P_JJ)
        M = torch.linalg.solve_triangular(C, S_JJ, upper=False)
        M = torch.linalg.solve_triangular(C.mT, M, upper=True, left=False)
        scores = M.diagonal(dim1=1, dim2=2).sum(1).clamp_(min=0)
        j = int(scores.argmin())
        order.append(names[j])
        errors.append(float(scores[j]))

        U, T = torch.linalg.solve_triangular(C[j], pair.rows(j * width, (j + 1) * width), upper=False)
        T.addmm_(M[j], U, alpha=-0.5)
        names[j] = names[-1]
        names.pop()
        hole, last = (torch.arange(width, device=U.device) + width * at for at in (j, len(names)))
        n = len(names) * width
        pair.shrink(n, hole, last)
        pair.subtract(_moved(U, hole, last)[:, :n], _moved(T, hole, last)[:, :n])
    return order, errors


def _moved(matrix: Tensor, empty: Tensor, full: Tensor) -> Tensor:
    """The matrix, its columns `empty` overwritten by its columns `full`."""
    return matrix.index_copy_(-1, empty, matrix.index_select(-1, full))


class _Pair:
    """`P` and `S`, symmetric; what is alive is the leading `n` rows and columns.

    Only the upper half is kept, in panels of rows: a panel holds everything from the first column of its diagonal block.
    Products then cost about half, and a row to the left of its panel is read from a column.
    """

    def __init__(self, unit: Unit, weight: Tensor, hessian: Tensor) -> None:
        weight = weight.to(hessian)
        if not bool(weight.isfinite().all()) or not bool(hessian.isfinite().all()):
            raise DarwinError(f"{unit.name}: expected a finite weight and Hessian, found NaN or infinity")
        self.n = len(hessian)
        self.panel = max(PANEL - PANEL % unit.structure_width, unit.structure_width)
        self.both = hessian.new_zeros(2, self.n, self.n)
        torch.cholesky_inverse(_cholesky(unit, hessian), out=self.both[0])
        self._add(self.both[1], weight, weight, 1)

    def diagonals(self) -> Tensor:
        return self.both.diagonal(dim1=1, dim2=2)

    def blocks(self, width: int) -> Float[Tensor, "2 structures width width"]:
        """The diagonal blocks of `P` and `S`."""
        tiles = self.both[:, : self.n, : self.n].unflatten(2, (-1, width)).unflatten(1, (-1, width))
        return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def rows(self, start: int, stop: int) -> Float[Tensor, "2 rows n"]:
        """These rows, which lie in one panel."""
        left = start - start % self.panel
        return torch.cat([self.both[:, :left, start:stop].mT, self.both[:, start:stop, left : self.n]], dim=2)

    def row(self, j: int, out: Float[Tensor, "n 2"], tiny: float) -> None:
        """Row `j` of `P`, and of `S` times `tiny`."""
        left = j - j % self.panel
        if left:
            out[:left] = self.both[:, :left, j].T
            out[left:] = self.both[:, j, left : self.n].T
        else:
            out.copy_(self.both[:, j, : self.n].T)
        out[:, 1].mul_(tiny)

    def shrink(self, n: int, empty: Tensor, full: Tensor) -> None:
        """Only `n` rows and columns stay: the survivors `full` beyond them move into the holes `empty`."""
        columns = self.both[:, : self.n].index_select(2, full)
        corner = columns[:, full].triu()
        columns[:, empty] = corner + corner.triu(1).mT
        columns = columns[:, :n]
        self.both[:, empty, :n] = columns.mT
        self.both[:, :n, empty] = columns
        self.n = n

    def subtract(self, U: Float[Tensor, "removed n"], T: Float[Tensor, "removed n"]) -> None:
        """`P <- P - U^T U`, `S <- S - U^T T - T^T U`."""
        self._add(self.both[0], U, U, -1)
        self._add(self.both[1], torch.cat([U, T]), torch.cat([T, U]), -1)

    def _add(self, matrix: Tensor, left: Tensor, right: Tensor, sign: int) -> None:
        n = self.n
        for start in range(0, n, self.panel):
            stop = min(start + self.panel, n)
            matrix[start:stop, start:n].addmm_(left[:, start:stop].T, right[:, start:], alpha=sign)


def _cholesky(unit: Unit, hessian: Tensor) -> Tensor:
    """The lower factor of the Hessian, damped further, with a warning, where rounding has left it indefinite."""
    for damping in (0.0, 0.1, 1.0, 10.0):
        if damping:
            warnings.warn(f"{unit.name}: the Hessian is not positive definite, damping it by {damping}", stacklevel=4)
        factor = dampen(hessian, damping)
        if _factorise(factor):
            return factor.tril_()
    raise DarwinError(f"{unit.name}: expected a positive definite Hessian, found one that no damping up to 10 mends")


def _factorise(matrix: Tensor) -> bool:
    """Overwrites the lower triangle by its Cholesky factor, in halves: twice as fast as LAPACK on one thread."""
    half = len(matrix) // 2
    if half < 128:
        factor, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return not int(info)
    if not _factorise(matrix[:half, :half]):
        return False
    below = matrix[half:, :half]
    below.copy_(torch.linalg.solve_triangular(matrix[:half, :half].mT, below, upper=True, left=False))
    matrix[half:, half:].addmm_(below, below.T, alpha=-1)
    return _factorise(matrix[half:, half:])


def _scale(hessian: Tensor) -> float:
    """The mean of the diagonal, 1 where that is not positive."""
    mean = float(hessian.diagonal().mean())
    return mean if mean > 0 else 1.0


def _columns(structures: Tensor, width: int) -> Tensor:
    """The consumer's columns that these structures own."""
    return (structures[:, None] * width + torch.arange(width, device=structures.device)).flatten()
