"""Gromov et al. (2024, arXiv 2403.17887): remove the consecutive blocks that turn the hidden state least."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from darwinlm.model.family import Family
from darwinlm.rivals.depth import removable_blocks, streams, too_large, without_blocks
from darwinlm.rivals.problem import Problem
from darwinlm.types import Genome

SEQUENCES = 64  # of the calibration text that angles are measured on


def cosine(problem: Problem) -> Genome:
    """Return the dense model without the window of consecutive blocks that turns the hidden state least.

    The window is as short as the budget allows (section 3.1).

    Raises:
        UsageError: if the model is too large for the budget even without the longest window.
    """
    budget, stitcher = problem.budget, problem.stitcher
    removable = set(removable_blocks(budget))
    # Only one token of each sequence counts, so this needs more sequences than the text of the search has.
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
    """Return `d(l, m) = E[arccos(cos(x_l, x_m))] / pi` for hidden states that enter blocks `l` and `m` (equation 7).

    The mean is over the last token of each sequence, in float64. The last index is for the output of the last block.
    """
    total = 0
    for states in streams(model, family, token_ids):
        last = F.normalize(torch.stack([state[-1] for state in states]).double(), dim=-1)
        total = total + torch.arccos((last @ last.T).clamp(-1, 1)) / torch.pi
    return torch.as_tensor(total).float() / len(token_ids)
