"""How much each input channel of a model's matrices matters: what weighs the errors of a quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.runtime.progress import track


@torch.no_grad()
def mean_squares(
    model: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]
) -> Mapping[str, Float[Tensor, " d_in"]]:
    """Return the mean square of every input channel of each linear module, by its path, over all tokens.

    It is the diagonal of the Hessian of the module's squared output error, as llama.cpp's importance matrix has it.
    """
    sums: dict[str, Tensor] = {}

    def add(path: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].detach().float().square().flatten(0, -2).sum(0)
        sums[path] = sums[path] + squares if path in sums else squares

    hooks = [
        module.register_forward_pre_hook(partial(add, path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        for ids in track(token_ids, "importance", len(token_ids)):
            model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: (total / token_ids.numel()).cpu() for path, total in sums.items()}
