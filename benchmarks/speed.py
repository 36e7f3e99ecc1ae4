"""Is a model of half the parameters as much faster as counting says? In transformers and in llama.cpp.

    python benchmarks/speed.py [--repeats 7]

SmolLM2-135M against a copy with half of the prunable parameters removed, evenly over its blocks; which are removed does
not matter to speed. Decoding should speed up as the bytes that are read for a token shrink, prefill as its operations
do: `share` is the speed-up found in that predicted. The models take turns and medians count. `empty` is the model
with 1 KV group and 32 channels in every block: nearly all that is left of it is the head, and overhead. llama.cpp
decodes on one thread and on all. Results go to RESULTS-speed.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from smollm2 import Kept, dense_smollm2, export

from darwinlm.config.evaluation import SpeedConfig
from darwinlm.evaluation.speed import count, measure
from darwinlm.export.gguf import export_gguf
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count

RESULTS = Path(__file__).with_name("RESULTS-speed.md")
TARGET = 0.85

# Runs apart: reads jobs as JSON, prints the timings of each turn.
LLAMA_CPP = """
import json, sys
import xllamacpp as llama

job = json.load(sys.stdin)

def serve(file):
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, 2048, 1
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads, params.cpuparams_batch.n_threads = job["decode_threads"], job["threads"]
    return llama.Server(params)

servers = {name: serve(file) for name, file in job["files"].items()}
found = {name: [] for name in servers}
for turn in range(job["repeats"] + 1):
    for name, server in servers.items():
        wanted = {"prompt": job["prompt"], "n_predict": job["new_tokens"], "temperature": 0.0, "ignore_eos": True,
                  "cache_prompt": False}
        timings = server.handle_completions(wanted)["timings"]
        if turn:
            found[name].append([timings["prompt_ms"], timings["predicted_ms"]])
json.dump(found, open(sys.argv[1], "w"))
"""


def half(blocks: int) -> list[Kept]:
    """Half of every MLP, and of the attention: one KV group of three or two, in turns."""
    draw = random.Random(0)
    return [
        Kept(tuple(sorted(draw.sample(range(3), 1 + i % 2))), tuple(sorted(draw.sample(range(1536), 768))))
        for i in range(blocks)
    ]


def llama_cpp_seconds(
    files: Mapping[str, Path], config: SpeedConfig, root: Path, decode_threads: int
) -> dict[str, tuple[float, float]]:
    """Seconds of prefill, on all threads, and of decoding of each file, medians."""
    job = {
        "files": {name: str(file) for name, file in files.items()},
        "threads": torch.get_num_threads(),
        "decode_threads": decode_threads,
        "repeats": config.repeats,
        "new_tokens": config.new_tokens,
        "prompt": torch.randint(3, 49152, (config.prompt_tokens,)).tolist(),
    }
    out = root / "timings.json"
    command = [sys.executable, "-c", LLAMA_CPP, str(out)]
    # Three servers in a process are more threads than cores. libgomp then puts them to sleep at each of the thousand
    # barriers of a token, unless it is told to spin: 12 ms a token more, of any model.
    environment = os.environ | {"OMP_WAIT_POLICY": "active"}
    subprocess.run(command, input=json.dumps(job), text=True, check=True, stderr=subprocess.DEVNULL, env=environment)
    found = json.loads(out.read_text())
    return {
        name: (median(t[0] for t in turns) / 1000, median(t[1] for t in turns) / 1000) for name, turns in found.items()
    }


def row(where: str, stage: str, dense: float, pruned: float, predicted: float) -> str:
    """A line of the table; `dense` and `pruned` are tokens a second."""
    share = pruned / dense / predicted
    verdict = "" if share >= TARGET else f" (below {TARGET:.0%})"
    return (
        f"| {where} | {stage} | {dense:.1f} | {pruned:.1f} | {pruned / dense:.2f} | {predicted:.2f} | "
        f"{share:.0%}{verdict} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    config = SpeedConfig(repeats=repeats)
    with tempfile.TemporaryDirectory(prefix="darwinlm-speed-") as scratch:
        root = Path(scratch)
        checkpoint, dense = dense_smollm2(root)
        blocks = dense.config.num_hidden_layers
        directories = {
            "dense": checkpoint.path,
            "pruned": export(checkpoint, dense, half(blocks), root / "pruned", None),
            "empty": export(checkpoint, dense, [Kept((0,), tuple(range(32)))] * blocks, root / "empty", None),
        }
        del dense
        models: dict[str, Any] = {name: load(directory) for name, directory in directories.items()}
        counted = {name: count(model, config) for name, model in models.items()}
        parameters = {name: parameter_count(model) for name, model in models.items()}
        measured = measure(models, config)
        del models
        files = {name: export_gguf(path, root / f"{name}.gguf", "f32") for name, path in directories.items()}
        by_threads = {
            threads: llama_cpp_seconds(files, config, root, threads) for threads in sorted({1, torch.get_num_threads()})
        }
    seconds = by_threads[torch.get_num_threads()]
    flops = counted["dense"].prefill_flops / counted["pruned"].prefill_flops
    read = counted["dense"].decode_bytes / counted["pruned"].decode_bytes
    a, b = measured["dense"], measured["pruned"]
    prompt, new = config.prompt_tokens, config.new_tokens
    lines = [
        "# Half of the prunable parameters gone: how much faster",
        "",
        f"SmolLM2-135M, {parameters['dense']:,} to {parameters['pruned']:,} parameters, float32, batch 1, "
        f"{prompt} prompt and {new} new tokens, medians of {repeats}. {date.today()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}: "
        f"`python benchmarks/speed.py --repeats {repeats}`",
        "",
        "| runtime | stage | dense tokens/s | pruned tokens/s | speed-up | predicted | share |",
        "|---|---|---|---|---|---|---|",
        row("transformers", "prefill", a.prefill_tokens_per_s, b.prefill_tokens_per_s, flops),
        row("transformers", "decode", a.decode_tokens_per_s, b.decode_tokens_per_s, read),
        row("llama.cpp", "prefill", prompt / seconds["dense"][0], prompt / seconds["pruned"][0], flops),
        *(
            row(f"llama.cpp, threads: {number}", "decode", new / found["dense"][1], new / found["pruned"][1], read)
            for number, found in by_threads.items()
        ),
        "",
        "| | dense | pruned |",
        "|---|---|---|",
        f"| time to first token | {a.first_token_s:.3f} s | {b.first_token_s:.3f} s |",
        f"| KV cache | {a.cache_bytes / 1e6:.1f} MB | {b.cache_bytes / 1e6:.1f} MB |",
        f"| peak memory | {(a.peak_bytes or 0) / 1e6:.0f} MB | {(b.peak_bytes or 0) / 1e6:.0f} MB |",
        "",
        f"Overhead, by a model of {parameters['empty']:,} parameters in as many blocks; for one decoded token:",
        "",
        "| | empty | pruned | dense |",
        "|---|---|---|---|",
        *(
            f"| {title} | " + " | ".join(f"{values[name]:.1f}" for name in ("empty", "pruned", "dense")) + " |"
            for title, values in (
                ("MB read", {name: found.decode_bytes / 1e6 for name, found in counted.items()}),
                ("ms in transformers", {name: 1000 / found.decode_tokens_per_s for name, found in measured.items()}),
                *(
                    (f"ms in llama.cpp, threads: {number}", {name: 1000 * s[1] / new for name, s in found.items()})
                    for number, found in by_threads.items()
                ),
            )
        ),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
