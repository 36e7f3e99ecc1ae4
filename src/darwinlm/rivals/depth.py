"""What the depth methods share: whole decoder blocks leave, until the model fits, and streams between blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.model.families import Family
from darwinlm.search.budget import Budget, amount_of
from darwinlm.types import Genome, UsageError


def removable_blocks(budget: Budget) -> tuple[int, ...]:
    """The blocks that may vanish whole, in the model's order. The first is not among them: its attention stays."""
    kept = {unit.block for i, unit in enumerate(budget.grid.units) if budget.ceilings[i] < budget.grid.highest(i)}
    return tuple(dict.fromkeys(unit.block for unit in budget.grid.units if unit.block not in kept))


def without_blocks(budget: Budget, blocks: Iterable[int]) -> Genome:
    """The dense model without these blocks."""
    gone = set(blocks)
    units = enumerate(budget.grid.units)
    return Genome(tuple(budget.grid.highest(i) if unit.block in gone else 0 for i, unit in units))


def remove_until_it_fits(budget: Budget, importance: Sequence[float]) -> Genome:
    """The dense model without its least important blocks, as few of them as the budget allows.

    Args:
        importance: of every block of the model.

    Raises:
        UsageError: if the model is too large even without all blocks that may vanish.
    """
    order = sorted(removable_blocks(budget), key=importance.__getitem__)
    for count in range(len(order) + 1):
        genome = without_blocks(budget, order[:count])
        if budget.fits(genome):
            return genome
    raise too_large(budget)


def too_large(budget: Budget, least: Genome | None = None) -> UsageError:
    """What is wrong with a budget that no removal reaches.

    Args:
        least: the smallest model that there is; if not given, that without all blocks that may vanish.
    """
    smallest = budget.cost(least or without_blocks(budget, removable_blocks(budget)))
    return UsageError(
        f"whole {'modules' if least else 'blocks'} cannot make the model this small: expected a budget of at least "
        f"{amount_of(smallest)} {budget.costs.measure}, found {amount_of(budget.limit)}; give a larger one, or a "
        "method that prunes within units"
    )


@torch.inference_mode()
def streams(
    model: PreTrainedModel, family: Family, token_ids: Int[Tensor, "sequences length"]
) -> Iterator[list[Tensor]]:
    """What flows into each block and out of the last, of one sequence at a time: `blocks + 1` of `[length, hidden]`."""
    blocks: Any = model.get_submodule(family.blocks)
    for ids in token_ids.split(1):
        found: list[Tensor] = []

        def note_input(_: nn.Module, arguments: tuple[Tensor, ...], found: list[Tensor] = found) -> None:
            found.append(arguments[0][0].float())

        def note_output(_: nn.Module, __: object, output: Any, found: list[Tensor] = found) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0].float())

        hooks = [block.register_forward_pre_hook(note_input) for block in blocks]
        hooks.append(blocks[-1].register_forward_hook(note_output))
        try:
            model.get_decoder()(ids.to(model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        yield found
