"""A model of which each process has a shard (FSDP2), read from its checkpoint block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from darwinlm.model.blocks import fill_ends
from darwinlm.model.checkpoint import Checkpoint


def load_sharded(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model to train in float32, of whose decoder blocks each process keeps its shard.

    A process has one whole block at a time, and in the end what is not in blocks whole: accelerate shards that later.

    Args:
        dtype: the precision of the products; gradients are summed in float32.

    Raises:
        DarwinError: as `Checkpoint.fill`.
    """
    model = checkpoint.skeleton()
    names = model._no_split_modules or ()
    blocks = [path for path, module in model.named_modules() if type(module).__name__ in names]
    policy = MixedPrecisionPolicy(dtype, torch.float32) if dtype != torch.float32 else MixedPrecisionPolicy()
    for path in blocks:
        block: Any = checkpoint.fill(model, path, torch.float32, device).requires_grad_(True)
        fully_shard(block, mp_policy=policy, reshard_after_forward=True)
    fill_ends(checkpoint, model, blocks, torch.float32, device)
    return model.requires_grad_(True).train()
