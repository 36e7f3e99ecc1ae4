"""The state of training by AdamW as tensors by name, in which form files hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

STATE = ("step", "exp_avg", "exp_avg_sq")


def state_of(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW | None) -> dict[str, Tensor]:
    """Return weights by name and, if an optimizer is given, its state for each of them, on the CPU."""
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    if optimizer is not None:
        tensors |= {f"{key}.{name}": optimizer.state[weight][key] for name, weight in weights.items() for key in STATE}
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def set_state(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Set weights and optimizer to the state that `state_of` returned."""
    fused = optimizer.defaults["fused"]
    for name, weight in weights.items():
        weight.data.copy_(tensors[f"weight.{name}"])
        optimizer.state[weight] = {
            # Only a fused optimizer counts its steps on the device.
            key: tensors[f"{key}.{name}"].to("cpu" if key == "step" and not fused else weight.device)
            for key in STATE
        }
