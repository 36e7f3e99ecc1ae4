"""ShearedLLaMA's allocation (Xia et al., 2023, arXiv 2310.06694): masks over structures, learned within a size.

Every structure has a hard-concrete mask (Louizos et al., 2018, arXiv 1712.01312) that multiplies what its consumer
reads. The masks minimise the language-model loss under a Lagrangian for the size, whose multipliers maximise it. In the
paper the weights train too, on 0.4 B tokens, and masks of layers and of the hidden size lead to one given shape; here
weights are frozen, the size alone is given, and what the masks decide is how much each unit keeps: which structures
those are, and their weights, are the database's, as for all methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.losses.gradients import CrossEntropyGradient
from darwinlm.losses.logits import Logits
from darwinlm.model.families import linear_at
from darwinlm.rivals.problem import Problem, mask_tokens
from darwinlm.runtime.progress import say, track
from darwinlm.search.budget import Budget
from darwinlm.search.mutation import restore
from darwinlm.search.sensitivity import least_sensitive
from darwinlm.types import DarwinError, Genome, Unit

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature, and the ends of the stretched interval (Louizos et al., section 4)


OPEN = math.log(100)  # log alpha stays between this, at which masks start, and its negative


WARM_UP = 0.2  # share of the steps in which the target grows from nothing


# Of Adam; the paper's is 1 for both. In the hundreds of steps here, a tenth of its own, masks that move as fast follow
# the noise, and multipliers that grow from 0 overshoot, unless the quadratic one is where theirs is after 300 steps.
MASK_RATE, MULTIPLIER_RATE, QUADRATIC = 0.2, 0.1, 300.0


def sheared_llama(problem: Problem) -> Genome:
    """The genome that learned masks come nearest to. Raises `DarwinError` as `learn_masks`."""
    genome = nearest_genome(problem.budget, learn_masks(problem))
    return restore(genome, problem.budget, Random(problem.seed))


def learn_masks(problem: Problem) -> tuple[Float[Tensor, " _"], ...]:
    """The probability to stay of each structure, unit by unit, learned on `config.mask_tokens` tokens.

    A step is a sequence of the calibration text. What the last one leaves between the expected cost and the budget, and
    tells, is made up by a shift that is the same for all masks.

    Raises:
        DarwinError: if the gradient is not finite at any step.
    """
    units, dense, text = problem.budget.grid.units, problem.stitcher.dense, problem.calibration
    masks = HardConcrete([unit.structures for unit in units], problem.seed, dense.device)
    lagrangian = _Lagrangian(problem.budget, dense.device)
    minimised = {"params": [masks.log_alpha], "lr": MASK_RATE}
    maximised = {"params": [lagrangian.multipliers], "lr": MULTIPLIER_RATE, "maximize": True}
    optimizer = torch.optim.Adam([minimised, maximised])
    steps, skipped = max(1, -(-mask_tokens(problem.budget.grid, problem.config) // text.shape[1])), 0
    with _frozen(dense):
        for step in track(range(steps), "masks", steps, status=lambda: str(lagrangian)):
            optimizer.zero_grad()
            with _multiplied(dense, units, masks.sample()):
                if not _add_gradient(dense, text[step % len(text)][None].to(dense.device)):
                    skipped += 1
                    continue
            lagrangian.loss(masks.kept(), (step + 1) / steps).backward()
            optimizer.step()
            masks.log_alpha.data.clamp_(-OPEN, OPEN)
    if skipped == steps:
        raise DarwinError(
            "sheared-llama: expected a finite loss on the calibration text, found NaN or infinity at every step; take "
            "--dtype float32"
        )
    if skipped:
        say(f"sheared-llama: {skipped} of {steps} steps had no finite gradient and were left out")
    say(f"sheared-llama: {steps * text.shape[1]:,} tokens, {lagrangian} before the shift")
    with torch.no_grad():
        _shift(masks, problem.budget)
        return masks.kept()


def nearest_genome(budget: Budget, kept: Sequence[Float[Tensor, " _"]]) -> Genome:
    """The genome within the budget whose units cost what the masks keep of them in expectation, by least squares."""
    rows = zip(budget.costs.units, _expected_costs(budget, kept), strict=True)
    return least_sensitive(budget, [[(cost - wanted.item()) ** 2 for cost in costs] for costs, wanted in rows])


class HardConcrete:
    """Random masks from 0 to 1, both included, that let a gradient through: one a structure.

    Attributes:
        log_alpha: of all units, one after another.
    """

    def __init__(self, structures: Sequence[int], seed: int, device: torch.device):
        self.structures = list(structures)
        self.log_alpha = torch.full((sum(structures),), OPEN, device=device, requires_grad=True)
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self) -> tuple[Float[Tensor, " _"], ...]:
        """Masks, unit by unit (Louizos et al., equations 10 and 11)."""
        uniform = torch.rand(len(self.log_alpha), generator=self._generator).clamp(1e-6, 1 - 1e-6)
        concrete = torch.sigmoid((uniform.logit().to(self.log_alpha.device) + self.log_alpha) / BETA)
        return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1).split(self.structures)

    def kept(self) -> tuple[Float[Tensor, " _"], ...]:
        """The probability that a mask is not 0, unit by unit (Louizos et al., equation 12)."""
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA)).split(self.structures)


class _Lagrangian:
    """`a (s - t) + b (s - t)^2` with multipliers `a` and `b` (section 2.1 of the paper, which has one for each size).

    `s` is the share of what can be pruned that is removed in expectation, `t` its target, which grows from 0.
    """

    def __init__(self, budget: Budget, device: torch.device):
        self.budget = budget
        self.multipliers = torch.tensor([0.0, QUADRATIC], device=device, requires_grad=True)
        self.prunable = sum(costs[0] for costs in budget.costs.units)
        self.target = (budget.cost(budget.grid.dense()) - budget.limit) / self.prunable
        self.removed = 0.0

    def __str__(self) -> str:
        return f"{self.removed:.1%} of {self.target:.1%} removed"

    def loss(self, kept: Sequence[Tensor], progress: float) -> Tensor:
        """At this share of all steps."""
        removed = 1 - torch.stack(_expected_costs(self.budget, kept)).sum() / self.prunable
        excess = removed - self.target * min(1.0, progress / WARM_UP)
        self.removed = removed.item()
        linear, quadratic = self.multipliers
        return linear * excess + quadratic * excess**2


def _shift(masks: HardConcrete, budget: Budget) -> None:
    """Add to all log alphas, by bisection, what the expected cost lacks to be the budget's limit."""
    learned, low, high = masks.log_alpha.clone(), -4 * OPEN, 4 * OPEN
    for _ in range(40):
        middle = (low + high) / 2
        masks.log_alpha.copy_(learned + middle)
        cost = budget.costs.fixed + sum(cost.item() for cost in _expected_costs(budget, masks.kept()))
        low, high = (low, middle) if cost > budget.limit else (middle, high)


