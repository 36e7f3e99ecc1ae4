"""How fast a unit's order of removal is found, beside the published loop, one thread, in one run.

    python benchmarks/elimination.py                 # all cases; the largest takes about five minutes and 5 GB
    python benchmarks/elimination.py 576x1536        # some; d_outxd_in, or d_outxd_inxhead_dim for attention

All sides start from the damped Hessian in float32 and include its inversion. Two loops stand beside ours: the
published one, with the operations of its source (IST-DASLab/DarwinLM, src/fast_obc_struct.py: `H^-1` by columns, as
LAPACK returns it, and all removed columns of `W` zeroed again at every step); and the same loop tidied (`H^-1` by rows,
only the removed column zeroed), which shows how much is due to the algorithm alone. Neither ever shrinks, so a step
costs the same from first to last: where the whole would take over a minute, steps are timed and multiplied. Ours counts
everything that `eliminate` does. The share of the matrix-product rate divides the operations of the algorithm in its
plain form by our seconds and by the rate of a one-thread float32 product:

    channels   sum over n = d_in..1 of 6 n^2 (2 for P, 4 for S)  +  2 d_out d_in^2 (W^T W)  +  d_in^3 (inverse)
    heads      sum over n = d_in, d_in - w.. of 6 n^2 w          +  the same

Symmetry saves ours about half of these, so the share can pass what the machine truly spends: `halved` counts only
the operations that symmetry leaves (3 n^2, d_out d_in^2, d_in^3).
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from darwinlm.database.cholesky import dampen
from darwinlm.database.eliminate import eliminate, solve_levels
from darwinlm.runtime.device import processor_name
from darwinlm.types import Unit

CASES = ("576x1536", "1024x4096", "4096x11008", "4096x4096x128")
MINUTE = 60.0


def make_problem(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """A random weight, and the damped Hessian of inputs that are correlated and of unlike size."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2048, 256, generator=generator) @ torch.randn(256, d_in, generator=generator) / 16
    X = (factors + torch.randn(2048, d_in, generator=generator)) * torch.rand(d_in, generator=generator).add_(0.1)
    return torch.randn(d_out, d_in, generator=generator), dampen(2 / 2048 * X.T @ X)


def naive(weight: Tensor, hessian: Tensor, width: int, deadline: float, tidied: bool) -> tuple[list[int], float, int]:
    """The published loop: the order found, its seconds for all structures, and how many steps were timed."""
    began = time.perf_counter()
    W, P = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    if tidied:
        P = P.contiguous()
    preparation = time.perf_counter() - began
    structures = len(P) // width
    gone, gone_columns = torch.zeros(structures, dtype=torch.bool), torch.zeros(len(P), dtype=torch.bool)
    order, seconds = [], []
    for step in range(structures):
        if step >= 30 and median(seconds) * structures > deadline:
            break
        began = time.perf_counter()
        j, row, update, downdate = _channel(W, P, gone) if width == 1 else _head(W, P, gone, width)
        J = slice(j * width, (j + 1) * width)
        W -= update
        gone[j] = gone_columns[J] = True
        W[:, J if tidied else gone_columns] = 0
        P -= downdate(row)
        P.diagonal()[J if tidied else gone_columns] = 1
        order.append(j)
        seconds.append(time.perf_counter() - began)
    whole = sum(seconds) if len(order) == structures else median(seconds) * structures
    return order, preparation + whole, len(order)


def _channel(W: Tensor, P: Tensor, gone: Tensor) -> tuple[int, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    scores = W.square().sum(0) / P.diagonal()
    scores[gone] = torch.inf
    j = int(scores.argmin())
    p, row = P[j, j].clone(), P[j]
    update = (W[:, j] / p).unsqueeze(1) @ row.unsqueeze(0)
    row = row / p.sqrt()
    return j, row, update, lambda row: row.unsqueeze(1) @ row.unsqueeze(0)


def _head(W: Tensor, P: Tensor, gone: Tensor, width: int) -> tuple[int, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    structures, every = len(gone), torch.arange(len(gone))
    inverses = torch.linalg.inv(P.reshape(structures, width, structures, width)[every, :, every])
    columns = W.view(len(W), structures, width).transpose(0, 1)
    solved = columns @ inverses
    scores = (solved * columns).sum((1, 2))
    scores[gone] = torch.inf
    j = int(scores.argmin())
    rows = P[j * width : (j + 1) * width].clone()
    return j, rows, solved[j] @ rows, lambda rows: rows.T @ (inverses[j] @ rows)


def operations(d_out: int, d_in: int, width: int, symmetric: bool) -> float:
    """Floating-point operations of one elimination; see the top of this file."""
    removal = sum(6.0 * n * n * width for n in range(d_in, 0, -width))
    gram = 2.0 * d_out * d_in**2
    return (removal + gram) / (2 if symmetric else 1) + float(d_in) ** 3


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def product_rate(size: int) -> float:
    """Operations a second of a plain float32 product of this size; the median of three."""
    A, B, C = (torch.randn(size, size) for _ in range(3))
    return 2.0 * size**3 / median(timed(lambda: torch.mm(A, B, out=C), 3))


def compare(case: str) -> str:
    d_out, d_in, width = [*map(int, case.split("x")), 1][:3]
    structures = d_in // width
    kind = "mlp" if width == 1 else "attention"
    unit = Unit(f"block-00-{kind}", 0, kind, "consumer", (), width, structures, 1, 0)
    weight, hessian = make_problem(d_out, d_in)
    rate = product_rate(min(d_in, 4096))
    found = eliminate(unit, weight, hessian)  # warms up, and is compared below
    repeats = 1 if d_in > 8192 else 3 if d_in > 2048 else 7
    ours = median(timed(lambda: eliminate(unit, weight, hessian), repeats))
    removed = [round(level * structures / 10) for level in range(11)]
    levels = timed(lambda: solve_levels(unit, weight, hessian, found, removed), 1)[0]
    order, published, steps = naive(weight, hessian, width, MINUTE, tidied=False)
    _, tidied, _ = naive(weight, hessian, width, MINUTE, tidied=True)
    same = sum(a == b for a, b in zip(order, found.order.tolist(), strict=False))
    full, halved = (operations(d_out, d_in, width, symmetric) / ours / rate for symmetric in (False, True))
    return (
        f"| {case} | {published:.2f} s ({steps} of {structures} steps timed) | {tidied:.2f} s "
        f"| {ours:.3f} s ({repeats}) | {published / ours:.1f}x | {tidied / ours:.1f}x "
        f"| {rate / 1e9:.0f} GFLOP/s | {full:.0%} | {halved:.0%} | {levels:.2f} s | {same} of {steps} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {processor_name()}, one thread, torch {torch.__version__}, float32\n")
    print(
        "| case | published | tidied | ours (median of) | ratio | to tidied | matrix product | share | halved "
        "| 9 levels | same order |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in sys.argv[1:] or CASES:
        print(compare(case), flush=True)


if __name__ == "__main__":
    main()
