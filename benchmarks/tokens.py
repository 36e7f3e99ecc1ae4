"""How far does a pruned model recover, by tokens and by what trains?  And which law do the tokens follow?

    darwinlm compress smollm2-135m --data vital-wiki --out RUN --until search      # or any run that has searched
    python benchmarks/tokens.py RUN OUT [--tokens 131072 262144 524288 1048576] [--ways consumers distillation ...]
    python benchmarks/tokens.py RUN OUT --report

Each way starts from the genome of the search as the database has it. `refit` is the default one, and `consumers` that
of consumers alone, four sequences a step. `distillation`, `cross-entropy` and `both` are `darwinlm train` of all
weights by these losses. Judged on held-out articles, on WikiText-2's validation text and by the log-likelihood of right
answers (ARC-easy); `OUT/measured.jsonl` keeps every figure. The law is KL(t) = floor + scale / t^power, fitted to all
lengths but the longest, which it has to predict.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import right_answers
from cells import cells
from held_out import judged_texts
from scipy.optimize import curve_fit
from search import open_bench

from darwinlm.commands.run_directory import Run, load
from darwinlm.commands.train import train
from darwinlm.config.run import RefitConfig
from darwinlm.config.training import DistillationConfig, StreamConfig, TrainConfig, TrainingConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.database.stitch import repeat_shared
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.export.hf import export_hf
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.families import block_sizes
from darwinlm.report import tables
from darwinlm.runtime.device import resolve_device, resolve_dtype
from darwinlm.runtime.files import read_json_lines
from darwinlm.training.refit import refit, set_refitted

LENGTH, HELD_OUT, BATCH = 512, 16_384, 8
WEIGHTS = {"distillation": 1.0, "both": 0.5, "cross-entropy": 0.0}  # of the divergence in the loss, by way
RATES = {"refit": 2e-4, "consumers": 3e-4, "distillation": 3e-4, "both": 3e-4, "cross-entropy": 3e-4}


class Bench:
    """The searched genome of a run, the dense model, and the texts."""

    def __init__(self, path: Path, out: Path):
        self.run, self.out, self.device = Run.open(path), out, resolve_device("auto")
        bench, self.config = open_bench(path, resolve_dtype("auto", self.device), self.device)
        self.stitcher, self.dense = bench.stitcher, bench.stitcher.dense
        self.checkpoint = find_checkpoint(self.config.model, path)
        tokenizer = self.checkpoint.tokenizer
        self.corpus = read_corpus(self.config.data, tokenizer, LENGTH, self.config.seed)
        self.texts = judged_texts(self.corpus, tokenizer, HELD_OUT, LENGTH)
        self.of_dense: dict[str, list[torch.Tensor]] = {name: [] for name in self.texts}

    def measure(self, way: str, tokens: int, rate: float) -> dict[str, Any]:
        """Train in one way on so many tokens, and judge the model."""
        began = time.monotonic()
        model = self._trained(way, tokens, rate) if way in WEIGHTS else self._refitted(way, tokens, rate)
        seconds = time.monotonic() - began
        found: dict[str, Any] = {"seconds": seconds}
        for name, text in self.texts.items():
            quality = perplexity_and_kl({"dense": self.dense, "model": model}, text, self.of_dense[name])["model"]
            found |= {f"{name}, KL": quality.kl, f"{name}, perplexity": quality.perplexity}
        return found | {"answers": right_answers(model, self.checkpoint.tokenizer)}

    def _refitted(self, way: str, tokens: int, rate: float) -> Any:
        model = self.stitcher.stitch(self.run.genome)
        if not tokens:
            return model
        drawn = self.corpus.draw(calibration=self.config.calibration.tokens, search=8192, refit=tokens)["refit"]
        config = RefitConfig(tokens, rate) if way == "refit" else RefitConfig(tokens, rate, batch_size=4, rank=0)
        file = self.out / f"{way}-{tokens}-{rate:g}.safetensors"
        weights = refit(self.stitcher, self.run.genome, drawn, config, file, {})
        set_refitted(model, weights)
        return model

    def _trained(self, way: str, tokens: int, rate: float) -> Any:
        directory, steps = self.out / f"{way}-{tokens}-{rate:g}", -(-tokens // (BATCH * LENGTH))
        config = TrainConfig(
            model=str(self._export()),
            data=self.config.data,
            out=str(directory),
            tokens=tokens,
            teacher=str(self.run.dense),
            cache=str(self.out / "cache"),
            verify=False,
            stream=StreamConfig(sequence_length=LENGTH),
            distillation=DistillationConfig(weight=WEIGHTS[way]),
            training=TrainingConfig(
                learning_rate=rate,
                warmup_steps=steps // 20,
                batch_size=BATCH,
                micro_batch_size=4 if self.device.type == "cpu" else BATCH,
                evaluate_every=steps,
                save_every=10 * steps,
                evaluation_tokens=1024,
            ),
        )
        model: Any = load(train(config).path)
        shutil.rmtree(directory)
        return model.to(self.device)

    def _export(self) -> Path:
        """The searched model as the database has it, which is written once."""
        path = self.out / "searched"
        if not path.exists():
            model = repeat_shared(self.stitcher.stitch(self.run.genome))
            sizes = block_sizes(self.stitcher.grid, self.run.genome, self.checkpoint.config)
            export_hf(model, sizes, self.checkpoint.tokenizer, path, "# searched\n")
        return path


def law(tokens: list[int], kl: list[float]) -> tuple[float, float, float]:
    """Floor, scale and power of KL(t) = floor + scale / t^power, with t in units of 131,072 tokens."""

    def curve(t: Any, floor: float, scale: float, power: float) -> Any:
        return floor + scale * t**-power

    fitted, _ = curve_fit(curve, np.array(tokens) / 131_072, kl, (kl[-1] / 2, kl[0] / 2, 0.5), bounds=(0, (9, 9, 2)))
    return tuple(map(float, fitted))  # type: ignore[return-value]


def report(lines: list[dict[str, Any]]) -> str:
    """A row for each training, and what the law says of the longest training of each way."""
    measures = [name for name in lines[0] if name not in ("way", "tokens", "rate")] if lines else []
    rows = [
        [line["way"], f"{line['tokens']:,}", f"{line['rate']:g}", *(f"{line[name]:.4g}" for name in measures)]
        for line in sorted(lines, key=lambda line: (line["way"], line["rate"], line["tokens"]))
    ]
    found = [tables.markdown(["way", "tokens", "rate", *measures], rows)]
    for way, rate in dict.fromkeys((line["way"], line["rate"]) for line in lines if line["tokens"]):
        mine = sorted((line for line in lines if (line["way"], line["rate"]) == (way, rate)), key=lambda x: x["tokens"])
        for text in ("articles", "WikiText-2"):
            pairs = [(line["tokens"], line[f"{text}, KL"]) for line in mine if line["tokens"]]
            if len(pairs) < 5:
                continue
            floor, scale, power = law(*map(list, zip(*pairs[:-1], strict=True)))  # type: ignore[arg-type]
            last, truth = pairs[-1]
            told = floor + scale * (last / 131_072) ** -power
            found.append(
                f"{way} at {rate:g}, {text}: {floor:.3f} + {scale:.3f} / (t / 131,072)^{power:.2f}; of {last:,} tokens "
                f"it says {told:.4f}, found {truth:.4f} ({told / truth - 1:+.1%})"
            )
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 131_072, 262_144, 524_288, 1_048_576])
    parser.add_argument("--ways", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+", help="in place of the rates of each way")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "measured.jsonl"
    if not given.report:
        bench = Bench(given.run, given.out)
        wanted = [{"way": "consumers", "tokens": 0, "rate": 0.0}] + [
            {"way": way, "tokens": tokens, "rate": rate}
            for tokens in given.tokens for way in given.ways for rate in given.rates or [RATES[way]]
        ]  # fmt: skip
        cells(file, wanted, bench.measure)
    print(report(read_json_lines(file) if file.exists() else []))


if __name__ == "__main__":
    main()
