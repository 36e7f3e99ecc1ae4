"""Verification of exports: a fresh process without darwinlm loads one and compares its logits, or its tensors."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from darwinlm.runtime.scratch import scratch_directory
from darwinlm.types import DarwinError

VERIFIED_SHAPE = (2, 64)  # sequences, and tokens of each, that an export is verified on
TOLERANCE = 1e-4  # as a share of the largest logit: how far float32 arithmetic of two devices may differ


@dataclass(frozen=True)
class Expected:
    """The logits that an export must give: those of the model that it was made from, in float32."""

    token_ids: Int[Tensor, "sequences length"]
    logits: Float[Tensor, "sequences length vocab"]

    @classmethod
    def of(cls, model: PreTrainedModel, whole: PretrainedConfig | None = None) -> Expected:
        """Return the logits of `model` on random tokens, which are the same for every call.

        Args:
            whole: the config of the wrapper around it, whose tokens that stand for images or sounds are left out.
        """
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(model.config.vocab_size, VERIFIED_SHAPE, generator=generator)
        ends = "_token_id", "_token_index"
        fields = vars(whole).items() if whole else ()
        special = {each for name, each in fields if name.endswith(ends) and isinstance(each, int)}
        plain = next(token for token in range(len(special) + 1) if token not in special)
        for token in special:
            token_ids[token_ids == token] = plain
        return cls(token_ids, float32_logits(model, token_ids))


def float32_logits(model: Any, token_ids: Any) -> Any:
    """Return logits on the CPU, computed in float32, in which weights of 16 bits are exact.

    Arithmetic in 16 bits would hide faults: it moved logits of a randomly pruned SmolLM2 by 28 % of the largest. The
    weights of a module are converted only while it runs, so that the model is never in memory twice. This source also
    runs in the fresh process and therefore uses only torch.
    """
    stored: dict[nn.Module, list[Tensor]] = {}

    def widen(module: nn.Module, *_: Any) -> None:
        stored[module] = [parameter.data for parameter in module.parameters(recurse=False)]
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in zip(module.parameters(recurse=False), stored.pop(module), strict=True):
            parameter.data = data

    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(widen) for module in owners]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in owners]
    try:
        with torch.no_grad():
            return model(token_ids.to(model.device)).logits.cpu()
    finally:
        for hook in hooks:
            hook.remove()


# A program without darwinlm, whose arguments are the export, the file with the inputs and the file for the outputs.
_FRESH_PROCESS = f"""
from __future__ import annotations
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "darwinlm":
            raise ImportError("an export must load without darwinlm")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

{inspect.getsource(float32_logits)}

directory, inputs, outputs = sys.argv[1:]
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
model = auto.from_pretrained(directory, trust_remote_code=True).eval()
logits = float32_logits(model, load_file(inputs)["token_ids"])
save_file({{"logits": logits.contiguous()}}, outputs)
"""


def verify_export(directory: Path, expected: Expected) -> float:
    """Load an export in a fresh process without darwinlm, and return the largest difference of its logits.

    Logits are computed in float32, whatever precision the export is stored in, and may differ by `TOLERANCE`.

    Raises:
        DarwinError: if the export does not load, or if its logits differ from `expected` by more.
    """
    logits = expected.logits
    allowed = TOLERANCE * logits.abs().max().item()
    with scratch_directory("verify") as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"token_ids": expected.token_ids.contiguous()}, inputs)
        _run_apart(_FRESH_PROCESS, scratch, directory.absolute(), inputs, outputs)
        actual = load_file(outputs)["logits"]
    if actual.shape != logits.shape:
        raise DarwinError(
            f"expected logits of shape {tuple(logits.shape)} from the export, found {tuple(actual.shape)}; "
            "export the model again"
        )
    difference = (actual - logits).abs().max().item()
    if not difference <= allowed:  # NaN must fail too
        raise DarwinError(
            f"expected the export to give the model's logits within {allowed:.2g}, found a difference of "
            f"{difference:.2g}; do not use it, and report this as a fault of darwinlm"
        )
    return difference


_READ_GGUF = """
import hashlib, json, sys
import gguf

file, digests = sys.argv[1:]
with open(digests) as lines:
    expected = json.load(lines)
actual = {tensor.name: hashlib.sha256(tensor.data.tobytes()).hexdigest() for tensor in gguf.GGUFReader(file).tensors}
wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
if wrong:
    sys.exit(f"{len(wrong)} tensors that are not what was written, {wrong[0]} first")
"""


def verify_gguf(file: Path, digests: Mapping[str, str]) -> None:
    """Read a GGUF file in a fresh process without darwinlm, and compare the SHA-256 of every tensor with `digests`.

    Raises:
        DarwinError: if the file cannot be read, or if a tensor is missing, is not in `digests`, or differs.
    """
    with scratch_directory("verify") as scratch:
        expected = Path(scratch, "digests.json")
        expected.write_text(json.dumps(digests))
        _run_apart(_READ_GGUF, scratch, file.absolute(), expected)


def _run_apart(script: str, scratch: Path, *arguments: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-I", "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise DarwinError(
            f"expected the export to load in a fresh process, found: {reason}; do not use it, and report this as a "
            "fault of darwinlm"
        )
