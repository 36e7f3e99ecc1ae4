"""A low-rank adapter (LoRA) as PEFT writes it, merged into the model that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darwinlm.model.hub import ADAPTER, ADAPTER_CONFIG
from darwinlm.model.reading import read_config
from darwinlm.model.rewriting import write_model
from darwinlm.model.shards import INDEX, WEIGHTS, Header, open_shard, read_headers, read_tensor
from darwinlm.runtime.files import new_directory, read_json
from darwinlm.runtime.progress import say
from darwinlm.types import UsageError

PREFIX = "base_model.model."
# What the names of an adapter's tensors end in, before `.weight` if there is one.
PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
# Settings under which the change of a weight is another one than B·A, or the base is not the one that is named.
REFUSED = (
    "fan_in_fan_out", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora",
    "trainable_token_indices", "target_parameters", "arrow_config", "use_bdlora", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip
# What is added to a weight `[out, in]`: a factor `[rank, in]`, one `[out, rank]`, and the scale of their product.
Pair = tuple[Tensor, Tensor, float]
KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it is


def base_of(directory: Path) -> str | None:
    """The model that an adapter in a directory was trained on, as it names it; None if the directory holds none.

    Raises:
        UsageError: if it names none, or if the directory holds a model as well.
        DarwinError: if its settings are damaged.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    if (directory / WEIGHTS).exists() or (directory / INDEX).exists():
        raise UsageError(
            f"{directory} holds a model and an adapter: expected one of them; remove {ADAPTER_CONFIG} if its "
            "weights are merged, else the weights"
        )
    settings = read_json(directory / ADAPTER_CONFIG)
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not name:
        raise UsageError(
            f"{directory / ADAPTER_CONFIG} names no base: expected base_model_name_or_path; write it there"
        )
    revision = settings.get("revision")
    return f"{name}@{revision}" if revision and not Path(name).exists() else name


def merge_adapter(directory: Path, base: Path, out: Path) -> None:
    """Write the model that an adapter and its base are together into the new directory `out`.

    A weight `W` becomes `W + s·B·A`, in float32 and then in the precision of `W`, where `s` is alpha / rank, or with
    `use_rslora` alpha / √rank. Weights that the adapter stores whole take the place of the base's.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        base: a directory of plain float weights.

    Raises:
        UsageError: if it is no adapter of this kind, or changes what the base does not have.
        DarwinError: if a file is damaged.
    """
    settings = read_json(directory / ADAPTER_CONFIG, "peft_type")
    _check(directory, settings)
    if not (directory / ADAPTER).is_file():
        raise UsageError(f"{directory} is no adapter: expected {ADAPTER} in it, found none; save it as safetensors")
    with open_shard(directory / ADAPTER) as opened:
        changes = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    pairs, whole = _sort(directory, changes, settings)
    config = read_json(base / "config.json", "model_type")
    headers = read_headers(base)
    _check_base(directory, base, config, headers, pairs, whole)
    for name in headers.keys() & whole.keys():
        if headers[name].shape[0] == config.get("vocab_size"):
            config["vocab_size"] = whole[name].shape[0]  # the adapter's tokenizer may have more tokens
    say(f"merging the adapter {directory.name} into {base.name}: {len(pairs)} weights changed, {len(whole)} replaced")

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in headers:
            tensor = whole.get(name)
            tensor = read_tensor(base, headers[name].file, name) if tensor is None else tensor
            yield name, _merged(tensor, *pairs[name]) if name in pairs else tensor
        yield from ((name, tensor) for name, tensor in whole.items() if name not in headers)

    with new_directory(out) as partial:
        write_model(partial, config, merged(), (base, directory))


def _check(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` if the settings ask for anything that B·A alone is not."""
    found = next((f"{name} {settings[name]!r}" for name in REFUSED if settings.get(name)), None)
    if settings["peft_type"] != "LORA":
        found = f"peft_type {settings['peft_type']}"
    elif settings.get("init_lora_weights") not in KEPT_BASE:
        found = f"init_lora_weights {settings['init_lora_weights']!r}, which changes the base"
    if found:
        raise UsageError(
            f"{directory} cannot be merged: expected a plain LoRA, found {found}; merge it with PEFT "
            "(merge_and_unload), and name the model that it saves"
        )


def _check_base(
    directory: Path,
    base: Path,
    config: Mapping[str, Any],
    headers: Mapping[str, Header],
    pairs: Mapping[str, Pair],
    whole: Mapping[str, Tensor],
) -> None:
    """Raise `UsageError` if an adapter does not fit its base."""
    tied = getattr(read_config(base), "tie_word_embeddings", False)
    for name in [*pairs, *whole]:
        if name not in headers and not (tied and name in whole and _is_copy(name, whole)):
            raise UsageError(
                f"{directory} changes {name}, which {base} does not have: expected an adapter of this model; check "
                "base_model_name_or_path"
            )
    for name, (wide, tall, _) in pairs.items():
        shape = tall.shape[0], wide.shape[1]
        if headers[name].shape != shape:
            raise UsageError(
                f"{directory} changes {name} in the shape {shape}: expected {headers[name].shape}, as in {base}; check "
                "base_model_name_or_path"
            )
        if tied and shape[0] == config.get("vocab_size"):
            raise UsageError(
                f"{directory} changes {name}, which {base} has for its input and its output: expected one use of it; "
                "merge it with PEFT (merge_and_unload), and name the model that it saves"
            )


def _is_copy(name: str, whole: Mapping[str, Tensor]) -> bool:
    """Whether a stored weight is another one too, as an output embedding that is tied to the input's."""
    return any(torch.equal(tensor, whole[name]) for other, tensor in whole.items() if other != name)


def _sort(
    directory: Path, changes: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """What is added to weights, and what replaces weights, both by the name of the weight."""
    pairs: dict[str, Pair] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in changes.items():
        module, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if kind in PAIRS:
            other = name.replace(kind, PAIRS[kind])
            if other not in changes:
                raise UsageError(f"{directory / ADAPTER} lacks {other}: expected it beside {name}; fetch it again")
            rank = tensor.shape[0]
            scale = _alpha(settings, module) / (rank**0.5 if settings.get("use_rslora") else rank)
            wide, tall = (tensor, changes[other]) if kind == "lora_A" else (changes[other].T, tensor.T)
            pairs[f"{module}.weight"] = (wide, tall, scale)
        elif kind not in PAIRS.values():
            whole[name.removeprefix(PREFIX).replace(".modules_to_save", "").replace(".base_layer", "")] = tensor
    return pairs, whole


def _merged(weight: Tensor, wide: Tensor, tall: Tensor, scale: float) -> Tensor:
    return (weight.float() + scale * (tall.float() @ wide.float())).to(weight.dtype)


def _alpha(settings: Mapping[str, Any], module: str) -> float:
    """The alpha of a module: of the first pattern that the end of its path matches, else the general one."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(settings.get("lora_alpha") or 8)
