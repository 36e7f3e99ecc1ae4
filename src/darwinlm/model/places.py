"""Whether the tensors that a model directory stores are those that its config's model has places for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from darwinlm.model.flow import is_selection
from darwinlm.model.shards import FLOATS, Header
from darwinlm.runtime.progress import say
from darwinlm.types import DarwinError, UsageError

# What earlier versions of transformers stored, and every version computes: frequencies of rotary embeddings, masks.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(attn|attention)\.(masked_bias|bias)$")
HEADS = (r"^(model\.)?mtp\.",)  # for multi-token prediction, of which generation token by token makes no use


def check_places(directory: Path, model: PreTrainedModel, headers: Mapping[str, Header]) -> None:
    """Check, from the headers alone, that the tensors in a directory are the parameters of a model.

    Tensors that the model does not read, and that change nothing, are named in the log.

    Args:
        model: of the directory's config, with or without weights.

    Raises:
        UsageError: if the directory holds a tensor that the model has no place for, or weights that are no floats.
        DarwinError: if a tensor is missing, or has another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    once = {name for name, _ in model.named_parameters()}
    selections = {f"{path}.index" for path, module in model.named_modules() if is_selection(module)}
    missing = sorted(selections - headers.keys())
    missing += [name for name in once if name not in headers and not _is_stored_tied(name, model, headers)]
    if missing:
        raise DarwinError(
            f"{directory} lacks the tensor {min(missing)} ({len(missing)} such); the checkpoint is incomplete, or of a "
            "family whose tensors transformers renames, which darwinlm does not read: fetch it again, or take another"
        )
    check_floats(directory, {name: header for name, header in headers.items() if name in parameters})
    for name, header in headers.items():
        if name in parameters and header.shape != tuple(parameters[name].shape):
            raise DarwinError(
                f"{name} has shape {header.shape} where the config says {tuple(parameters[name].shape)}; config.json "
                f"and weights in {directory} belong to different models"
            )
    buffers = {name for name, _ in model.named_buffers()}
    check_strangers(directory, model, [name for name in headers if name not in parameters and name not in buffers])


def check_floats(directory: Path, headers: Mapping[str, Header]) -> None:
    """Raise `UsageError` if a weight is stored as anything but a float of 16 bits or more."""
    for name, header in headers.items():
        if header.precision not in FLOATS:
            raise UsageError(
                f"{directory} holds {name} as {header.precision}: expected weights as {', '.join(FLOATS)}; name the "
                "model that this one was quantised from"
            )


def check_strangers(directory: Path, model: PreTrainedModel, names: Iterable[str]) -> None:
    """Check tensors that a model has no parameter for.

    Raises:
        UsageError: if the model's class does not declare one to be ignorable, and it is no leftover that is known.
    """
    blocks = model.config.num_hidden_layers
    further = getattr(model.config, "num_nextn_predict_layers", None) or 0
    ignorable = [*COMPUTED, *HEADS]
    for module in model.modules():
        ignorable += getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    # Further blocks that predict the tokens after the next one.
    ignorable += [rf"\.layers\.{blocks + number}\." for number in range(further)]
    ignored = []
    for name in names:
        if not any(re.search(pattern, name) for pattern in ignorable):
            raise UsageError(
                f"{directory} holds {name}, for which the model of its config.json has no place: expected the model's "
                "own tensors alone; mend config.json, or fetch the model again"
            )
        ignored.append(name)
    if ignored:
        more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
        say(f"{directory.name}: {ignored[0]}{more} are not read: the model computes without them")


def _is_stored_tied(name: str, model: PreTrainedModel, headers: Mapping[str, Header]) -> bool:
    """Whether a parameter is stored under the name of another one that it is tied to."""
    parameter = model.get_parameter(name)
    names = (other for other, each in model.named_parameters(remove_duplicate=False) if each is parameter)
    return any(other in headers for other in names)
