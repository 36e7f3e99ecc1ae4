"""Activations that are computed twice instead of being kept, of models in evaluation mode."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute(model: PreTrainedModel) -> None:
    """Let every block of a model in evaluation mode compute its activations a second time instead of keeping them."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, again
        block.training = True  # which blocks ask for; the modules in them still drop nothing out
