"""ShortGPT (Men et al., 2024, arXiv 2403.03853): remove the blocks that change their input least."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from darwinlm.model.family import Family
from darwinlm.rivals.depth import remove_until_it_fits, streams
from darwinlm.rivals.problem import Problem
from darwinlm.types import Genome


def shortgpt(problem: Problem) -> Genome:
    """Return the dense model without its blocks of least influence.

    Raises:
        UsageError: if no removal of whole blocks fits the budget.
    """
    stitcher = problem.stitcher
    influence = block_influence(stitcher.dense, stitcher.family, problem.token_ids)
    return remove_until_it_fits(problem.budget, influence)


def block_influence(model: PreTrainedModel, family: Family, token_ids: Int[Tensor, "sequences length"]) -> list[float]:
    """Return `BI_i = 1 - E[cos(x_i, x_(i+1))]` of each block (equation 1), where `x_i` enters block `i`."""
    totals = [
        torch.stack([F.cosine_similarity(a, b, dim=-1).double().sum() for a, b in pairwise(s)])
        for s in streams(model, family, token_ids)
    ]
    return (1 - torch.stack(totals).sum(0) / token_ids.numel()).tolist()
