"""A GGUF file as a directory of safetensors, from which blocks can be read one at a time."""

from __future__ import annotations

import io
import math
import shutil
import struct
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from darwinlm.model.families import find_family
from darwinlm.model.reading import check_sizes, skeleton
from darwinlm.runtime.progress import quiet_transformers, say
from darwinlm.runtime.understood import understood
from darwinlm.types import UsageError

HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, fields


MOST = 1 << 20  # tensors or fields of a file that is read


# llama.cpp's names for how words are split before bytes are merged: as in GPT-2, and so with every digit apart.
SPLIT_AS_GPT_2 = ("gpt-2", "olmo", "phi-2")


SPLIT_WITH_DIGITS = ("smollm", "starcoder", "refact", "command-r")


# Settings that say that a model has biases, by a tensor that it then has; the metadata does not say so.
BIASES = {"attn_q.bias": "attention_bias", "ffn_down.bias": "mlp_bias"}


# How Llama 3 and its like stretch rotary frequencies, but for the factor: a file has only what comes of it.
LLAMA_3 = [
    {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1 << power}
    for power in range(4, 21)
]


def convert_gguf(path: Path, out: Path) -> None:
    """Dequantise a GGUF file into the new directory `out`.

    Raises:
        UsageError: if the file holds no model of a supported family, or tensors that its model has no place for.
    """
    say(f"reading {path.name}")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with understood(f"{path} cannot be read as a GGUF model", "check the file"), quiet_transformers():
        _check_counts(path)
        _dequantise(path, temporary)
    temporary.rename(out)


def _check_counts(path: Path) -> None:
    """Raise `UsageError` if the file says that it holds more than it can: the reader would go on for ever."""
    with path.open("rb") as file:
        magic, _, tensors, fields = HEADER.unpack(file.read(HEADER.size))
    if magic != b"GGUF":
        raise UsageError(f"{path} is no GGUF file: expected it to begin with GGUF, found {magic!r}; check the file")
    if max(tensors, fields) > MOST:
        raise UsageError(
            f"{path} says that it holds {tensors:,} tensors and {fields:,} fields: expected at most {MOST:,}; fetch it "
            "again"
        )


def _dequantise(path: Path, out: Path) -> None:
    source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: math.prod(map(int, tensor.shape)) for tensor in reader.tensors}
    config = AutoConfig.from_pretrained(**source)
    check_sizes(config.to_dict(), path)
    find_family(skeleton(config))
    _complete(config, reader, path)
    with redirect_stderr(io.StringIO()):  # its bar cannot be switched off
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=torch.float32, output_loading_info=True
        )
    model, report = loaded
    lost = sorted({*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])})
    if lost:  # transformers has filled these with random numbers
        raise UsageError(f"{path} lacks {lost[0]} ({len(lost)} such tensors); fetch it again")
    own = sum(parameter.numel() for parameter in model.parameters())
    read = sum(count for name, count in stored.items() if name != "rope_freqs.weight")
    if own != read:
        raise UsageError(
            f"{path} holds tensors of {read:,} numbers where the model of its metadata has {own:,}: some would not be "
            "read; use the model in another form"
        )
    plain = skeleton(config, torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _split_words(tokenizer.backend_tokenizer, reader, path)
    tokenizer.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)


def _complete(config: PretrainedConfig, reader: gguf.GGUFReader, path: Path) -> None:
    """Add to a config what transformers (5.23) does not read: biases, and how rotary embeddings are stretched.

    Raises:
        UsageError: if the file stretches them in a way that cannot be told to transformers.
    """
    names = {tensor.name for tensor in reader.tensors}
    for tensor, setting in BIASES.items():
        if hasattr(config, setting) and f"blk.0.{tensor}" in names:
            setattr(config, setting, True)
    rope: dict[str, Any] = dict(config.rope_parameters)
    scaling = {
        name.rpartition(".")[2]: field.contents() for name, field in reader.fields.items() if ".scaling." in name
    }
    kind = scaling.get("type", "none")
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        config.rope_parameters = rope | _llama3(torch.tensor(factors), config, path)
    elif kind == "linear":
        config.rope_parameters = rope | {"rope_type": "linear", "factor": float(scaling["factor"])}
    elif kind != "none":
        raise UsageError(
            f"{path} stretches rotary embeddings as {kind}: expected none, linear or Llama 3's; use the model in "
            "another form"
        )


def _llama3(factors: torch.Tensor, config: PretrainedConfig, path: Path) -> dict[str, Any]:
    """The settings of rotary embeddings whose frequencies are divided by `factors`, as Llama 3's are."""
    theta, width = config.rope_parameters["rope_theta"], 2 * len(factors)
    for rest in LLAMA_3:
        settings = {"rope_type": "llama3", "factor": float(factors.max()), **rest}
        if torch.allclose(stretched_by(settings, theta, width), factors.double(), rtol=1e-4):
            return settings
    raise UsageError(
        f"{path} stretches rotary embeddings by rope_freqs.weight: expected the factors of Llama 3, found others; use "
        "the model in another form"
    )


def stretched_by(settings: dict[str, Any], theta: float, width: int) -> torch.Tensor:
    """What Llama 3 divides the `width / 2` frequencies of a head's rotary embedding by.

    Frequencies of short waves stay, those of long ones are divided by `factor`, with a smooth way in between.
    """
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high, positions = (settings[key] for key in LLAMA_3[0])
    turns = positions * frequencies / (2 * math.pi)  # that a position's angle makes over the original length
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / settings["factor"] + smooth)


def _split_words(tokenizer: Any, reader: gguf.GGUFReader, path: Path) -> None:
    """Split words as the GGUF file says where transformers (5.23) does not know its way and took GPT-2's."""
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    field = reader.fields.get("tokenizer.ggml.pre")
    name = "unnamed" if field is None else field.contents()
    if name in SPLIT_WITH_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    elif name not in SPLIT_AS_GPT_2:
        say(f"{path.name}: words are split as in GPT-2, for its own way ({name}) is not known; tokens may differ")
