"""What each stage takes on a GPU at the widths of real models, with random weights: seconds and memory, no quality.

    python benchmarks/gpu.py                                # on a GPU, in a few minutes; `make gpu` runs it
    python benchmarks/gpu.py --device cpu --shapes tiny     # anywhere, to try the script itself

Blocks have the widths of Llama-3.1-8B and Qwen2.5-14B, and there are few of them: every stage is linear in their
number, so its time for a whole model is told by the time of a block. Nothing is fetched: configs are in this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from elimination import make_problem
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from darwinlm.config.run import SearchConfig
from darwinlm.database.cholesky import cholesky
from darwinlm.database.eliminate import eliminate, solve_levels
from darwinlm.losses.gradients import KLGradient
from darwinlm.losses.logits import Logits
from darwinlm.losses.metrics import Metric, metric
from darwinlm.model.families import find_units
from darwinlm.runtime.device import processor_name, resolve_device
from darwinlm.runtime.files import write_json
from darwinlm.runtime.timing import alternate, now
from darwinlm.types import MetricName, Unit

LENGTH = 2048  # tokens in a sequence
TEST = Unit("block-00-mlp", 0, "mlp", "consumer", (), 1, 4096, 1, 0)  # on which float32 is compared with float64


@dataclass(frozen=True)
class Shape:
    """A model's config with few blocks, and how many blocks it really has."""

    config: PretrainedConfig
    blocks: int


def shapes(tiny: bool) -> dict[str, Shape]:
    """The models whose widths are measured."""
    if tiny:
        small = LlamaConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, vocab_size=512,
                            num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        return {"tiny": Shape(small, 2)}
    return {
        "Llama-3.1-8B": Shape(
            LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192), 32),
        "Qwen2.5-14B": Shape(
            Qwen2Config(hidden_size=5120, intermediate_size=13824, num_hidden_layers=2, num_attention_heads=40,
                        num_key_value_heads=8, vocab_size=152064, max_position_embeddings=8192), 48),
        "SmolLM2-135M": Shape(
            LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
                        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192,
                        tie_word_embeddings=True), 30),
    }  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Seconds of one step and the largest memory in it, which is 0 on a CPU."""

    model: str
    step: str
    seconds: float
    memory_bytes: int
    note: str = ""


def measured(model: str, step: str, work: Callable[[], Any], device: torch.device, repeats: int = 3) -> Measured:
    """The median of some repetitions after a first one that warms up."""

    def timed() -> float:
        began = now(device)
        work()
        return now(device) - began

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median(alternate({step: timed}, repeats, f"{model}, {step}")[step])
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measured(model, step, seconds, memory)


def exactness(device: torch.device) -> str:
    """What float32 costs an elimination on the device: the errors of its levels beside those of float64's."""
    weight, hessian = (each.to(device) for each in make_problem(1024, TEST.structures))
    W, P = weight.double(), torch.linalg.inv(hessian.double())
    exact = eliminate(TEST, W, hessian.double()).order.tolist()
    found = eliminate(TEST, weight, hessian).order.tolist()
    kept, more = [], []
    for gone in range(TEST.structures // 10, TEST.structures, TEST.structures // 10):
        errors = [
            float((W[:, left] @ torch.linalg.inv(P[left][:, left]) * W[:, left]).sum())
            for left in (torch.tensor(order[:gone], device=device) for order in (found, exact))
        ]
        kept.append(len(set(found[gone:]) & set(exact[gone:])) / (TEST.structures - gone))
        more.append(errors[0] / errors[1] - 1)
    factor, reference = (cholesky(TEST, each).double().tril() for each in (hessian, hessian.double()))
    return (
        f"float32 beside float64, {TEST.structures} channels, ten levels: at least {min(kept):.1%} of what is kept is "
        f"the same, and errors are {min(more):+.1e} to {max(more):+.1e} of float64's; its Cholesky factor is off by "
        f"{float((factor - reference).norm() / reference.norm()):.1e}"
    )


def eliminations(name: str, model: PreTrainedModel, device: torch.device) -> list[Measured]:
    """The database: each unit of a block, its order of removal and its weights at nine levels."""
    found = []
    for unit in find_units(model, model.config, "kv_group")[:2]:
        consumer: Any = model.get_submodule(unit.consumer)
        weight, hessian = (each.to(device) for each in make_problem(consumer.out_features, consumer.in_features))
        unit = dataclasses.replace(unit, name=f"block-00-{unit.kind}")
        shape = f"{unit.kind}, {consumer.in_features} inputs, {unit.structures} structures"
        removed = [level * unit.structures // 10 for level in range(10)]
        work = partial(eliminate, unit, weight, hessian)
        found.append(measured(name, f"elimination: {shape}", work, device, 1))
        solve = partial(solve_levels, unit, weight, hessian, work(), removed)
        found.append(measured(name, f"nine levels: {shape}", solve, device, 1))
    return found


def passes(name: str, model: PreTrainedModel, device: torch.device, length: int) -> list[Measured]:
    """Of two blocks and the output embedding: calibration's forward, a scored batch, a training step of consumers."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=device)
    decoder: Any = model.get_decoder()
    rows = []

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return decoder(ids, use_cache=False).last_hidden_state

    rows.append(measured(name, f"forward: 2 blocks, {length} tokens", forward, device, 5))
    for kind in get_args(MetricName):
        of_text = metric(kind, forward(), Logits.of(model), ids, SearchConfig.top_k)

        @torch.inference_mode()
        def score(of_text: Metric = of_text) -> list[float]:
            return of_text.totals([forward().flatten(0, 1)], Logits.of(model))

        rows.append(measured(name, f"score by {kind}: 2 blocks, {length} tokens", score, device, 5))
    consumers = [model.get_submodule(unit.consumer) for unit in find_units(model, model.config, "kv_group")]
    for consumer in consumers:
        consumer.requires_grad_(True)

    def step() -> None:
        with torch.no_grad():
            dense = forward().clone().flatten(0, 1)
        hidden = decoder(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden.backward(Logits.of(model).gradient(hidden, KLGradient(Logits.of(model), dense, len(dense))))
        model.zero_grad(set_to_none=True)

    rows.append(measured(name, f"gradient of KL: 2 blocks, {length} tokens", step, device, 3))
    return rows


def show(rows: list[Measured], device: torch.device, order: str) -> None:
    """Print the rows as a table of Markdown, with the machine and the day above it."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    print(f"{card}, torch {torch.__version__}, {datetime.date.today()}; {order}\n")
    print("| model | step | seconds | memory |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.model} | {row.step} | {row.seconds:.3f} | {row.memory_bytes / 2**30:.1f} GiB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shapes", choices=["real", "tiny"], default="real")
    arguments = parser.parse_args()
    device, tiny = resolve_device(arguments.device), arguments.shapes == "tiny"
    order, rows = exactness(device), []
    for name, shape in shapes(tiny).items():
        with torch.device(device):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16).eval().requires_grad_(False)
        rows += passes(name, model, device, 64 if tiny else LENGTH)
        rows += eliminations(name, model, device)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(rows, device, order)
    if "OUT" in os.environ:  # where a lent machine's files come back from
        write_json(Path(os.environ["OUT"]) / "gpu.json", [dataclasses.asdict(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
