"""Gromov et al. (2024, arXiv 2403.17887): consecutive blocks leave together where the stream turns least."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from darwinlm.model.families import Family
from darwinlm.rivals.depth import removable_blocks, streams, too_large, without_blocks
from darwinlm.rivals.problem import Problem
from darwinlm.types import Genome

SEQUENCES = 64


def cosine(problem: Problem) -> Genome:
    """The dense model without the window of consecutive blocks over which the stream turns least.

    The window is as short as the budget allows (section 3.1).

    Raises:
        UsageError: if no window is long enough for the budget.
    """
    budget, stitcher = problem.budget, problem.stitcher
    removable = set(removable_blocks(budget))
    # A token a sequence counts, so it takes many: the text of the search has a few.
    distance = angular_distances(stitcher.dense, stitcher.family, problem.calibration[:SEQUENCES])
    for length in range(len(removable) + 1):
        windows = [range(start, start + length) for start in range(len(distance) - length)]
        fitting = [w for w in windows if removable.issuperset(w) and budget.fits(without_blocks(budget, w))]
        if fitting:
            return without_blocks(budget, min(fitting, key=lambda w: distance[w.start, w.stop].item()))
    raise too_large(budget)


def angular_distances(
    model: PreTrainedModel, family: Family, token_ids: Int[Tensor, "sequences length"]
) -> Float[Tensor, "boundaries boundaries"]:
    """`d(l, m) = E[arccos(cos(x_l, x_m))] / pi` between the streams into blocks `l` and `m` (equation 7).

    Of the last token of each sequence, in float64; the last boundary is the stream out of the last block.
    """
    total = 0
    for found in streams(model, family, token_ids):
        last = F.normalize(torch.stack([stream[-1] for stream in found]).double(), dim=-1)
        total = total + torch.arccos((last @ last.T).clamp(-1, 1)) / torch.pi
    return torch.as_tensor(total).float() / len(token_ids)
