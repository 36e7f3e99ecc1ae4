"""The Hugging Face directory: a pruned model that loads where transformers does, without darwinlm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.modeling import auto_map, family_of, module_name, pruned_model, render
from darwinlm.progress import quiet_transformers, say
from darwinlm.types import BlockSizes, DarwinError, UsageError


@dataclass(frozen=True)
class Expected:
    """What an export must give: the logits of the model that it was made from."""

    token_ids: Int[Tensor, "sequences length"]
    logits: Float[Tensor, "sequences length vocab"]


def export_hf(
    model: PreTrainedModel,
    sizes: Sequence[BlockSizes],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    card: str,
    expected: Expected | None = None,
) -> Path:
    """Write a stitched model as a directory that `AutoModelForCausalLM` loads, and return `out`.

    It holds the weights in the model's own precision, the config, the tokenizer, the generation config, `card` as
    README.md, and the code of the model unless a stock class will do. The directory appears whole or not at all: where
    `expected` is given, once a fresh process has loaded it and found those logits.

    Raises:
        UsageError: if the family cannot be exported, or `out` exists and is not an empty directory.
        DarwinError: if the weights of `model` do not have the sizes `sizes`, or as `verify_export`.
    """
    exported = pruned_model(model, sizes)
    with new_directory(out) as directory:
        with quiet_transformers():
            exported.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")
        family = family_of(exported.config)
        own_code = exported.config.model_type != family
        if own_code:
            (directory / f"{module_name(family)}.py").write_text(render(family), encoding="utf-8")
        _complete_config(directory / "config.json", auto_map(family) if own_code else {})
        if expected is not None:
            difference = verify_export(directory, expected.token_ids, expected.logits)
            say(f"export: loads without darwinlm, largest difference of a logit {difference:.1e}")
    return out


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write in, which takes its name in the end and is removed on any failure.

    Raises:
        UsageError: if `out` is there already and not an empty directory, or its place cannot be written to.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found = "a directory with files in it" if out.is_dir() else "a file"
        raise UsageError(f"expected {out} to be new or empty, found {found}; choose another name or remove it")
    partial = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}; choose another place") from None
    try:
        yield partial
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _complete_config(path: Path, full_auto_map: dict[str, str]) -> None:
    """Add to config.json what `save_pretrained` leaves out: the whole `auto_map`, and RoPE by its names of old.

    Without these, transformers 4 and what was built on it load a stock model and are silently wrong.
    """
    config = json.loads(path.read_text())
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if full_auto_map:
        config["auto_map"] = full_auto_map
    elif rope.get("rope_type", "default") != "default":
        # Not for an unknown model type: where no code is trusted, AutoTokenizer in transformers 5.23 trips over it.
        config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# Runs where darwinlm cannot be imported: arguments are the export, the file with the inputs, the file for the outputs.
_FRESH_PROCESS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "darwinlm":
            raise ImportError("an export must load without darwinlm")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

directory, inputs, outputs, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(load_file(inputs)["token_ids"]).logits
save_file({"logits": logits.contiguous()}, outputs)
"""


def verify_export(
    directory: Path,
    token_ids: Int[Tensor, "sequences length"],
    logits: Float[Tensor, "sequences length vocab"],
    tolerance: float = 1e-4,
) -> float:
    """Load an export in a fresh process without darwinlm and return how far its logits are from `logits` at most.

    The export is run in the precision of `logits`. What it may differ by is a fraction of the largest logit:
    `tolerance`, or four roundings where the precision is too coarse for that (3 % in bfloat16, 0.4 % in float16), which
    finds a wrong model and no wrong detail. So give float32 logits where memory allows, also of a bfloat16 model: its
    weights are exact in float32.

    Raises:
        DarwinError: if the export does not load or its logits differ by more.
    """
    allowed = max(tolerance, 4 * torch.finfo(logits.dtype).eps) * logits.abs().max().item()
    with tempfile.TemporaryDirectory(prefix="darwinlm-verify-") as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"token_ids": token_ids.cpu().contiguous()}, inputs)
        _run_apart(Path(scratch), directory, inputs, outputs, str(logits.dtype).removeprefix("torch."))
        found = load_file(outputs)["logits"]
    if found.shape != logits.shape:
        raise DarwinError(
            f"expected logits of shape {tuple(logits.shape)} from the export, found {tuple(found.shape)}; "
            "export the model again"
        )
    difference = (found.float() - logits.cpu().float()).abs().max().item()
    if not difference <= allowed:  # not a number is wrong too
        raise DarwinError(
            f"expected the export to give the model's logits within {allowed:.2g}, found a difference of "
            f"{difference:.2g}; do not use it, and report this as a fault of darwinlm"
        )
    return difference


def _run_apart(scratch: Path, directory: Path, *arguments: Path | str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-I", "-c", _FRESH_PROCESS, str(directory.absolute()), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise DarwinError(
            f"expected the export to load in a fresh process, found: {reason}; do not use it, and report this as a "
            "fault of darwinlm"
        )
