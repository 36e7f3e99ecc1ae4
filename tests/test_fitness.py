"""Fitness against an independent computation, and what training before selection does."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import tiny
from darwinlm.fitness import Fitness
from darwinlm.surgery import Stitcher
from darwinlm.types import Genome, SelectionStage
from pruned import prune, token_ids, zero_masked

STAGES = tuple(SelectionStage(1, tokens) for tokens in (64, 128, 256))


@pytest.fixture(scope="module", params=["llama-gqa", "qwen2"])
def stitcher(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Stitcher:
    return prune(checkpoints[request.param], tmp_path_factory.mktemp("database")).stitcher


def fitness(stitcher: Stitcher, stages: tuple[SelectionStage, ...] = STAGES, learning_rate: float = 1e-3) -> Fitness:
    return Fitness(stitcher, token_ids(1, 8), token_ids(2, 8), stages, learning_rate)


def random_genomes(stitcher: Stitcher, count: int) -> list[Genome]:
    rng, grid = Random(1), stitcher.grid
    return [Genome(tuple(rng.randint(0, grid.highest(i)) for i in range(len(grid.units)))) for _ in range(count)]


def test_fitness_is_the_kl_of_the_zero_masked_model(stitcher: Stitcher) -> None:
    scorer = fitness(stitcher)
    for genome in random_genomes(stitcher, 4):
        masked = zero_masked(stitcher.dense, stitcher.database, genome)
        for stage, sequences in zip(STAGES, (2, 4, 8), strict=True):
            ids = token_ids(1, 8)[:sequences]
            log_p = stitcher.dense(ids).logits.double().log_softmax(-1)
            log_q = masked(ids).logits.double().log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            assert scorer.score(genome, stage) == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_the_dense_model_has_no_divergence(stitcher: Stitcher) -> None:
    assert abs(fitness(stitcher).score(stitcher.grid.dense(), STAGES[-1])) < 1e-6


def test_a_score_does_not_depend_on_what_was_asked_before(stitcher: Stitcher) -> None:
    genome = random_genomes(stitcher, 1)[0]
    in_steps = fitness(stitcher)
    steps = [in_steps.score(genome, stage) for stage in STAGES]
    assert fitness(stitcher).score(genome, STAGES[-1]) == steps[-1]
    assert in_steps.score(genome, STAGES[0]) == steps[0]


def test_reuse_of_the_parents_pass_changes_nothing(stitcher: Stitcher) -> None:
    parent, *others = random_genomes(stitcher, 4)
    children = [parent.replace({index: 1 - min(parent.levels[index], 1)}) for index in range(len(parent.levels))]
    reusing = fitness(stitcher)
    for genome in [*children, *others, parent]:
        assert reusing.score(genome, STAGES[-1], parent) == fitness(stitcher).score(genome, STAGES[-1])


def test_training_lowers_the_divergence_on_the_text_trained_on(stitcher: Stitcher) -> None:
    """It trains (a stage without training scores otherwise), deterministically, and leaves the candidate's weights."""
    genome = random_genomes(stitcher, 1)[0]
    plain, trained = SelectionStage(1, 256), SelectionStage(1, 256, training_tokens=256)
    scorer = fitness(stitcher, (plain, trained))
    before = scorer.score(genome, plain)
    after = scorer.score(genome, trained)
    assert after != before
    assert fitness(stitcher, (plain, trained)).score(genome, trained) == after
    assert fitness(stitcher, (plain,)).score(genome, plain) == before
    more = SelectionStage(1, 256, training_tokens=64)
    assert fitness(stitcher, (more,)).score(genome, more) not in (before, after)


def test_training_lowers_the_loss(stitcher: Stitcher) -> None:
    scorer = fitness(stitcher, (STAGES[0],), learning_rate=3e-3)
    model = stitcher.stitch(random_genomes(stitcher, 1)[0])
    ids = token_ids(2, 8)
    loss = model(input_ids=ids, labels=ids).loss
    trained = scorer._train(model, tokens=256)
    assert trained(input_ids=ids, labels=ids).loss < loss
    assert model(input_ids=ids, labels=ids).loss == loss


def test_bfloat16_steps_of_a_small_learning_rate_are_not_lost(checkpoints: dict[str, Path], stitcher: Stitcher) -> None:
    """Masters are float32: rounding away each step would leave a bfloat16 candidate as it was."""
    scorer = fitness(stitcher, (STAGES[0],), learning_rate=1e-4)
    model: Any = tiny.build("llama-gqa")
    model.to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = dict(scorer._train(model, tokens=256).named_parameters())
    weights = [name for name, p in before.items() if p.dim() == 2]
    changed = sum((trained[name] != before[name]).sum().item() for name in weights)
    # Eight steps of 1e-4 on weights of about 0.3, whose bfloat16 spacing is 2e-3: each alone would round away.
    assert changed > 0.1 * sum(before[name].numel() for name in weights)
    assert trained[weights[0]].dtype == torch.bfloat16


def test_a_candidate_that_diverges_is_worst(stitcher: Stitcher) -> None:
    scorer = fitness(stitcher)
    scorer._sums[stitcher.grid.dense()] = [float("nan")]
    assert scorer.score(stitcher.grid.dense(), STAGES[0]) == float("inf")
