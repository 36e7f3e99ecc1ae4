"""Shortened LLaMA (Kim et al., 2024, arXiv 2402.02834): remove blocks by their perplexity or Taylor importance."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.config.run import SearchConfig
from darwinlm.model.family import Family
from darwinlm.rivals.depth import removable_blocks, remove_until_it_fits, without_blocks
from darwinlm.rivals.problem import Problem
from darwinlm.runtime.progress import track
from darwinlm.search.fitness import Fitness
from darwinlm.types import Genome, SelectionStage

KEPT_FIRST, KEPT_LAST = 4, 2  # blocks that Taylor+ keeps, as their removal does more harm than their importance says


def shortened_llama(problem: Problem) -> Genome:
    """Return the dense model without the blocks whose removal, each alone, raises perplexity least (equation 2).

    Raises:
        UsageError: if no removal of whole blocks fits the budget.
    """
    budget, stitcher, text = problem.budget, problem.stitcher, problem.token_ids
    blocks, stage = removable_blocks(budget), SelectionStage(survivors=1, fitness_tokens=text.numel())
    fitness = Fitness(stitcher, text, text, SearchConfig(metric="perplexity", stages=(stage,)))
    importance = [0.0] * stitcher.dense.config.num_hidden_layers
    for block in track(blocks, "perplexity without a block", len(blocks)):
        importance[block] = fitness.score(without_blocks(budget, [block]), stage, budget.grid.dense())
    return remove_until_it_fits(budget, importance)


def shortened_llama_taylor(problem: Problem) -> Genome:
    """Return the dense model without the blocks of least Taylor+ importance.

    The first four blocks and the last two are removed only after all others.

    Raises:
        UsageError: if no removal of whole blocks fits the budget.
    """
    stitcher = problem.stitcher
    importance = taylor_importance(stitcher.dense, stitcher.family, problem.token_ids)
    most = max(importance)
    last = len(importance) - KEPT_LAST
    kept = [value + (block < KEPT_FIRST or block >= last) * (1 + most) for block, value in enumerate(importance)]
    return remove_until_it_fits(problem.budget, kept)


def taylor_importance(
    model: PreTrainedModel, family: Family, token_ids: Int[Tensor, "sequences length"]
) -> list[float]:
    """Return `sum |dL/dW * W|` over the weight matrices of each block, where `L` is the language-model loss."""
    blocks: Any = model.get_submodule(family.blocks)
    weights = [[m.weight for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]
    every = [weight for block in weights for weight in block]
    trainable = [weight.requires_grad for weight in every]
    gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in every]
    try:
        for weight in every:
            weight.requires_grad_(True)
        for ids in token_ids.to(model.device).split(1):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            for sum_, gradient in zip(gradients, torch.autograd.grad(loss, every), strict=True):
                sum_ += gradient
    finally:
        for weight, was in zip(every, trainable, strict=True):
            weight.requires_grad_(was)
    importance = iter((g * w.detach()).abs().double().sum().item() for g, w in zip(gradients, every, strict=True))
    return [sum(next(importance) for _ in block) for block in weights]
