"""Operations that only some versions of transformers count as a product."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def rotary(model: Any, tokens: int) -> int:
    """What the angles of the rotary embedding take: earlier versions multiply matrices for them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.rotary_emb(torch.zeros(1, tokens, model.config.hidden_size), torch.arange(tokens)[None])
    return counter.get_total_flops()
