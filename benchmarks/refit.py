"""What the refit is worth: held-out KL of the uniform genome of SmolLM2-135M, before and after, on two texts.

    python benchmarks/refit.py OUT [--seeds 0 1 2] [--tokens 32768] [--levels 3 4.8]      # resumes

A quarter (level 3 of 12) and 40 % (4.8) of the prunable parameters are removed. Database and refit draw their tokens
from encyclopedia articles, another draw for every seed; neither the held-out articles nor WikiText-2 validation were
seen. KL to the dense model in nats a token, on 8,192 tokens of each, in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random
from statistics import mean

import torch
from held_out import HeldOut
from torch import Tensor

from darwinlm.config.run import DatabaseConfig, RefitConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database, add_unit
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.search.uniform import uniform_genome
from darwinlm.training.refit import refit, set_refitted

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2_valid.txt"
CPU = torch.device("cpu")
LENGTH, CALIBRATION, HELD_OUT, LEVELS = 512, 32_768, 8_192, 12


def wikitext(checkpoint: Checkpoint) -> Tensor:
    text = WIKITEXT.read_text(encoding="utf-8")[: HELD_OUT * 8]
    ids = checkpoint.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:HELD_OUT]).view(-1, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768])
    parser.add_argument("--levels", type=float, nargs="+", default=[3.0, 4.8])
    arguments = parser.parse_args()
    checkpoint = find_checkpoint("smollm2-135m", arguments.out)
    grid = level_grid(checkpoint.units, LEVELS, 32)
    dense = checkpoint.load(torch.bfloat16, CPU)
    print("| seed | level | refit tokens | KL articles | after | ratio | KL WikiText-2 | after | ratio | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    held_out, ratios = None, []
    for seed in arguments.seeds:
        corpus = read_corpus("vital-wiki", checkpoint.tokenizer, LENGTH, seed)
        held_out = held_out or HeldOut(
            dense, {"articles": corpus.draw_held_out(HELD_OUT), "wikitext": wikitext(checkpoint)}
        )
        tokens = corpus.draw(calibration=CALIBRATION, refit=max(arguments.tokens))
        database = Database(arguments.out / f"seed-{seed}", grid, {"seed": seed})
        for statistics in calibrate(
            checkpoint, tokens["calibration"], batch_size=8, device=CPU, finished=database.finished()
        ):
            add_unit(database, statistics, DatabaseConfig(levels=LEVELS), torch.float32)
        stitcher = Stitcher(dense, checkpoint.family, database)
        for level in arguments.levels:
            genome = uniform_genome(grid, level, LEVELS, Random(seed))
            before = held_out(stitcher.stitch(genome)).values()
            for count in arguments.tokens:
                began = time.monotonic()
                file = arguments.out / f"refit-{seed}-{level:g}-{count}.safetensors"
                weights = refit(
                    stitcher, genome, tokens["refit"][: count // LENGTH], RefitConfig(tokens=count), file, {}
                )
                seconds = time.monotonic() - began
                model = stitcher.stitch(genome)
                set_refitted(model, weights)
                after = held_out(model).values()
                pairs = list(zip(before, after, strict=True))
                ratios.append([new / old for old, new in pairs])
                cells = [f"{old:.4f} | {new:.4f} | {new / old:.2f}" for old, new in pairs]
                print(f"| {seed} | {level:g} | {count:,} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
    print(f"\nMean ratios: articles {mean(r[0] for r in ratios):.2f}, WikiText-2 {mean(r[1] for r in ratios):.2f}")


if __name__ == "__main__":
    main()
