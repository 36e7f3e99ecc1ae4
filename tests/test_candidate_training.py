"""Training of candidates takes the steps of the plain loss, moves only the weights that train, and loses no step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from darwinlm.config.run import SearchConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.search.candidate_training import CandidateTrainer, _training, rounded
from darwinlm.search.fitness import Fitness
from darwinlm.types import Genome, SelectionStage
from pruned import CPU, prune, token_ids
from test_fitness import random_genomes

LENGTH = token_ids().shape[1]


@pytest.fixture(scope="module", params=["llama-gqa", "qwen2"])
def stitcher(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Stitcher:
    return prune(checkpoints[request.param], tmp_path_factory.mktemp("database")).stitcher


def test_training_lowers_the_loss(stitcher: Stitcher) -> None:
    model: Any = stitcher.stitch(random_genomes(stitcher, 1)[0])
    ids = token_ids(2, 8)
    loss = model(input_ids=ids, labels=ids).loss
    trained: Any = (
        CandidateTrainer(ids.split(1), 3e-3, CPU).train(stitcher.grid.dense(), lambda: model, 8 * LENGTH).model
    )
    assert trained(input_ids=ids, labels=ids).loss < loss
    assert model(input_ids=ids, labels=ids).loss == loss


def plain_cross_entropy(model: Any, _: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def plain_divergence(model: Any, dense: Any, ids: torch.Tensor) -> torch.Tensor:
    log_q, log_p = (each(input_ids=ids).logits[:, :-1].log_softmax(-1) for each in (model, dense))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def consumers_of(stitcher: Stitcher) -> list[str]:
    return [unit.consumer for unit in stitcher.grid.units]


@pytest.mark.parametrize("loss", [plain_cross_entropy, plain_divergence])
@pytest.mark.parametrize("all_train", [True, False])
def test_a_step_is_that_of_the_plain_loss(stitcher: Stitcher, loss: Any, all_train: bool) -> None:
    """The gradient made a few tokens at a time, with frozen output embedding, is autograd's for the whole logits."""
    model = stitcher.stitch(random_genomes(stitcher, 1)[0])
    ids = token_ids(2, 1)
    teacher = stitcher.dense if loss is plain_divergence else None
    trains = None if all_train else consumers_of(stitcher)
    trained = CandidateTrainer(ids.split(1), 1e-3, CPU, teacher, trains).train(
        stitcher.grid.dense(), lambda: model, LENGTH
    )
    plain: Any = copy.deepcopy(model)
    loss(plain.train().requires_grad_(True), stitcher.dense, ids).backward()
    names = list(_training(trained.model))
    if not all_train:
        assert {name.removesuffix(".weight") for name in names} <= set(consumers_of(stitcher))
    weights = [plain.get_parameter(name) for name in names]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for weight, after in zip(weights, _training(trained.model).values(), strict=True):
        assert weight.grad is not None
        moment = trained.optimizer.state[after]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * weight.grad, atol=1e-6, rtol=1e-4)


def test_a_search_can_train_by_distillation(stitcher: Stitcher) -> None:
    """With distillation the score is lower, and training does not change the dense model."""
    stage = SelectionStage(1, 256, 256)
    genome = random_genomes(stitcher, 1)[0]
    scores = {}
    for loss in ("cross-entropy", "distillation"):
        config = SearchConfig(stages=(stage,), learning_rate=1e-3, loss=loss)
        scorer = Fitness(stitcher, token_ids(3, 8), token_ids(4, 8), config)
        scores[loss] = scorer.score(genome, stage), scorer.score(stitcher.grid.dense(), stage)
    assert scores["distillation"][0] < scores["cross-entropy"][0]
    assert scores["distillation"][1] == pytest.approx(0, abs=1e-4)
    assert scores["cross-entropy"][1] > 1e-3


def test_a_search_can_train_consumers_alone(stitcher: Stitcher) -> None:
    """Only the consumers change; all other weights share the candidate's memory."""
    genome, ids = random_genomes(stitcher, 1)[0], token_ids(4, 8)
    candidate = stitcher.stitch(genome)
    before = {name: weight.clone() for name, weight in candidate.named_parameters()}
    trainer = CandidateTrainer(ids.split(1), 1e-3, CPU, trains=consumers_of(stitcher))
    trained = trainer.train(genome, lambda: candidate, ids.numel())
    training = dict(_training(trained.model))
    assert set(training) == {f"{path}.weight" for path in consumers_of(stitcher)} & set(before)
    with rounded(trained.model, candidate.dtype) as model:
        scored = dict(model.named_parameters())
        for name, weight in candidate.named_parameters():
            assert torch.equal(weight, before[name])
            assert torch.equal(scored[name], weight) == (name not in training)
            assert (scored[name].data_ptr() == weight.data_ptr()) == (name not in training)
    stage, scores = SelectionStage(1, 256, 256), {}
    for trains in ("all", "consumers"):
        config = SearchConfig(stages=(stage,), learning_rate=1e-3, trains=trains)
        scores[trains] = Fitness(stitcher, token_ids(3, 8), ids, config).score(genome, stage)
    assert scores["all"] != pytest.approx(scores["consumers"], rel=1e-3)


def token_embeddings(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()


def test_embeddings_and_head_are_shared_and_stay(stitcher: Stitcher) -> None:
    model = stitcher.stitch(stitcher.grid.dense())
    before = token_embeddings(stitcher.dense).clone()
    pieces = token_ids(2, 8).split(1)
    trained = CandidateTrainer(pieces, 1e-2, CPU).train(stitcher.grid.dense(), lambda: model, 8 * LENGTH).model
    both: Any = (
        (stitcher.dense.get_input_embeddings(), trained.get_input_embeddings()),
        (stitcher.dense.get_output_embeddings(), trained.get_output_embeddings()),
    )
    for dense, copied in both:
        mine, theirs = next(iter(copied.parameters())), next(iter(dense.parameters()))
        assert mine.data_ptr() == theirs.data_ptr()
        assert not mine.requires_grad
    assert torch.equal(token_embeddings(stitcher.dense), before)
    names = set(_training(trained))
    assert all(".layers." in name or name.endswith("model.norm.weight") for name in names)


def test_bfloat16_steps_of_a_small_learning_rate_are_not_lost() -> None:
    """Master weights are float32: in bfloat16, rounding would undo each step."""
    model: Any = tiny.build("llama-gqa")
    model.to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = CandidateTrainer(token_ids(2, 8).split(1), 1e-4, CPU).train(Genome(()), lambda: model, 8 * LENGTH)
    exact = {name: p.detach().clone() for name, p in _training(trained.model).items()}
    with rounded(trained.model, torch.bfloat16) as scored:
        after = {name: p.detach() for name, p in scored.named_parameters()}
    weights = [name for name, p in exact.items() if p.dim() == 2]
    changed = sum((after[name] != before[name]).sum().item() for name in weights)
    # Eight steps of 1e-4 on weights of about 0.3, whose bfloat16 spacing is 2e-3: each alone would round away.
    assert changed > 0.1 * sum(before[name].numel() for name in weights)
    assert after[weights[0]].dtype == torch.bfloat16
    for name, weight in _training(trained.model).items():  # goes on training from what it had learnt
        assert torch.equal(weight, exact[name])
