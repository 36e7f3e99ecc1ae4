"""What widths that serve cost: KL where channels leave in multiples of 128 or 256.

    python benchmarks/widths.py OUT [--target params=0.8] [--arms 32 256] [--tokens 32768]      # resumes

Each arm is one `darwinlm compress` of SmolLM2-135M with the same text, target and effort, and other levels. KL from the
dense model in nats a token is on held-out articles and on WikiText-2's validation text, `groups` the share of the
weights whose rows are multiples of what 4-bit formats want. Results are in OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from held_out import judged_texts

from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import load
from darwinlm.config.run import (
    CalibrationConfig,
    DatabaseConfig,
    EvaluationConfig,
    RefitConfig,
    RunConfig,
    SearchConfig,
)
from darwinlm.data.corpus import read_corpus
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.size import parameter_count
from darwinlm.report import tables
from darwinlm.runtime.device import resolve_device
from darwinlm.runtime.files import write_json

HELD_OUT, LENGTH = 16_384, 512
ARMS = {
    "32": DatabaseConfig(),
    "128": DatabaseConfig(granularity=128),
    "256": DatabaseConfig(granularity=256),
}
GROUPS = (32, 128, 256)


def settings(given: argparse.Namespace, arm: str) -> RunConfig:
    return RunConfig(
        model="smollm2-135m",
        data="vital-wiki",
        out=str(given.out / arm.replace(" ", "-")),
        target=given.target,
        fit_data=True,
        verify=False,
        database=ARMS[arm],
        calibration=CalibrationConfig(tokens=given.tokens, sequence_length=LENGTH),
        search=SearchConfig(generations=given.generations),
        refit=RefitConfig(tokens=given.tokens),
        evaluation=EvaluationConfig(tokens=2048, repeats=1, speed_tokens=64),
    )


def fitting(model: Any, group: int) -> float:
    """The share of the weights of linear modules whose rows are a multiple of a group."""
    widths = [(module.weight.numel(), module.in_features) for module in linears(model)]
    return sum(count for count, width in widths if width % group == 0) / sum(count for count, _ in widths)


def linears(model: Any) -> list[torch.nn.Linear]:
    return [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="params=0.8")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept, made_from = (
        given.out / "results.json",
        {"target": given.target, "tokens": given.tokens, "generations": given.generations},
    )
    found = json.loads(kept.read_text()) if kept.exists() else {"made from": made_from, "arms": {}}
    if found["made from"] != made_from:
        raise SystemExit(f"{kept} is of {found['made from']}, not of {made_from}: choose another OUT")
    results = found["arms"]
    checkpoint = find_checkpoint("smollm2-135m", given.out)
    tokenizer = checkpoint.tokenizer
    texts = judged_texts(read_corpus("vital-wiki", tokenizer, LENGTH, 0), tokenizer, HELD_OUT, LENGTH)
    device = resolve_device("auto")
    dense = checkpoint.load(torch.float32, device)
    of_dense: dict[str, list[torch.Tensor]] = {name: [] for name in texts}
    for arm in given.arms:
        if arm not in results:
            began = time.monotonic()
            model: Any = load(run(settings(given, arm)).path)
            model.to(device)
            seconds = time.monotonic() - began
            models = {"dense": dense, "pruned": model}
            kl = {name: perplexity_and_kl(models, ids, of_dense[name])["pruned"].kl for name, ids in texts.items()}
            shares = {f"groups of {group}": fitting(model, group) for group in GROUPS}
            results[arm] = kl | shares | {"parameters": parameter_count(model), "seconds": seconds}
            write_json(kept, {"made from": made_from, "arms": results})
    titles = ["channels leave in", *texts, *(f"groups of {group}" for group in GROUPS), "parameters", "seconds"]
    rows = [
        [
            arm,
            *(f"{row[name]:.4f}" for name in texts),
            *(f"{row[f'groups of {group}']:.0%}" for group in GROUPS),
            f"{row['parameters']:,}",
            f"{row['seconds']:.0f}",
        ]
        for arm, row in results.items()
    ]
    print(tables.markdown(titles, rows))


if __name__ == "__main__":
    main()
