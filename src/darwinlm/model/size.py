"""Functions that count the parameters and the bytes of a model."""

from __future__ import annotations

from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of a model; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Return how many bytes the parameters of a model take, in memory and in a checkpoint."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
