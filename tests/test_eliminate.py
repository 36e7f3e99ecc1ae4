"""Elimination against the naive loop, weights against least squares, and what happens to bad Hessians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darwinlm.database import eliminate as module
from darwinlm.database.calibrate import _Gram
from darwinlm.database.cholesky import cholesky, dampen
from darwinlm.database.eliminate import eliminate, solve_levels
from darwinlm.types import DarwinError, Unit


def make_unit(structures: int, width: int = 1) -> Unit:
    kind = "mlp" if width == 1 else "attention"
    return Unit(f"block-00-{kind}", 0, kind, "layers.0.consumer", (), width, structures, 1, 0)


def make_problem(d_out: int, d_in: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A weight, correlated inputs `X` [tokens, d_in], and the undamped Hessian `2/tokens X^T X`."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=dtype) / d_in**0.5 + torch.eye(d_in, dtype=dtype)
    X = torch.randn(tokens, d_in, generator=generator, dtype=dtype) @ mix
    X *= torch.rand(d_in, generator=generator, dtype=dtype) + 0.1
    W = torch.randn(d_out, d_in, generator=generator, dtype=dtype)
    return W, X, 2 / tokens * X.T @ X


def naive_order(W: torch.Tensor, H: torch.Tensor, width: int) -> tuple[list[int], list[float], list[torch.Tensor]]:
    """The published loop, in float64: scores afresh, then update W and P, at every step."""
    W, P = W.double().clone(), torch.linalg.inv(H.double())
    alive = list(range(W.shape[1] // width))
    order, errors, weights = [], [], []
    while alive:
        columns = torch.stack([W[:, s * width : (s + 1) * width] for s in alive])
        blocks = torch.stack([P[s * width : (s + 1) * width, s * width : (s + 1) * width] for s in alive])
        scores = (columns @ torch.linalg.inv(blocks) * columns).sum((1, 2)).tolist()
        best = scores.index(min(scores))
        s = alive.pop(best)
        J = slice(s * width, (s + 1) * width)
        inverse = torch.linalg.inv(P[J, J])
        W = W - W[:, J] @ inverse @ P[J]
        P = P - P[:, J] @ inverse @ P[J]
        W[:, J], P[J], P[:, J] = 0, 0, 0
        order.append(s)
        errors.append(scores[best] + (errors[-1] if errors else 0.0))
        weights.append(W.clone())
    return order, errors, weights


def true_error(W: torch.Tensor, pruned: torch.Tensor, H: torch.Tensor) -> float:
    return float(torch.trace((W - pruned) @ H @ (W - pruned).T))


@settings(max_examples=20, deadline=None)
@given(
    structures=st.integers(1, 40),
    width=st.sampled_from([1, 1, 2, 5]),
    d_out=st.integers(1, 12),
    queue=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_elimination_is_that_of_the_naive_loop(structures, width, d_out, queue, seed):
    W, _, H = make_problem(d_out, structures * width, 3 * structures * width, seed)
    H = dampen(H)
    order, errors, weights = naive_order(W, H, width)
    found = eliminate(make_unit(structures, width), W, H, queue=queue)
    assert found.order.tolist() == order
    assert found.errors.tolist() == pytest.approx(errors, rel=1e-9)
    assert errors == pytest.approx([true_error(W, pruned, H) for pruned in weights], rel=1e-9)


@pytest.mark.parametrize("panel", [1, 48, 1024])
@pytest.mark.parametrize(("structures", "width"), [(90, 1), (10, 16), (4, 64)], ids=["channels", "heads", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elimination_at_size(structures, width, dtype, panel, monkeypatch):
    """Whatever the panels in which only half of the symmetric matrices is kept, and in both precisions."""
    monkeypatch.setattr(module, "PANEL", panel)
    W, _, H = make_problem(48, structures * width, 2 * structures * width, dtype=dtype)
    H = dampen(H)
    order, errors, _ = naive_order(W, H, width)
    found = eliminate(make_unit(structures, width), W, H, queue=20)
    assert found.errors.dtype == dtype
    assert found.order.tolist() == order
    assert found.errors.tolist() == pytest.approx(errors, rel=1e-4 if dtype == torch.float32 else 1e-10)


def test_until_is_a_prefix():
    W, _, H = make_problem(8, 60, 200)
    H = dampen(H)
    whole, part = (eliminate(make_unit(60), W, H, until=until, queue=7) for until in (None, 25))
    assert part.order.tolist() == whole.order[:25].tolist()
    assert part.errors.tolist() == whole.errors[:25].tolist()


@pytest.mark.parametrize("queue", [1, 2, 3, 16, 37, 64, 100, 128, 500])
def test_queue_changes_nothing(queue):
    W, _, H = make_problem(16, 150, 400)
    H = dampen(H)
    reference, found = (eliminate(make_unit(150), W, H, queue=q) for q in (10, queue))
    assert found.order.tolist() == reference.order.tolist()
    assert torch.allclose(found.errors, reference.errors, rtol=1e-9)


@pytest.mark.parametrize(("structures", "width", "tokens"), [(40, 1, 100), (40, 1, 11), (6, 8, 100), (6, 8, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_are_least_squares(structures, width, tokens, dtype):
    """Against `lstsq` on the calibration inputs themselves, with the damping as extra rows; also with few tokens."""
    W, X, H = make_problem(7, structures * width, tokens)
    X[:, 3] = 0  # a dead channel
    H = dampen(2 / tokens * X.T @ X)
    damping = float(H[3, 3])
    rows = torch.cat([(2 / tokens) ** 0.5 * X, damping**0.5 * torch.eye(len(H), dtype=X.dtype)])
    unit = make_unit(structures, width)
    W_, H_ = W.to(dtype), H.to(dtype)
    elimination = eliminate(unit, W_, H_)
    removed = [0, 1, structures // 2, structures - 1, structures]
    levels = solve_levels(unit, W_, H_, elimination, removed)
    assert [level.level for level in levels] == [1, 2, 3]
    for level in levels:
        gone = elimination.order[: removed[level.level]].tolist()
        assert level.kept.tolist() == [s for s in range(structures) if s not in gone]
        columns = [s * width + i for s in level.kept.tolist() for i in range(width)]
        expected = torch.linalg.lstsq(rows[:, columns], rows @ W.T).solution.T
        pruned = torch.zeros_like(W)
        pruned[:, columns] = level.weight.double()
        tolerance = 1e-3 if dtype == torch.float32 else 1e-8
        assert level.weight.dtype == dtype
        assert torch.allclose(level.weight.double(), expected, rtol=tolerance, atol=tolerance)
        assert level.error == pytest.approx(true_error(W, pruned, H), rel=tolerance)


def test_level_errors_from_the_factor():
    """With the last removed first and `H = L L^T`, a level's error is `||L[k:, k:]^T W[k:]^T||^2`."""
    W, _, H = make_problem(9, 30, 90)
    H = dampen(H)
    elimination = eliminate(make_unit(30), W, H)
    last_first = elimination.order.flip(0)
    L = torch.linalg.cholesky(H[last_first][:, last_first])
    for removed in range(1, 31):
        k = 30 - removed
        error = (L[k:, k:].T @ W[:, last_first[k:]].T).square().sum()
        assert float(elimination.errors[removed - 1]) == pytest.approx(float(error))


