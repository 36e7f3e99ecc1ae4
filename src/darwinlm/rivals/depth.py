"""Shared parts of the methods that remove whole decoder blocks: removal by importance, and states between blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.model.family import Family
from darwinlm.search.budget import Budget
from darwinlm.search.costs import amount_of
from darwinlm.types import Genome, UsageError


def removable_blocks(budget: Budget) -> tuple[int, ...]:
    """Return the blocks that may be removed whole, in order: not the first one, because its attention must stay."""
    kept = {unit.block for i, unit in enumerate(budget.grid.units) if budget.ceilings[i] < budget.grid.highest(i)}
    return tuple(dict.fromkeys(unit.block for unit in budget.grid.units if unit.block not in kept))


def without_blocks(budget: Budget, blocks: Iterable[int]) -> Genome:
    """Return the genome of the dense model without these blocks."""
    removed = set(blocks)
    units = enumerate(budget.grid.units)
    return Genome(tuple(budget.grid.highest(i) if unit.block in removed else 0 for i, unit in units))


def remove_until_it_fits(budget: Budget, importance: Sequence[float]) -> Genome:
    """Return the dense model without its least important blocks, as few of them as the budget allows.

    Args:
        importance: the importance of every block of the model, in order.

    Raises:
        UsageError: if the model is too large even without all blocks that may be removed.
    """
    order = sorted(removable_blocks(budget), key=importance.__getitem__)
    for count in range(len(order) + 1):
        genome = without_blocks(budget, order[:count])
        if budget.fits(genome):
            return genome
    raise too_large(budget)


def too_large(budget: Budget, least: Genome | None = None) -> UsageError:
    """Return the error for a budget that no removal of whole blocks or modules reaches.

    Args:
        least: the smallest model of a method that removes modules; if None, the message is about blocks, and the
            smallest model lacks all blocks that may be removed.
    """
    smallest = budget.cost(least or without_blocks(budget, removable_blocks(budget)))
    return UsageError(
        f"whole {'modules' if least else 'blocks'} cannot make the model this small: expected a budget of at least "
        f"{amount_of(smallest)} {budget.main.costs.measure}, found {amount_of(budget.main.limit)}; give a larger one, "
        "or a method that prunes within units"
    )


@torch.inference_mode()
def streams(
    model: PreTrainedModel, family: Family, token_ids: Int[Tensor, "sequences length"]
) -> Iterator[list[Tensor]]:
    """Yield, for one sequence at a time, the hidden states that enter each block, and those that leave the last.

    They are `blocks + 1` float32 tensors `[length, d_out]`.
    """
    blocks: Any = model.get_submodule(family.blocks)
    for ids in token_ids.split(1):
        states: list[Tensor] = []

        def record_input(_: nn.Module, arguments: tuple[Tensor, ...], states: list[Tensor] = states) -> None:
            states.append(arguments[0][0].float())

        def record_output(_: nn.Module, __: object, output: Any, states: list[Tensor] = states) -> None:
            states.append((output[0] if isinstance(output, tuple) else output)[0].float())

        hooks = [block.register_forward_pre_hook(record_input) for block in blocks]
        hooks.append(blocks[-1].register_forward_hook(record_output))
        try:
            model.get_decoder()(ids.to(model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        yield states
