"""ShearedLLaMA's allocation (Xia et al., 2023, arXiv 2310.06694): masks over structures, learned under a size limit.

Every structure has a hard-concrete mask (Louizos et al., 2018, arXiv 1712.01312), by which the consumer's input is
multiplied. The masks minimise the language-model loss plus a Lagrangian for the size, whose multipliers maximise it. In
the paper the weights are trained too, on 0.4 B tokens, and masks of layers and of the hidden size lead to one given
shape. Here the weights are frozen, only the size is given, and the masks decide how much each unit keeps. Which
structures a unit keeps, and their weights, come from the database, as for all methods.
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

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature, and ends of the stretched interval (Louizos et al., section 4)


OPEN = math.log(100)  # the largest log alpha, at which masks start; its negative is the smallest
WARM_UP = 0.2  # share of the steps in which the target grows from nothing


# Adam's learning rates, which are 1 in the paper, and the first quadratic multiplier, which is 0 there. Training here
# takes hundreds of steps, a tenth of the paper's: at its rates masks would follow the noise, and multipliers that grow
# from 0 would overshoot. The quadratic multiplier starts where the paper's is after 300 steps.
MASK_RATE, MULTIPLIER_RATE, QUADRATIC = 0.2, 0.1, 300.0


def sheared_llama(problem: Problem) -> Genome:
    """Return the genome nearest to the learned masks. Raises `DarwinError` as `learn_masks` does."""
    genome = nearest_genome(problem.budget, learn_masks(problem))
    return restore(genome, problem.budget, Random(problem.seed))


def learn_masks(problem: Problem) -> tuple[Float[Tensor, " _"], ...]:
    """Return the probability that each structure stays, unit by unit, learned on `config.mask_tokens` tokens.

    Each step takes one sequence of the calibration text. After the last step, all log alphas are shifted by the same
    amount, so that the expected cost meets the budget.

    Raises:
        DarwinError: if the gradient is finite at no step.
    """
    units, dense, text = problem.budget.grid.units, problem.stitcher.dense, problem.calibration
    masks = HardConcrete([unit.structures for unit in units], problem.seed, dense.device)
    lagrangian = _Lagrangian(problem.budget, dense.device)
    minimised = {"params": [masks.log_alpha], "lr": MASK_RATE}
    maximised = {"params": [lagrangian.multipliers], "lr": MULTIPLIER_RATE, "maximize": True}
    optimizer = torch.optim.Adam([minimised, maximised])
    length, skipped = text.shape[1], 0
    steps = max(1, -(-mask_tokens(problem.budget.grid, problem.config, length) // length))
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
    """Return the genome within the budget whose units' costs are nearest to those expected, by least squares.

    Args:
        kept: for each unit, the probability that each of its structures stays, from which a unit's cost is expected.
    """
    rows = zip(budget.main.costs.units, _expected_costs(budget, kept), strict=True)
    return least_sensitive(budget, [[(cost - expected.item()) ** 2 for cost in costs] for costs, expected in rows])


class HardConcrete:
    """Random masks, one for each structure, that take values from 0 to 1, both included, and are differentiable.

    Attributes:
        log_alpha: the parameters of the masks of all units, one unit after another.
    """

    def __init__(self, structures: Sequence[int], seed: int, device: torch.device):
        self.structures = list(structures)
        self.log_alpha = torch.full((sum(structures),), OPEN, device=device, requires_grad=True)
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self) -> tuple[Float[Tensor, " _"], ...]:
        """Draw masks and return them unit by unit (Louizos et al., equations 10 and 11)."""
        uniform = torch.rand(len(self.log_alpha), generator=self._generator).clamp(1e-6, 1 - 1e-6)
        concrete = torch.sigmoid((uniform.logit().to(self.log_alpha.device) + self.log_alpha) / BETA)
        return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1).split(self.structures)

    def kept(self) -> tuple[Float[Tensor, " _"], ...]:
        """Return the probability that each mask is not 0, unit by unit (Louizos et al., equation 12)."""
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA)).split(self.structures)


class _Lagrangian:
    """The penalty `a (s - t) + b (s - t)^2` with multipliers `a` and `b` (section 2.1 of the paper).

    `s` is the expected share of the prunable cost that is removed, and `t` its target, which grows from 0. The paper
    has one such penalty for each size that it fixes.
    """

    def __init__(self, budget: Budget, device: torch.device):
        self.budget = budget
        self.multipliers = torch.tensor([0.0, QUADRATIC], device=device, requires_grad=True)
        self.prunable = sum(costs[0] for costs in budget.main.costs.units)
        self.target = (budget.cost(budget.grid.dense()) - budget.main.limit) / self.prunable
        self.removed = 0.0

    def __str__(self) -> str:
        return f"{self.removed:.1%} of {self.target:.1%} removed"

    def loss(self, kept: Sequence[Tensor], progress: float) -> Tensor:
        """Return the penalty for these probabilities to stay, when `progress` is the share of all steps done."""
        removed = 1 - torch.stack(_expected_costs(self.budget, kept)).sum() / self.prunable
        excess = removed - self.target * min(1.0, progress / WARM_UP)
        self.removed = removed.item()
        linear, quadratic = self.multipliers
        return linear * excess + quadratic * excess**2


def _shift(masks: HardConcrete, budget: Budget) -> None:
    """Shift all log alphas by the same amount, found by bisection, so that the expected cost meets the budget."""
    learned, low, high = masks.log_alpha.clone(), -4 * OPEN, 4 * OPEN
    for _ in range(40):
        middle = (low + high) / 2
        masks.log_alpha.copy_(learned + middle)
        cost = budget.main.costs.fixed + sum(cost.item() for cost in _expected_costs(budget, masks.kept()))
        low, high = (low, middle) if cost > budget.main.limit else (middle, high)


def _expected_costs(budget: Budget, kept: Sequence[Tensor]) -> list[Tensor]:
    """Return each unit's cost at its expected number of structures, interpolated linearly between two levels."""
    costs = []
    for index, probability in enumerate(kept):
        removed, levels = budget.grid.removed[index], budget.main.costs.units[index]
        lost = len(probability) - probability.sum()
        above = next((level for level, count in enumerate(removed) if count > lost.item()), len(removed) - 1)
        per_structure = (levels[above] - levels[above - 1]) / (removed[above] - removed[above - 1])
        costs.append(levels[above] + (lost - removed[above]) * per_structure)
    return costs


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Disable the gradients of weights, which would cost a sixth of a step and the memory of a second model."""
    trainable = {weight: weight.requires_grad for weight in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for weight, was in trainable.items():
            weight.requires_grad_(was)


@contextmanager
def _multiplied(model: PreTrainedModel, units: Sequence[Unit], masks: Sequence[Tensor]) -> Iterator[None]:
    """Multiply the input columns of every consumer by the masks of the structures that they belong to."""
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
    """Backpropagate the language-model loss on a sequence; if its gradient is not finite, do not, and return False."""
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0, :-1]
    gradient = Logits.of(model).gradient(hidden, CrossEntropyGradient(ids[0, 1:]))
    if not gradient.isfinite().all():
        return False
    hidden.backward(gradient)
    return True
