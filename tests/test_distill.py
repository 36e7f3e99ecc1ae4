"""The chunked loss against the plain one, in value and gradient, and the teachers that it learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from darwinlm.losses.distillation import HiddenTarget, TopKTarget, chunked_loss, hidden_for_logits, teacher_target
from darwinlm.losses.logits import Logits

TOKENS, HIDDEN, VOCAB = 37, 8, 29


def product_with(weight: Tensor) -> Logits:
    """Logits without scaling or cap."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return Logits(linear)


class Case:
    """Random hidden states of a student and a teacher, in float64."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = random(TOKENS, HIDDEN).requires_grad_()
        self.logits = product_with(random(VOCAB, HIDDEN))
        self.teacher_logits = 2 * random(TOKENS, VOCAB)
        self.labels = torch.randint(VOCAB, (TOKENS,), generator=generator)

    @property
    def weight(self) -> Tensor:
        return self.logits.linear.weight

    def plain(self, kl_weight: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The definition, on whole logits."""
        logits = self.hidden @ self.weight.T
        cross_entropy = F.cross_entropy(logits, self.labels)
        soft, goal = (z / temperature for z in (logits, self.teacher_logits))
        kl = F.kl_div(soft.log_softmax(-1), goal.log_softmax(-1), log_target=True, reduction="batchmean")
        return (1 - kl_weight) * cross_entropy + kl_weight * temperature**2 * kl, cross_entropy, kl

    def online(self, temperature: float) -> HiddenTarget:
        return HiddenTarget(self.teacher_logits, lambda rows: rows, temperature)

    def top_k(self, k: int, temperature: float) -> TopKTarget:
        values, indices = (self.teacher_logits / temperature).log_softmax(-1).topk(k)
        return TopKTarget(indices, values)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(3 * loss, (self.hidden, self.weight))  # a factor, as accumulation has one


@pytest.mark.parametrize("chunk", [1, 10, 37, 256])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.3, 1.0), (0.7, 2.5)])
def test_value_and_gradient_are_those_of_the_plain_form(kl_weight: float, temperature: float, chunk: int):
    case = Case()
    expected = case.plain(kl_weight, temperature)
    options: dict[str, Any] = {"kl_weight": kl_weight, "temperature": temperature, "chunk": chunk}
    losses = chunked_loss(case.hidden, case.logits, case.labels, case.online(temperature), **options)
    torch.testing.assert_close(tuple(losses), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(case.gradients(losses.loss), case.gradients(expected[0]), rtol=1e-11, atol=1e-12)


def test_without_a_teacher_it_is_cross_entropy():
    case = Case()
    losses = chunked_loss(case.hidden, case.logits, case.labels, chunk=10)
    expected = case.plain(0.0, 1.0)[0]
    assert (losses.loss.item(), losses.kl.item()) == (pytest.approx(expected.item(), rel=1e-12), 0.0)
    torch.testing.assert_close(case.gradients(losses.loss), case.gradients(expected))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_is_the_whole_teacher(temperature: float):
    case = Case()
    expected = case.plain(1.0, temperature)
    losses = chunked_loss(
        case.hidden, case.logits, case.labels, case.top_k(VOCAB, temperature), temperature=temperature, chunk=10
    )
    torch.testing.assert_close(losses.kl, expected[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(case.gradients(losses.loss), case.gradients(expected[0]), rtol=1e-9, atol=1e-9)


def test_top_k_is_the_divergence_over_k_tokens_and_any_other():
    """Autograd through the lumped distributions, which knows nothing of how the rest is spread."""
    case, k = Case(), 5
    target = case.top_k(k, 1.0)
    log_q = (case.hidden @ case.weight.T).log_softmax(-1)
    known_q = log_q.gather(-1, target.indices)
    p, q = target.values.exp(), known_q.exp()
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    lumped = ((p * (target.values - known_q)).sum(-1) + rest_p * (rest_p / rest_q).log()).mean()
    losses = chunked_loss(case.hidden, case.logits, case.labels, target, chunk=10)
    torch.testing.assert_close(losses.loss, lumped, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(case.gradients(losses.loss), case.gradients(lumped), rtol=1e-9, atol=1e-10)
    assert losses.kl < case.plain(1.0, 1.0)[2], "a lower bound"


def test_under_autocast_products_are_bfloat16_and_gradients_keep_the_masters_precision():
    case = Case()
    hidden, logits = case.hidden.detach().float().requires_grad_(), product_with(case.weight.detach().float())
    exact = case.gradients(case.plain(0.5, 1.0)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = chunked_loss(hidden, logits, case.labels, case.online(1.0), kl_weight=0.5)
    (3 * losses.loss).backward()
    for tensor, gradient in zip((hidden, logits.linear.weight), exact, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
        assert 0 < (tensor.grad.double() - gradient).norm() / gradient.norm() < 0.03


def test_a_frozen_output_embedding_gets_no_gradient():
    case = Case()
    case.weight.requires_grad_(False)
    chunked_loss(case.hidden, case.logits, case.labels, chunk=10).loss.backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is None


def test_the_teacher_is_the_dense_model():
    student: Any = tiny.build("llama-gqa", seed=1)
    teacher: Any = tiny.build("llama-gqa", seed=2)
    ids = torch.randint(tiny.VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    log_q, log_p = (model(ids).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    expected = F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean")
    with hidden_for_logits(student) as last:
        student(input_ids=ids)
    target = teacher_target(teacher, ids, 1.0)
    losses = chunked_loss(last.take()[:, :-1].flatten(0, 1), last.logits, ids[:, 1:].flatten(), target, chunk=7)
    torch.testing.assert_close(losses.kl, expected)
    same = chunked_loss(target.hidden, Logits.of(teacher), ids[:, 1:].flatten(), target, chunk=7)
    assert abs(same.kl.item()) < 1e-6


@pytest.mark.parametrize("teacher_rows", [30, 50])
def test_tokens_that_one_embedding_lacks_have_no_probability_of_the_teacher(teacher_rows: int) -> None:
    """The student has 40 rows; 30 of them are known to both."""
    generator = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(12, 8, generator=generator), torch.randint(30, (12,), generator=generator)
    student, teacher = (nn.Linear(8, rows, bias=False) for rows in (40, teacher_rows))
    target = HiddenTarget(hidden, Logits(teacher), 1.0, vocabulary=30)
    losses = chunked_loss(hidden.clone().requires_grad_(True), Logits(student), labels, target, chunk=5)
    log_p = teacher(hidden)[:, :30].log_softmax(-1)
    log_q = student(hidden).log_softmax(-1)[:, :30]
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(losses.kl, expected)
    losses.loss.backward()
    assert student.weight.grad is not None
    assert bool(student.weight.grad.isfinite().all())
