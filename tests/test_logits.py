"""Logits from last hidden states against the forward pass of every family, and the loss on them against autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
)

import tiny
from darwinlm.losses import logits as module
from darwinlm.losses.distillation import Losses, chunked_loss, hidden_for_logits, teacher_target
from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.training.trainer import _Objective
from darwinlm.types import UsageError

SEQUENCES, LENGTH = 2, 13
TOKEN_IDS = torch.randint(tiny.VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
LABELS = TOKEN_IDS[:, 1:].flatten()
EXACT: Any = {"rtol": 1e-5, "atol": 1e-5}

SIZES: dict[str, Any] = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, PreTrainedConfig] = {
    "olmo": OlmoConfig(**SIZES, intermediate_size=48, pad_token_id=0, eos_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, pad_token_id=0),
    "gpt2": GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0),
    "bloom": BloomConfig(**SIZES),
    "falcon": FalconConfig(**SIZES),
    "phi": PhiConfig(**SIZES, intermediate_size=48),  # whose output embedding has a bias
    "cohere": CohereConfig(**SIZES, intermediate_size=48, logit_scale=0.5, pad_token_id=0, eos_token_id=0),
}


def bent(family: str) -> Any:
    """A tiny model that does to its projections what no other family does."""
    model = build(family)
    type_of_model = type(model)

    class Bends(type_of_model):
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            output = super().forward(*arguments, **keywords)
            output.logits = output.logits.sinh()
            return output

    model.__class__ = Bends
    return model


def build(family: str) -> Any:
    """A tiny model. The soft cap of Gemma 2 is so low that it bends every logit."""
    config = copy.deepcopy(tiny.CONFIGS.get(family) or OTHERS[family])
    if family == "gemma2":
        config.final_logit_softcapping = 2.0
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=[*tiny.CONFIGS, *OTHERS, "bent"])
def model(request: pytest.FixtureRequest) -> Any:
    return bent("qwen2") if request.param == "bent" else build(request.param)


@pytest.fixture(params=[*tiny.CONFIGS, *OTHERS])
def trainable(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@torch.no_grad()
def test_logits_are_those_of_the_forward_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "CACHED_ROWS", 3)
    monkeypatch.setattr(module, "TILE", (5, 64))
    modules = dict(model.named_modules())
    expected = model(TOKEN_IDS).logits.flatten(0, 1)
    hidden = hidden_states(model, TOKEN_IDS).flatten(0, 1)
    logits = Logits.of(model)
    torch.testing.assert_close(logits(hidden), expected, **EXACT)
    together = torch.full_like(expected, torch.nan)
    for rows, values in logits.chunks(hidden):
        assert len(values) <= 3
        together[rows] = values
    torch.testing.assert_close(together, expected, **EXACT)
    parts: dict[int, list[torch.Tensor]] = {}
    for rows, _, (ours, others) in logits.tiles([hidden, 2 * hidden]):
        parts.setdefault(rows.start, []).append(ours)
        assert ours.shape == others.shape
    torch.testing.assert_close(torch.cat([torch.cat(part, -1) for part in parts.values()]), expected, **EXACT)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(
    ("family", "parts"),
    [("llama-mha", (1.0, None)), ("granite", (3.0, None)), ("gemma2", (1.0, 2.0)), ("cohere", (2.0, None))],
)
@torch.no_grad()
def test_scaling_and_cap_change_the_logits(family: str, parts: tuple[float, float | None]) -> None:
    """Without this, the tests here might pass because scaling and cap hardly matter."""
    model = build(family)
    logits = Logits.of(model)
    assert (logits.scaling, logits.cap) == parts
    hidden = hidden_states(model, TOKEN_IDS).flatten(0, 1)
    plain = (logits(hidden) - logits.linear(hidden)).abs().max() < 1e-6
    assert plain == (parts == (1.0, None))


def test_only_a_family_with_a_step_of_its_own_runs_its_forward_pass(model: Any) -> None:
    assert isinstance(Logits.of(model).project, nn.Linear) == (type(model).__name__ != "Bends")


def test_a_setting_of_the_same_name_with_another_meaning_is_not_taken_for_scaling() -> None:
    """HyperCLOVA X multiplies by `logits_scaling`, by which Granite divides."""
    model = build("granite")
    type_of_model = type(model)

    class Multiplies(type_of_model):
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            output = super().forward(*arguments, **keywords)
            output.logits = output.logits * self.config.logits_scaling**2
            return output

    model.__class__ = Multiplies
    with torch.no_grad():
        hidden = hidden_states(model, TOKEN_IDS).flatten(0, 1)
        torch.testing.assert_close(Logits.of(model)(hidden), model(TOKEN_IDS).logits.flatten(0, 1), **EXACT)


def test_the_gradient_for_hidden_states_is_that_of_autograd(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "CACHED_ROWS", 3)
    with torch.no_grad():
        hidden = hidden_states(model, TOKEN_IDS).flatten(0, 1)
    factors = torch.randn(SEQUENCES * LENGTH, tiny.VOCAB, generator=torch.Generator().manual_seed(1))
    gradient = Logits.of(model).gradient(hidden, lambda rows, values: factors[rows] * values.cos())
    states = hidden.clone().requires_grad_()
    (factors * module._around(model)(states).sin()).sum().backward()  # the family's own forward pass
    torch.testing.assert_close(gradient, states.grad, **EXACT)


def plain_loss(logits: Tensor, teacher_logits: Tensor, kl_weight: float, temperature: float) -> Tensor:
    """The definition, on whole logits of a model's own forward pass."""
    student, teacher = (z[:, :-1].flatten(0, 1) for z in (logits, teacher_logits))
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return (1 - kl_weight) * F.cross_entropy(student, LABELS) + kl_weight * temperature**2 * kl


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    results = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, results, strict=True) if gradient is not None}