def _expected_costs(budget: Budget, kept: Sequence[Tensor]) -> list[Tensor]:
    """What each unit costs at its expected number of structures: between two levels, in proportion."""
    costs = []
    for index, probability in enumerate(kept):
        removed, levels = budget.grid.removed[index], budget.costs.units[index]
        lost = len(probability) - probability.sum()
        above = next((level for level, count in enumerate(removed) if count > lost.item()), len(removed) - 1)
        slope = (levels[above] - levels[above - 1]) / (removed[above] - removed[above - 1])
        costs.append(levels[above] + (lost - removed[above]) * slope)
    return costs


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradients of weights: they would cost a sixth of a step, and a copy of the model."""
    trainable = {weight: weight.requires_grad for weight in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for weight, was in trainable.items():
            weight.requires_grad_(was)


@contextmanager
def _multiplied(model: PreTrainedModel, units: Sequence[Unit], masks: Sequence[Tensor]) -> Iterator[None]:
    """Each structure's columns of what its consumer reads are multiplied by its mask."""
    hooks = []
    for unit, mask in zip(units, masks, strict=True):
        columns = mask.repeat_interleave(unit.structure_width).to(model.dtype)

        def multiply(_: nn.Module, inputs: tuple[Tensor], columns: Tensor = columns) -> tuple[Tensor]:
            return (inputs[0] * columns,)

        hooks.append(linear_at(model, unit.consumer).register_forward_pre_hook(multiply))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_gradient(model: Any, ids: Int[Tensor, "1 length"]) -> bool:
    """Backpropagate the language-model loss on a sequence; False, and nothing is, where that is not finite."""
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0, :-1]
    gradient = Logits(model).gradient(hidden, CrossEntropyGradient(ids[0, 1:]))
    if not gradient.isfinite().all():
        return False
    hidden.backward(gradient)
    return True
