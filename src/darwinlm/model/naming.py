"""A checkpoint's tensors by the names and in the layout that the rest of the package knows.

Checkpoints may use older names, which transformers converts as it reads, and lack the prefix of the decoder. GPT-2 and
its like hold linear modules transposed; here all are `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from darwinlm.model.shards import Header

TRANSPOSED = "stored_transposed"  # the attribute of a linear module whose checkpoints hold its weight so


def plain_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, every module that holds a linear map's weight as `[in, out]` by an `nn.Linear`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            linear = nn.Linear(columns, rows, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), module.weight.requires_grad)
            linear.bias = module.bias
            setattr(linear, TRANSPOSED, True)
            model.set_submodule(path, linear)
    return model


def own_names(model: PreTrainedModel, headers: Mapping[str, Header]) -> dict[str, Header]:
    """A checkpoint's headers by the names that its tensors have in its model, with the shapes that they have there.

    Args:
        model: of the checkpoint's config, with or without weights; its linear modules are `plain_linears`.
    """
    renamings = [each for each in get_model_conversion_mapping(model) if type(each) is WeightRenaming]
    known = {*model.state_dict(), *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    turned = {f"{path}.weight" for path, module in model.named_modules() if hasattr(module, TRANSPOSED)}
    named: dict[str, Header] = {}
    for stored, header in headers.items():
        name = stored
        for renaming in renamings if stored not in known else ():
            name, _ = renaming.rename_source_key(name)
        if name not in known and f"{model.base_model_prefix}.{name}" in known:
            name = f"{model.base_model_prefix}.{name}"
        name = name if name in known and name not in headers else stored
        shape = header.shape[::-1] if name in turned else header.shape
        named[name] = header._replace(shape=shape, stored=stored, transposed=name in turned)
    return named
