"""How large a model is."""

from __future__ import annotations

from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes that the parameters of a model take, in memory and in a checkpoint."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
