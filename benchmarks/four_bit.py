"""4-bit weights in compressed-tensors form, by llm-compressor: what an export loses by them, beside the dense model.

    python benchmarks/four_bit.py DENSE EXPORT [EXPORT ...] [--data vital-wiki] [--out DIRECTORY]

The first call makes an environment of its own (1.5 GB, in the user's cache), in which darwinlm cannot be imported.
There GPTQ quantises every linear module but the output embedding, in the largest groups that divide all widths;
transformers loads what was written, and its logits on held-out text are compared with those of the dense model in
float32. Where the environment of serving.py exists, vLLM loads it too. The table goes to RESULTS-four-bit.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from environments import make_environment, version
from vllm_server import RefusedError, Server, vllm_python

from darwinlm.data.corpus import read_corpus
from darwinlm.export.groups import largest_group
from darwinlm.model.reading import load, read_tokenizer

RESULTS = Path(__file__).with_name("RESULTS-four-bit.md")
PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1")
APART = Path(__file__).with_name("four_bit_apart.py")
LENGTH = 256  # tokens in a sequence
NEW_TOKENS = 24
COLUMNS = ("parameters", "KL", "group", "bits a weight", "KL at 4 bits", "vLLM")

TEXT = """\
# Four bits in compressed-tensors form

`python benchmarks/four_bit.py {models}`, {day}. {versions}. KL to the dense model in nats a token, in float32, on
{evaluation:,} held-out tokens; GPTQ on {calibration:,} tokens, symmetric, the output embedding left out. Bits a weight
are those of the file. vLLM computes in bfloat16, transformers in float32.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="the dense model, then exports of it")
    parser.add_argument("--data", default="vital-wiki")
    parser.add_argument("--calibration", type=int, default=16_384, help="tokens that GPTQ reads")
    parser.add_argument("--evaluation", type=int, default=8_192, help="held-out tokens")
    parser.add_argument("--out", type=Path, help="where the quantised models stay")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    python = make_environment("llmcompressor-0.14.0.1", PACKAGES)
    with tempfile.TemporaryDirectory(prefix="darwinlm-four-bit-") as scratch:
        root = arguments.out or Path(scratch)
        root.mkdir(exist_ok=True)
        dense = arguments.models[0]
        corpus = read_corpus(arguments.data, read_tokenizer(dense), LENGTH, 0)
        texts = corpus.draw(calibration=arguments.calibration)
        texts["evaluation"] = corpus.draw_held_out(arguments.evaluation)
        torch.save(texts, root / "texts.pt")
        rows = {model.name: row(python, dense, model, root) for model in arguments.models}
    used = {"calibration": arguments.calibration, "evaluation": arguments.evaluation}
    write(python, rows, used)


def row(python: Path, dense: Path, model: Path, root: Path) -> dict[str, str]:
    """The cells of a model."""
    loaded: Any = load(model)
    linears = [module for module in loaded.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    group = largest_group(module.in_features for module in linears)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    out = root / f"{model.name}-4bit"
    command = [python, "-P", APART, dense, model, out, root / "texts.pt", str(group)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-3000:])
    found = json.loads((out / "found.json").read_text())
    cells = (
        f"{parameters:,}", f"{found['kl']:.4f}", str(group), f"{8 * found['bytes'] / parameters:.2f}",
        f"{found['kl at 4 bits']:.4f}", serve(out, found),
    )  # fmt: skip
    print(dict(zip(COLUMNS, cells, strict=True)), flush=True)
    return dict(zip(COLUMNS, cells, strict=True))


def serve(directory: Path, found: dict[str, Any]) -> str:
    """How many greedy tokens vLLM gives that transformers gives of the same quantised weights."""
    python = vllm_python(build=False)
    if python is None:
        return "not tried"
    try:
        with Server(python, directory, "--enforce-eager", dtype="bfloat16") as server:
            tokens = server.tokens(found["prompt"], NEW_TOKENS)
    except RefusedError as refused:
        return f"**FAILS**: {str(refused)[:160]}"
    agreed = sum(ours == theirs for ours, theirs in zip(tokens, found["tokens"], strict=True))
    return f"{agreed} of {NEW_TOKENS} greedy tokens"


def write(python: Path, rows: dict[str, dict[str, str]], used: dict[str, int]) -> None:
    """The table."""
    versions = ", ".join(f"{name} {version(python, name)}" for name in ("llmcompressor", "transformers", "torch"))
    lines = [TEXT.format(models=" ".join(rows), day=date.today(), versions=versions, **used)]
    lines += [f"| model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows.items()]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
