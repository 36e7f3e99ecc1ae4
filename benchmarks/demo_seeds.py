"""The demo for three seeds: is the searched model ahead of the uniform one on articles that neither search has seen?

    python benchmarks/demo_seeds.py [OUT]       # about six minutes a seed on two cores; resumes

Prints a row a seed. The database, the search tokens and the uniform genome differ between seeds, the held-out
articles do not.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from darwinlm.commands.compress import run
from darwinlm.config.run import DEMO


def main(out: Path) -> None:
    rows = []
    for seed in (0, 1, 2):
        began = time.monotonic()
        result = run(replace(DEMO, seed=seed, out=str(out / f"seed-{seed}")))
        by_model = {row["model"]: row for row in result.table}
        rows.append((seed, by_model["uniform"], by_model["searched"], time.monotonic() - began))
    print(
        "| seed | parameters | uniform KL | searched KL | ratio | uniform perplexity | searched perplexity | seconds |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for seed, uniform, searched, seconds in rows:
        assert searched["parameters"] <= uniform["parameters"]
        print(
            f"| {seed} | {searched['parameters']:,} (uniform {uniform['parameters']:,}) | {uniform['kl']:.4f} "
            f"| {searched['kl']:.4f} | {searched['kl'] / uniform['kl']:.2f} | {uniform['perplexity']:.2f} "
            f"| {searched['perplexity']:.2f} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/seeds"))
