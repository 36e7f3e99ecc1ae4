"""A GGUF file as a directory of safetensors, from which blocks can be read one at a time."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

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


# Special tokens, and what a file calls their numbers.
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


# Architectures that are read: of others transformers would take settings from the defaults of another model.
READ = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2")


# Where windows alternate: every how many blocks attention is full unless the file says it, and of how many blocks the
# model is that llama.cpp scales by its heads.
PERIODS = {"gemma2": (2, 46), "gemma3_text": (6, 62)}


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
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in READ:
        raise UsageError(
            f"{path} is of the architecture {architecture}: expected {', '.join(READ)}; use the model in another form"
        )
    config = AutoConfig.from_pretrained(**source)
    check_sizes(config.to_dict(), path)
    _complete(config, reader, path)
    find_family(skeleton(config))
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
    _as_stated(AutoTokenizer.from_pretrained(**source), reader, path).save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)


def _complete(config: PretrainedConfig, reader: gguf.GGUFReader, path: Path) -> None:
    """Set in a config what transformers (5.23) does not read, and would take from another model: see `READ`.

    Raises:
        UsageError: if the file says what cannot be told to transformers.
    """
    architecture = reader.fields["general.architecture"].contents()
    said = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.")
    }
    for name in ("bos", "eos", "pad"):
        field = reader.fields.get(f"tokenizer.ggml.{SPECIAL[name]}")
        setattr(config, f"{name}_token_id", None if field is None else int(field.contents()))
    names = {tensor.name for tensor in reader.tensors}
    for tensor, setting in BIASES.items():
        if hasattr(config, setting):
            setattr(config, setting, f"blk.0.{tensor}" in names)
    width = said.get("attention.key_length") or config.hidden_size // config.num_attention_heads
    if hasattr(config, "head_dim") or width != config.hidden_size // config.num_attention_heads:
        config.head_dim = width
    for name, expected in (("attention.value_length", width), ("rope.dimension_count", width)):
        if said.get(name, expected) != expected:
            raise UsageError(
                f"{path} has {name} {said[name]}: expected {expected}, the width of a head; use the model in "
                "another form"
            )
    _complete_windows(config, said)
    _complete_rope(config, said, reader, path)


def _complete_windows(config: PretrainedConfig, said: Mapping[str, Any]) -> None:
    """Set sliding windows and, for Gemma, how attention and logits are scaled and capped."""
    window = said.get("attention.sliding_window") or None
    if hasattr(config, "sliding_window"):
        config.sliding_window = window
    if config.model_type not in PERIODS:
        return
    count, (period, deep) = config.num_hidden_layers, PERIODS[config.model_type]
    period = said.get("attention.sliding_window_pattern", period)
    windowed = period if isinstance(period, list) else [(i + 1) % period != 0 for i in range(count)]
    full = [not window or not each for each in windowed]
    config.layer_types = ["full_attention" if each else "sliding_attention" for each in full]
    config.query_pre_attn_scalar = (
        config.hidden_size // config.num_attention_heads if count == deep else config.head_dim
    )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        setattr(config, name, said.get(name))


def _complete_rope(config: PretrainedConfig, said: Mapping[str, Any], reader: gguf.GGUFReader, path: Path) -> None:
    """Set the rotary embedding: its base, and how it is stretched.

    Raises:
        UsageError: if the file stretches it in a way that cannot be told to transformers.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base", 10000.0))}
    if "partial_rotary_factor" in config.rope_parameters:
        rope["partial_rotary_factor"] = 1.0  # of whole heads, as was checked
    kind = said.get("rope.scaling.type", "none")
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        rope |= _llama3(torch.tensor(factors), rope["rope_theta"], path)
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": float(said["rope.scaling.factor"])}
    elif kind != "none":
        raise UsageError(
            f"{path} stretches rotary embeddings as {kind}: expected none, linear or Llama 3's; use the model in "
            "another form"
        )
    nested = "rope_type" not in config.rope_parameters  # one for each type of block
    local = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base_swa", 10000.0))}
    config.rope_parameters = {"full_attention": rope, "sliding_attention": local} if nested else rope


def _llama3(factors: torch.Tensor, theta: float, path: Path) -> dict[str, Any]:
    """The settings of rotary embeddings whose frequencies are divided by `factors`, as Llama 3's are."""
    width = 2 * len(factors)
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


def _as_stated(read: Any, reader: gguf.GGUFReader, path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that splits texts as llama.cpp does, of a class that changes nothing when it is read again.

    Classes of a family bring tokens of their own, which the model has no embedding for, and ways to split.
    """
    stated = {name.removeprefix("tokenizer.ggml."): field for name, field in reader.fields.items()}
    size = len(stated["tokens"].data)
    backend = read.backend_tokenizer
    _split_words(backend, reader, path)
    if stated["model"].contents() == "llama":
        _mark_spaces(backend, "add_space_prefix" not in stated or stated["add_space_prefix"].contents())
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < size]
    special = {
        f"{name}_token": stated["tokens"].contents(int(stated[key].contents()))
        for name, key in SPECIAL.items()
        if key in stated
    }
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=read.chat_template, **special)


def _mark_spaces(tokenizer: Any, prefix: bool) -> None:
    """Mark spaces as SentencePiece does, with one before every text if `prefix`, even before a space."""
    marks = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))


def _split_words(tokenizer: Any, reader: gguf.GGUFReader, path: Path) -> None:
    """Split words as the GGUF file says where transformers (5.23) does not know its way and took GPT-2's.

    Raises:
        UsageError: if it is not known here either.
    """
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    field = reader.fields.get("tokenizer.ggml.pre")
    name = "unnamed" if field is None else field.contents()
    if name in SPLIT_WITH_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    elif name not in SPLIT_AS_GPT_2:
        raise UsageError(
            f"{path} splits words in the way {name}: expected {', '.join(SPLIT_AS_GPT_2 + SPLIT_WITH_DIGITS)}, or one "
            "that transformers knows; use the model in another form"
        )
