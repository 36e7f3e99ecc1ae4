"""Optimal Brain Surgeon for structures: the order in which they leave a linear module, and the weights that remain.

The functions compute on a consumer's weight `W` `[d_out, d_in]` and its damped Hessian `H` `[d_in, d_in]` alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from darwinlm.database.cholesky import EXTRA_DAMPING, cholesky, ever_safer, factor_of, mean_diagonal
from darwinlm.database.levels import Elimination, Level
from darwinlm.model.checkpoint import is_finite
from darwinlm.runtime.device import exact_products
from darwinlm.types import DarwinError, Unit

QUEUE = 128  # channels removed between two matrix products
PANEL = 512  # rows of a symmetric matrix that are updated together


@torch.no_grad()
@exact_products()
def eliminate(
    unit: Unit,
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    until: int | None = None,
    queue: int = QUEUE,
) -> Elimination:
    """The greedy order in which the unit's structures leave, and the squared output error after each.

    At every step the structure `J` of least `tr(W_J P_JJ^-1 W_J^T)`, `P = H^-1`, is removed, and the others are updated
    to compensate: `W <- W - W_J P_JJ^-1 P_J:`, `P <- P - P_:J P_JJ^-1 P_J:` (section 3.1 of the paper). `W` itself is
    not computed: the scores depend only on its Gram matrix `S = W^T W`.

    Args:
        hessian: damped (`dampen`); its dtype, float32 or float64, is that of the computation.
        until: the number of removals, all structures by default. `order` and `errors` have this length.
        queue: the number of single channels that are removed between two matrix products; it affects speed alone.

    Raises:
        DarwinError: if the weight or the Hessian is not finite, or the Hessian is too far from positive definite.
    """
    d_in, width = hessian.shape[0], unit.structure_width
    assert width * unit.structures == d_in == weight.shape[1]
    if not is_finite(weight) or not is_finite(hessian):
        raise DarwinError(f"{unit.name}: expected a finite weight and Hessian, found NaN or infinity")
    until = unit.structures if until is None else until
    names = torch.arange(d_in, device=hessian.device)
    if width == 1:  # columns that will probably leave first go to the end, so that fewer others must move later
        names = (weight.to(hessian).square().sum(0) * hessian.diagonal()).argsort(descending=True)
        weight = weight.index_select(1, names)
        hessian = hessian.index_select(0, names).index_select(1, names)
    for matrix in ever_safer(unit, hessian):
        factor = factor_of(matrix)
        if factor is None:
            continue
        pair = _Pair(unit, weight, matrix, factor)
        del factor  # its memory is the inverse's by now
        if width == 1:
            positions, errors = _eliminate_channels(pair, until, queue)
        else:
            positions, errors = _eliminate_blocks(unit, pair, until)
        if sum(errors) <= pair.ceiling:
            cumulative = torch.tensor(errors, dtype=torch.float64).cumsum(0).to(hessian.dtype)
            return Elimination(unit, names.cpu()[torch.tensor(positions, dtype=torch.int64)], cumulative)
    raise AssertionError("nothing is safer")


@torch.no_grad()
@exact_products()
def solve_levels(
    unit: Unit,
    weight: Float[Tensor, "d_out d_in"],
    hessian: Float[Tensor, "d_in d_in"],
    elimination: Elimination,
    removed: Sequence[int],
) -> list[Level]:
    """The weights of each level that keeps some of the unit's structures, by least squares from its kept set `K` alone.

    `W_K + W_R L_RK L_KK^-1`, which equals `(W H)_{:,K} H_KK^-1`. With the columns in the reverse order of removal, each
    kept set is a leading block: one Cholesky factor `L L^T = H` serves all levels, and each level goes on from the one
    before.

    Args:
        hessian: the damped Hessian that `elimination` was computed from.
        removed: for each level, the number of structures that have left, ascending. Levels that keep all structures or
            none are skipped.

    Raises:
        DarwinError: as `eliminate`.
    """
    width, structures = unit.structure_width, unit.structures
    partial = [(level, count) for level, count in enumerate(removed) if 0 < count < structures]
    if not partial:
        return []
    eliminated = elimination.order.tolist()
    assert list(removed) == sorted(removed)
    assert partial[-1][1] <= len(eliminated)
    gone = set(eliminated)
    never_removed = [structure for structure in range(structures) if structure not in gone]
    last_first = torch.tensor(never_removed + eliminated[::-1], device=hessian.device)
    columns = columns_of(last_first, width)
    factor = cholesky(unit, hessian.index_select(0, columns).index_select(1, columns))
    solved = weight.to(hessian).index_select(1, columns)
    levels = []
    for level, count in partial:
        k = (structures - count) * width
        L_KK, L_RK = factor[:k, :k], factor[k : solved.shape[1], :k]
        solution = torch.linalg.solve_triangular(L_KK, L_RK, upper=False, left=False)
        solved = solved[:, :k].addmm(solved[:, k:], solution)
        kept, ascending = last_first[: structures - count].sort()
        weights = solved.index_select(1, columns_of(ascending, width))
        levels.append(Level(unit, level, kept.cpu(), weights, float(elimination.errors[count - 1])))
    return levels


def _eliminate_channels(pair: _Pair, until: int, queue: int) -> tuple[list[int], list[float]]:
    """Eliminate structures of one column: updates are queued, and only the diagonals of `P` and `S` are kept current.

    Removing `j`, with `p = P_jj` and `m = S_jj / p`: `u = P_j / sqrt(p)`, `t = S_j / sqrt(p) - m u / 2`, then
    `P <- P - u u^T`, `S <- S - u t^T - t u^T`.
    """
    names = list(range(pair.n))
    diagonals = pair.diagonals().clone()
    queued = diagonals.new_empty(2, queue, pair.n)  # U and T
    diagonals[1] /= 2  # P_jj and S_jj / 2: one product then updates both
    gone = torch.stack([diagonals[0].max(), diagonals.new_tensor(math.inf)])  # a score that is never the least again
    scores = torch.empty_like(diagonals[0])
    order, errors, holes = [], [], []
    for _ in range(until):
        q = len(holes)
        if q == queue:
            queued, diagonals = _compact(pair, names, holes, queued, diagonals)
            scores = torch.empty_like(diagonals[0])
            holes, q = [], 0
        least = torch.div(diagonals[1], diagonals[0], out=scores).argmin().reshape(1)
        # One wait for the device: the position, which float32 holds exactly up to 2^24, with the entries there.
        p, half_s, position = torch.cat([diagonals.index_select(1, least)[:, 0], least]).tolist()
        j, p = int(position), max(p, pair.floor)
        diagonal = diagonals[:, j]
        half_m = max(half_s, 0.0) / p
        order.append(names[j])
        errors.append(2 * half_m)
        holes.append(j)

        new = queued[:, q]
        u, t = new
        if q:
            U, T = queued[:, :q]
            coefficients = queued[:, :q, j]  # U_j and T_j
            torch.addmm(pair.rows(j, j + 1)[:, 0], coefficients, U, alpha=-1, out=new)  # P_j - U_j U, S_j - T_j U
            t.addmv_(T.T, coefficients[0], alpha=-1)
        else:
            new.copy_(pair.rows(j, j + 1)[:, 0])
        new.mul_(p**-0.5)
        t.sub_(u, alpha=half_m)
        diagonals.addcmul_(u, new, value=-1)
        diagonal.copy_(gone)
    return order, errors


def _compact(
    pair: _Pair, names: list[int], holes: list[int], queued: Tensor, diagonals: Tensor
) -> tuple[Float[Tensor, "2 queue n"], Float[Tensor, "2 n"]]:
    """Apply the queued updates to the pair once its `holes`, the positions of removed columns, are filled.

    Survivors from the end move into the holes, so that what is left of the pair, of its diagonals and of the queue is
    their beginning. The last two are returned; `names` is changed in place.
    """
    n = pair.n - len(holes)
    taken = set(holes)
    hollow = sorted(hole for hole in holes if hole < n)
    solid = [position for position in range(n, pair.n) if position not in taken]
    for hole, survivor in zip(hollow, solid, strict=True):
        names[hole] = names[survivor]
    queued, diagonals = (_moved(each, hollow, solid)[..., :n] for each in (queued, diagonals))
    diagonals[0].clamp_(min=pair.floor)
    diagonals[1].clamp_(min=0)
    pair.shrink(n, hollow, solid)
    pair.subtract(*queued)
    return queued, diagonals


def _eliminate_blocks(unit: Unit, pair: _Pair, until: int) -> tuple[list[int], list[float]]:
    """Eliminate structures of several columns: a matrix product each, and all scores anew from the diagonal blocks.

    With `C = chol(P_JJ)`: `U = P_:J C^-T`, `G = S_:J C^-T`, `M = C^-1 S_JJ C^-T`, `T = G - U M / 2`, score `tr M`.
    """
    width, names = unit.structure_width, list(range(unit.structures))
    order, errors = [], []
    for _ in range(until):
        P_JJ, S_JJ = pair.blocks(width)
        waiting = _waiting(unit, names) if unit.in_turns else []
        C, failed = torch.linalg.cholesky_ex(P_JJ)
        M, choice = _least_block(C, S_JJ, waiting)
        # One wait for the device, for all that it has found.
        error, position, indefinite = torch.cat([choice, failed.any()[None].to(choice)]).tolist()
        if indefinite:
            C = _raised_factors(P_JJ, pair.floor)
            M, choice = _least_block(C, S_JJ, waiting)
            error, position = choice.tolist()
        j = int(position)
        order.append(names[j])
        errors.append(error)
        U, T = torch.linalg.solve_triangular(C[j], pair.rows(j * width, (j + 1) * width), upper=False)
        T.addmm_(M[j], U, alpha=-0.5)
        last = names.pop()
        if j < len(names):
            names[j] = last
        if names:
            n = len(names) * width
            empty, full = (range(width * at, width * (at + 1)) for at in (j, len(names)))
            pair.shrink(n, empty, full)
            pair.subtract(_moved(U, empty, full)[:, :n], _moved(T, empty, full)[:, :n])
    return order, errors


def _least_block(
    C: Float[Tensor, "structures width width"], S_JJ: Float[Tensor, "structures width width"], waiting: Sequence[int]
) -> tuple[Float[Tensor, "structures width width"], Float[Tensor, 2]]:
    """`M` of every block, and the least score with its position, among those that do not wait."""
    M = torch.linalg.solve_triangular(C, S_JJ, upper=False)
    M = torch.linalg.solve_triangular(C.mT, M, upper=True, left=False)
    scores = M.diagonal(dim1=1, dim2=2).sum(1).clamp_(min=0)
    if waiting:
        scores.index_fill_(0, _indices(waiting, scores.device), math.inf)
    least, position = scores.min(0)
    return M, torch.stack([least, position.to(least)])


def _raised_factors(blocks: Float[Tensor, "structures width width"], floor: float) -> Tensor:
    """The Cholesky factors of the blocks, with all diagonals raised until rounding leaves no block indefinite."""
    ridge = max(torch.finfo(blocks.dtype).eps * float(blocks.diagonal(dim1=1, dim2=2).max()), floor)
    identity = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    while True:
        factors, failed = torch.linalg.cholesky_ex(blocks + ridge * identity)
        ridge *= 10
        if not bool(failed.any()) or not math.isfinite(ridge):
            return factors


def _waiting(unit: Unit, alive: Sequence[int]) -> list[int]:
    """The positions among those that are left of structures whose group has lost one more than another group."""
    sizes = Counter(structure // unit.readers for structure in alive)
    most = max(sizes.values())
    return [position for position, structure in enumerate(alive) if sizes[structure // unit.readers] < most]


def _moved(matrix: Tensor, empty: Sequence[int], full: Sequence[int]) -> Tensor:
    """The matrix, its columns `empty` overwritten by its columns `full`."""
    to, moved = (_indices(positions, matrix.device) for positions in (empty, full))
    return matrix.index_copy_(-1, to, matrix.index_select(-1, moved))


def _indices(positions: Sequence[int], device: torch.device) -> Tensor:
    """Positions on the device; a range is made there, without a wait for it."""
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, device=device)
    return torch.tensor(positions, dtype=torch.int64, device=device)


class _Pair:
    """The symmetric matrices `P` and `S` of the columns that are left, in their leading `n` rows and columns.

    Only the lower half is kept, in panels of rows: a panel holds everything up to the last column of its diagonal
    block. Products then cost about half, and a row to the right of its panel is read from a column.
    """

    def __init__(self, unit: Unit, weight: Tensor, hessian: Tensor, factor: Tensor) -> None:
        """Start from the lower Cholesky factor of the Hessian, which is overwritten; it may be more precise."""
        weight = weight.to(hessian)
        self.n = len(hessian)
        self.panel = max(PANEL - PANEL % unit.structure_width, unit.structure_width)
        inverse = torch.cholesky_inverse(factor, out=factor)
        self.both = hessian.new_empty(2, self.n, self.n)
        self.both[0].copy_(inverse.mT)  # LAPACK has columns first
        self._add(self.both[1].zero_(), weight, weight, 1)
        # P_jj >= 1 / H_jj throughout, whatever rounding says: what is alive of P is the inverse of a part of H.
        self.floor = 1 / (float(hessian.diagonal().max()) + 2 * EXTRA_DAMPING[-1] * mean_diagonal(hessian))
        # Nor can all errors together exceed tr(W H W^T), which is at most ||W||^2 tr H; they do where rounding has won.
        self.ceiling = min(float(weight.square().sum()) * self.n / self.floor, torch.finfo(hessian.dtype).max)

    def diagonals(self) -> Tensor:
        return self.both.diagonal(dim1=1, dim2=2)

    def blocks(self, width: int) -> Float[Tensor, "2 structures width width"]:
        """The diagonal blocks of `P` and `S`."""
        tiles = self.both[:, : self.n, : self.n].unflatten(2, (-1, width)).unflatten(1, (-1, width))
        return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def rows(self, start: int, stop: int) -> Float[Tensor, "2 rows n"]:
        """These rows, which lie in one panel."""
        right = min(start - start % self.panel + self.panel, self.n)
        held = self.both[:, start:stop, :right]
        return held if right == self.n else torch.cat([held, self.both[:, right : self.n, start:stop].mT], dim=2)

    def shrink(self, n: int, empty: Sequence[int], full: Sequence[int]) -> None:
        """Keep `n` rows and columns: those beyond them at `full` move to the positions `empty`; both are ascending."""
        to, moved = (_indices(positions, self.both.device) for positions in (empty, full))
        rows = self.both.index_select(1, moved)
        corner = rows[:, :, moved].tril()
        rows[:, :, to] = corner + corner.tril(-1).mT
        self.both.index_copy_(1, to, rows)
        for start in range(0, n, self.panel):
            here = slice(bisect_left(empty, start), bisect_left(empty, start + self.panel))
            self.both[:, start:n, to[here]] = rows[:, here, start:n].mT
        self.n = n

    def subtract(self, U: Float[Tensor, "removed n"], T: Float[Tensor, "removed n"]) -> None:
        """`P <- P - U^T U`, `S <- S - U^T T - T^T U`."""
        self._add(self.both[0], U, U, -1)
        self._add(self.both[1], torch.cat([U, T]), torch.cat([T, U]), -1)

    def _add(self, matrix: Tensor, left: Tensor, right: Tensor, sign: int) -> None:
        n = self.n
        for start in range(0, n, self.panel):
            stop = min(start + self.panel, n)
            matrix[start:stop, :stop].addmm_(left[:, start:stop].T, right[:, :stop], alpha=sign)


def columns_of(structures: Tensor, width: int) -> Tensor:
    """The consumer's columns that belong to these structures."""
    return (structures[:, None] * width + torch.arange(width, device=structures.device)).flatten()
