"""What counts alone counts: calibration, fitness, training and refit against plain formulas over masked tokens."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from darwinlm.config.run import RefitConfig, SearchConfig
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import Stitcher
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.blocks import InHostMemory
from darwinlm.model.families import linear_at
from darwinlm.search.fitness import Fitness
from darwinlm.training.refit import refit, set_refitted
from darwinlm.types import DarwinError, Genome, MetricName, SelectionStage, UsageError
from pruned import CPU, Pruned, prune, token_ids

METRICS: tuple[MetricName, ...] = ("kl", "top-k-kl", "perplexity")
TEXT = token_ids(1, 8)
COUNTS = torch.rand(TEXT.shape, generator=torch.Generator().manual_seed(5)) < 0.4
COUNTS[2] = False  # a sequence in which nothing counts
STAGES = (SelectionStage(2, 32 * 3 + 9), SelectionStage(1, 256))
TRAINED = (SelectionStage(1, 256, 100),)
GENOME = Genome((0, 1, 2, 4, 1, 3))


@pytest.fixture(scope="module")
def case(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return prune(checkpoints["llama-gqa"], tmp_path_factory.mktemp("database"))


def by_hand(metric: MetricName, dense: Any, candidate: Any, ids: Tensor, counts: Tensor, top_k: int = 20) -> float:
    """The metric over masked predictions, one token at a time, in float64."""
    found = []
    with torch.no_grad():
        log_p, log_q = (model(ids).logits.double().log_softmax(-1) for model in (dense, candidate))
    for row, column in counts.nonzero().tolist():
        p, q = log_p[row, column].exp(), log_q[row, column].exp()
        if metric == "perplexity":
            if column + 1 < ids.shape[1]:
                found.append(-math.log(q[ids[row, column + 1]]))
            continue
        if metric == "top-k-kl":
            known = p.topk(top_k).indices
            p, q = (torch.cat([part[known], 1 - part[known].sum()[None]]) for part in (p, q))
        found.append((p * (p / q).log()).sum().item())
    return sum(found) / len(found)


def scorer(case: Pruned, metric: MetricName = "kl", scrambled: float = 0.0, **settings: Any) -> Fitness:
    given = {"stages": STAGES, "learning_rate": 1e-3, "metric": metric, "top_k": 20, "scrambled": scrambled} | settings
    blocks = given.pop("blocks", None)
    marks = {"search": COUNTS, "training": COUNTS}
    return Fitness(case.stitcher, TEXT, TEXT, SearchConfig(**given), blocks=blocks, counts=marks)


@pytest.mark.parametrize("metric", METRICS)
def test_candidates_in_lockstep_are_scored_on_what_counts(case: Pruned, metric: MetricName) -> None:
    """A whole stage, and one that ends within a sequence; alone, and beside others that start from a parent."""
    genomes, fitness = case.genomes()[:3], scorer(case, metric)
    for stage in STAGES:
        whole, rest = divmod(stage.fitness_tokens, 32)
        scores = fitness.scores(genomes, stage, genomes[0])
        for genome, score in zip(genomes, scores, strict=True):
            candidate = case.stitcher.stitch(genome)
            if not rest:
                expected = by_hand(metric, case.dense, candidate, TEXT[:whole], COUNTS[:whole])
                assert score == pytest.approx(expected, abs=1e-4)
                continue
            parts = [(TEXT[:whole], COUNTS[:whole]), (TEXT[whole : whole + 1, :rest], COUNTS[whole : whole + 1, :rest])]
            sizes = [int(marks[:, : marks.shape[1] - (metric == "perplexity")].sum()) for _, marks in parts]
            sums = [
                by_hand(metric, case.dense, candidate, *part) * size for part, size in zip(parts, sizes, strict=True)
            ]
            assert score == pytest.approx(sum(sums) / sum(sizes), abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_all_that_counts_is_what_counts_without_a_mask(case: Pruned, metric: MetricName) -> None:
    config = SearchConfig(stages=STAGES, metric=metric, top_k=20)
    everything = {"search": torch.ones_like(COUNTS), "training": torch.ones_like(COUNTS)}
    with_mask = Fitness(case.stitcher, TEXT, TEXT, config, counts=everything).scores(case.genomes()[:2], STAGES[1])
    without = Fitness(case.stitcher, TEXT, TEXT, config).scores(case.genomes()[:2], STAGES[1])
    assert with_mask == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("loss", ["cross-entropy", "distillation"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_candidates_are_trained_on_what_counts(
    case: Pruned, loss: Literal["cross-entropy", "distillation"], elsewhere: bool
) -> None:
    """Three sequences and four tokens of the next: a step for each, but none where nothing counts."""
    dense, family = case.stitcher.dense, case.stitcher.family
    blocks = InHostMemory.of(dense, family, CPU) if elsewhere else None
    found = scorer(case, stages=TRAINED, loss=loss, blocks=blocks).scores([GENOME], TRAINED[0])[0]
    model: Any = case.stitcher.stitch(GENOME)
    paths = [unit.consumer for unit in case.database.grid.units]
    own = {path: linear_at(model, path).weight.detach().clone() for path in paths if _alive(model, path)}
    set_refitted(model, own)
    weights = [linear_at(model, path).weight.requires_grad_() for path in own]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    steps = 0
    for row, end in enumerate((32, 32, 32, 4)):
        ids, marks = TEXT[row : row + 1, :end], COUNTS[row, : end - 1]
        if not marks.any():
            continue
        steps += 1
        log_q = model(ids).logits[0, :-1].log_softmax(-1)[marks]
        if loss == "cross-entropy":
            lost = -log_q.gather(-1, ids[0, 1:][marks][:, None]).mean()
        else:
            with torch.no_grad():
                log_p = dense(ids).logits[0, :-1].log_softmax(-1)[marks]
            lost = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        lost.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert steps == 3
    assert found == pytest.approx(by_hand("kl", dense, model, TEXT, COUNTS), abs=1e-4)
    assert found != pytest.approx(by_hand("kl", dense, case.stitcher.stitch(GENOME), TEXT, COUNTS), abs=1e-3)


def _alive(model: Any, path: str) -> bool:
    try:
        return linear_at(model, path).weight.numel() > 0
    except DarwinError:
        return False


def test_a_stage_in_which_nothing_counts_is_refused(case: Pruned) -> None:
    nothing = torch.zeros_like(COUNTS)
    nothing[4:] = True
    with pytest.raises(
        UsageError, match=r"search.stages: expected answers of an assistant within the first 105 tokens"
    ):
        Fitness(case.stitcher, TEXT, TEXT, SearchConfig(stages=STAGES), counts={"search": nothing})


def test_the_refit_minimises_the_divergence_where_it_counts(case: Pruned, tmp_path: Path) -> None:
    config = RefitConfig(tokens=256, learning_rate=1e-2, batch_size=3, rank=0)
    stitcher: Stitcher = case.stitcher
    weights = refit(stitcher, GENOME, TEXT, config, tmp_path / "refit.safetensors", {}, counts=COUNTS)
    model: Any = stitcher.stitch(GENOME)
    set_refitted(model, {path: linear_at(model, path).weight.detach().clone() for path in weights})
    trained = {path: linear_at(model, path).weight.requires_grad_() for path in weights}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    for step in range(3):
        ids, marks = TEXT[3 * step : 3 * step + 3], COUNTS[3 * step : 3 * step + 3]
        rate = 1e-2 * min(1, (step + 1) / 0.3) * (1 + math.cos(math.pi * step / 3)) / 2
        optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            log_p = stitcher.dense(ids).logits.log_softmax(-1)[marks]
        log_q = model(ids).logits.log_softmax(-1)[marks]
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for path, weight in weights.items():
        torch.testing.assert_close(weight, trained[path].detach(), rtol=1e-3, atol=1e-4)


def _note(seen: list[Tensor], _: Any, given: tuple[Tensor, ...]) -> None:
    seen.append(given[0].detach())


def test_statistics_are_summed_over_what_counts(case: Pruned) -> None:
    """As if the activations of all other tokens had never been."""
    inputs: dict[str, list[Tensor]] = {unit.name: [] for unit in case.database.grid.units}
    for unit in case.database.grid.units:
        module = linear_at(case.dense, unit.consumer)
        module.register_forward_pre_hook(partial(_note, inputs[unit.name]))
    with torch.no_grad():
        case.dense(TEXT)
    for unit in case.database.grid.units:
        linear_at(case.dense, unit.consumer)._forward_pre_hooks.clear()
    for found in calibrate(case.checkpoint, TEXT, batch_size=3, device=CPU, counts=COUNTS):
        x = inputs[found.unit.name][0].double()
        counted = x[COUNTS]
        torch.testing.assert_close(found.hessian.double(), 2 * counted.T @ counted / len(counted), rtol=1e-4, atol=1e-4)
        assert found.tokens == int(COUNTS.sum())
        share = x[:, 0][COUNTS[:, 0]].square().sum() / counted.square().sum()
        assert found.first_token == pytest.approx(share.item(), rel=1e-4)


def test_quality_is_that_of_what_counts(case: Pruned) -> None:
    candidate = case.stitcher.stitch(GENOME)
    found = perplexity_and_kl({"dense": case.dense, "candidate": candidate}, TEXT, counts=COUNTS)["candidate"]
    predicted = COUNTS.clone()
    predicted[:, -1] = False
    assert found.kl == pytest.approx(by_hand("kl", case.dense, candidate, TEXT, predicted), abs=1e-4)
    expected = math.exp(by_hand("perplexity", case.dense, candidate, TEXT, COUNTS))
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="nothing in the held-out text counts"):
        perplexity_and_kl({"dense": case.dense}, TEXT, counts=torch.zeros_like(COUNTS))