@pytest.mark.parametrize(("kl_weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.4, 2.0)])
def test_the_chunked_loss_is_that_of_the_forward_pass(trainable: Any, kl_weight: float, temperature: float) -> None:
    """Its gradient too, for every weight: blocks, norms, output embedding and its bias, tied or not."""
    student, teacher = trainable, copy.deepcopy(trainable)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter, memory_format=torch.contiguous_format)
    with torch.no_grad():
        teacher_logits = teacher(TOKEN_IDS).logits
    expected = plain_loss(student(TOKEN_IDS).logits, teacher_logits, kl_weight, temperature)
    with hidden_for_logits(student) as last:
        student(TOKEN_IDS)
        losses: Losses = chunked_loss(
            last.take()[:, :-1].flatten(0, 1),
            last.logits,
            LABELS,
            teacher_target(teacher, TOKEN_IDS, temperature),
            kl_weight=kl_weight,
            temperature=temperature,
            chunk=7,
        )
    torch.testing.assert_close(losses.loss, expected, **EXACT)
    of_student, of_plain = gradients(student, losses.loss), gradients(student, expected)
    assert of_student.keys() == of_plain.keys()
    largest = max(gradient.abs().max() for gradient in of_plain.values())
    for name, gradient in of_plain.items():
        torch.testing.assert_close(of_student[name] / largest, gradient / largest, **EXACT)


def test_the_trainers_loss_function_gives_the_models_own_loss(trainable: Any) -> None:
    expected = trainable(TOKEN_IDS, labels=TOKEN_IDS).loss
    usual = trainable.loss_function
    with hidden_for_logits(trainable) as last:
        trainable.loss_function = _Objective(last, 0.0)
        loss = trainable(TOKEN_IDS, labels=TOKEN_IDS).loss
    torch.testing.assert_close(loss, expected, **EXACT)
    trainable.loss_function = usual
    torch.testing.assert_close(trainable(TOKEN_IDS, labels=TOKEN_IDS).loss, expected)  # nothing is left behind


def test_a_teacher_may_be_of_any_family(model: Any) -> None:
    with torch.no_grad():
        expected = (model(TOKEN_IDS).logits[:, :-1].flatten(0, 1) / 2).log_softmax(-1)
    target = teacher_target(model, TOKEN_IDS, 2.0)
    torch.testing.assert_close(target.log_probs(slice(3, 9), expected[3:9]), expected[3:9], **EXACT)


def test_a_student_of_a_family_with_a_step_of_its_own_is_refused() -> None:
    model = bent("qwen2")
    with pytest.raises(UsageError, match="scaled or capped product"), hidden_for_logits(model):
        pass
    with pytest.raises(UsageError, match="choose a model of another family"):
        chunked_loss(torch.zeros(3, 32), Logits.of(model), LABELS[:3])