def test_levels_of_a_partial_elimination():
    W, _, H = make_problem(8, 30, 90)
    H = dampen(H)
    unit = make_unit(30)
    (whole,), (part,) = (solve_levels(unit, W, H, eliminate(unit, W, H, until), [10]) for until in (None, 10))
    assert torch.equal(whole.kept, part.kept)
    assert torch.allclose(whole.weight, part.weight)
    assert solve_levels(unit, W, H, eliminate(unit, W, H, 0), [0, 30]) == []


@pytest.mark.parametrize("width", [1, 4])
def test_dead_structures_leave_first_and_free(width):
    W, X, _ = make_problem(8, 48, 120)
    dead = [2, 5, 9]
    X[:, [s * width + i for s in dead for i in range(width)]] = 0
    H = 2 / 120 * X.T @ X
    W[:, [s * width + i for s in dead for i in range(width)]] *= 1e-6
    found = eliminate(make_unit(48 // width, width), W, dampen(H))
    assert sorted(found.order[:3].tolist()) == dead
    assert float(found.errors[2]) < 1e-6 * float(found.errors[3])


@pytest.mark.parametrize("width", [1, 8])
def test_a_unit_that_never_fired(width):
    W, _, _ = make_problem(4, 32, 50)
    H = dampen(torch.zeros(32, 32, dtype=torch.float64))
    assert torch.equal(H, 0.01 * torch.eye(32, dtype=torch.float64))
    found = eliminate(make_unit(32 // width, width), W, H)
    assert sorted(found.order.tolist()) == list(range(32 // width))
    assert float(found.errors[-1]) == pytest.approx(0.01 * float(W.square().sum()))


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("damping", [1e-4, 1e-6])
@pytest.mark.parametrize("weight", ["random", "zero", "repeated"])
def test_few_tokens_in_float32(width, weight, damping):
    """The Hessian's rank is an eighth of its size: rounding must not break the order or make the errors sink."""
    W, _, H = make_problem(16, 160, 20, dtype=torch.float32)
    W = {"random": W, "zero": torch.zeros_like(W), "repeated": W[:, :1].expand(-1, 160).contiguous()}[weight]
    found = eliminate(make_unit(160 // width, width), torch.nn.Parameter(W), dampen(H, damping))
    assert sorted(found.order.tolist()) == list(range(160 // width))
    assert bool(found.errors.isfinite().all())
    assert bool((found.errors.diff() >= 0).all())
    assert bool((found.errors >= 0).all())


@pytest.mark.parametrize("width", [1, 4])
def test_indefinite_hessian_is_damped_further_and_that_is_said(width, capsys):
    W, _, H = make_problem(8, 40, 100)
    H -= 0.3 * H.diagonal().mean() * torch.eye(40, dtype=H.dtype)
    unit = make_unit(40 // width, width)
    found = eliminate(unit, W, H)
    assert f"{unit.name}: rounding leaves the Hessian indefinite" in capsys.readouterr().err
    assert sorted(found.order.tolist()) == list(range(40 // width))
    assert bool(found.errors.isfinite().all())
    (level,) = solve_levels(unit, W, H, found, [0, 3])
    assert f"{unit.name}: rounding leaves the Hessian indefinite" in capsys.readouterr().err
    assert bool(level.weight.isfinite().all())


def indefinite_in_float32() -> torch.Tensor:
    """A float32 matrix that is positive definite, though float32's rounding in Cholesky finds it indefinite."""
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.ones(40, dtype=torch.float64)
    spectrum[:20] = 3e-8
    H = ((Q * spectrum) @ Q.T).float()
    H = (H + H.T) / 2
    assert int(torch.linalg.cholesky_ex(H).info)
    assert not int(torch.linalg.cholesky_ex(H.double()).info)
    return H


def test_what_float32_cannot_factorise_is_factorised_in_float64_and_not_damped(capsys):
    H = indefinite_in_float32()
    L = cholesky(make_unit(40), H).tril()
    assert "float64" in capsys.readouterr().err
    assert L.dtype == torch.float32
    assert float((L.double() @ L.double().T - H.double()).abs().max()) < 1e-7


@pytest.mark.parametrize("width", [1, 4])
def test_the_order_of_what_swamps_float32_is_that_of_float64(width, capsys):
    H, W = indefinite_in_float32(), make_problem(8, 40, 1)[0].float()
    found = eliminate(make_unit(40 // width, width), W, H)
    assert "added to its diagonal" not in capsys.readouterr().err
    assert found.order.tolist() == naive_order(W, H, width)[0]


def test_products_are_exact_in_hessians_and_elimination_alone(monkeypatch):
    """What allows TF32 on a GPU allows bfloat16 on a CPU that has it; both are off inside and on again afterwards."""
    seen = []

    def spy(name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *rest: (seen.append(precisions()), real(*rest))[1])

    def precisions():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

    W, X, H = make_problem(8, 40, 100, dtype=torch.float32)
    spy("factor_of")
    spy("cholesky")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = precisions()
        found = eliminate(make_unit(40), W, H)
        solve_levels(make_unit(40), W, H, found, [0, 3])
        gram = _Gram(make_unit(40), torch.nn.Linear(40, 8), length=len(X))
        monkeypatch.setattr(gram, "sum", _Spied(gram.sum, lambda: seen.append(precisions())))
        gram(gram.consumer, (X,))
        assert precisions() == allowed == ("tf32", "bf16")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("ieee", "ieee")] * 3


class _Spied:
    """A tensor whose slices are asked for."""

    def __init__(self, tensor, ask):
        self.tensor, self.ask = tensor, ask

    def __getitem__(self, key):
        self.ask()
        return self.tensor[key]


def test_hopeless_hessian_names_the_unit():
    W, _, H = make_problem(8, 20, 50)
    with pytest.raises(DarwinError, match="block-00-mlp"):
        eliminate(make_unit(20), W, H - 100 * H.diagonal().mean() * torch.eye(20, dtype=H.dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    W, _, H = make_problem(8, 20, 50)
    broken = H.clone()
    broken[3, 4] = bad
    with pytest.raises(DarwinError, match="finite"):
        dampen(broken)
    with pytest.raises(DarwinError, match="block-00-mlp"):
        eliminate(make_unit(20), W, broken)
    W[2, 2] = bad
    with pytest.raises(DarwinError, match="block-00-mlp"):
        eliminate(make_unit(20), W, dampen(H))
