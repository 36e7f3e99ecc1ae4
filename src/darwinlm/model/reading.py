"""Configs, tokenizers and models, from files that nobody has checked: the one place that reads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from darwinlm.model.layers import PRUNED, family_of, is_pruned
from darwinlm.model.naming import own_names, plain_linears
from darwinlm.model.places import check_floats, check_places, check_strangers
from darwinlm.model.pruned import describe_layers, register
from darwinlm.model.shards import FLOATS, Header, read_headers, read_tensor
from darwinlm.model.wrapped import WRAPPED, empty_wrapper, is_wrapper, split_headers, text_config
from darwinlm.model.wrapper_code import register_wrapper
from darwinlm.runtime.files import read_json
from darwinlm.runtime.progress import quiet_transformers, say
from darwinlm.runtime.understood import understood
from darwinlm.types import DarwinError, UsageError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


# The most that a config may say: some times what the largest models have. More would fill the memory, or take for ever.
LARGEST = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 30,
    "num_labels": 1 << 16,
}


def read_config(path: Path) -> PretrainedConfig:
    """The config of the language model in a model directory, or in a file; of most models it is the whole config.

    Raises:
        UsageError: as `read_whole` and `text_config`.
        DarwinError: as `read_whole`.
    """
    return text_config(read_whole(path))


def read_whole(path: Path) -> PretrainedConfig:
    """The config of a model directory, or in a file. Code in the directory is never run.

    Raises:
        UsageError: if it is missing, no config of a model that transformers knows, or a size in it is absurd.
        DarwinError: if it is no JSON.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no config at {path}: expected a directory with config.json, or such a file; check it")
    fields = read_json(file, "model_type")
    check_sizes(fields, file)
    if fields.get("architectures") == ["AnyModel"]:
        raise UsageError(
            f"{file} is of the form for vLLM's AnyModel: expected one that transformers loads; name the export that it "
            "was made from"
        )
    family = str(fields["model_type"]).removeprefix(PRUNED)
    wraps = isinstance(fields.get(WRAPPED), dict) and family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    # Of another, transformers would say that code is to be trusted.
    if not wraps and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"unsupported model family {family!r}: transformers has no causal language model of this type; "
            "convert the model to another family, or install a newer transformers"
        )
    if fields["model_type"] != family and not wraps:
        register(family)  # the classes of pruned models are this package's own
    with understood(f"{file} is no usable config", "fetch the model again"), quiet_transformers():
        if fields["model_type"] != family and wraps:
            register_wrapper(family, str(fields[WRAPPED]["model_type"]).removeprefix(PRUNED))
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) == {}:  # which transformers takes for a quantisation
            del config.quantization_config
        # Exports of darwinlm 0.x before 2026-11-27 do not describe their layers.
        if config.model_type != family and not wraps:
            for name, value in describe_layers(config).items():
                setattr(config, name, value)
        return config


def check_sizes(fields: Any, file: Path) -> None:
    """Raise `UsageError` if a config, or a part of it, has a size above `LARGEST` or below 1."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        most = LARGEST.get(name)
        for size in value if isinstance(value, list) else [value]:
            if most is not None and isinstance(size, int | float) and not 1 <= size <= most:
                raise UsageError(f"{file}: expected {name} from 1 to {most:,}, found {size:,}; fetch the model again")
            check_sizes(size, file)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, without code of its own. Raises `UsageError` if none can be used."""
    cure = "put the files of the model's tokenizer there"
    with understood(f"no tokenizer in {directory}", cure), quiet_transformers():
        if not any((directory / name).exists() for name in TOKENIZERS):  # transformers would make an empty one
            raise FileNotFoundError(f"expected {' or '.join(TOKENIZERS)}, found none")
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer("", add_special_tokens=True)  # which finds what is wrong with its settings
        tokenizer.init_kwargs.pop("auto_map", None)  # it names code, which an export would not have
        return tokenizer


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The whole model of a config without its weights: parameters on the meta device, tied ones once, buffers real.

    Raises:
        UsageError: if no model can be built from the config.
    """
    if is_pruned(config):
        register(family_of(config))
    with understood("no model can be built from its config.json", "fetch the model again"):
        with init_empty_weights(include_buffers=False), no_init_weights():
            typed = {"dtype": dtype} if dtype else {}
            own = copy.deepcopy(config) if dtype else config  # in which transformers notes the precision
            model = AutoModelForCausalLM.from_config(own, trust_remote_code=False, **typed)
        model.tie_weights()
        return plain_linears(model).eval()


def load(directory: Path | str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a causal language model, pruned or dense, from a directory, in evaluation mode; of a wrapper, that in it.

    Python code in the directory is never run.

    Raises:
        UsageError: as `read_config`, `check_floats` and `check_strangers`.
        DarwinError: if weights are missing or unreadable, or do not have the shapes that the config gives, or if the
            index of the shards names files elsewhere.
    """
    directory = Path(directory)
    if is_wrapper(read_whole(directory)):
        return _load_text(directory, dtype)
    config = read_config(directory)
    empty = skeleton(config)
    headers = own_names(empty, read_headers(directory))
    parameters = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
    check_floats(directory, {name: header for name, header in headers.items() if name in parameters})
    with understood(f"the weights in {directory} cannot be read", "fetch the model again"), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if wrong:  # transformers has filled these with random numbers
        raise DarwinError(
            f"{directory} lacks {wrong[0]} in the shape that config.json says ({len(wrong)} such tensors); "
            "the checkpoint is incomplete, fetch it again"
        )
    check_strangers(directory, model, sorted(report["unexpected_keys"]))
    return plain_linears(model)


def name_headers(directory: Path, model: PreTrainedModel) -> tuple[dict[str, Header], dict[str, Header]]:
    """What the files of a model directory say of every tensor, by its name in the model, and in the wrapper around it.

    Args:
        model: the language model in the directory, with or without weights.

    Returns:
        The tensors of the language model, and those beside it, which only a wrapper has.
    """
    whole, headers = read_whole(directory), read_headers(directory)
    if not is_wrapper(whole):
        return own_names(model, headers), {}
    return split_headers(empty_wrapper(whole), model, headers)


def read_parameter(directory: Path, header: Header) -> torch.Tensor:
    """One tensor in the layout that it has in its model. Raises `DarwinError` as `open_shard`."""
    tensor = read_tensor(directory, header.file, header.stored)
    return tensor.T.contiguous() if header.transposed else tensor


def _load_text(directory: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """As `load`, the language model in a wrapper."""
    config = read_config(directory)
    model = skeleton(config)
    headers, beside = name_headers(directory, model)
    say(f"{directory.name}: the language model in it; {len(beside)} tensors of other parts of it are not loaded")
    check_places(directory, model, headers)
    if not isinstance(dtype, torch.dtype):
        named = config.dtype or next(FLOATS[each.precision] for each in headers.values())
        dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named).removeprefix("torch."))
    places = {*model.state_dict()}
    state = {name: read_parameter(directory, header) for name, header in headers.items() if name in places}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.to(dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if (directory / "generation_config.json").exists():
        with understood(f"{directory / 'generation_config.json'} cannot be read", "fetch the model again"):
            model.generation_config = GenerationConfig.from_pretrained(directory)
    return model
