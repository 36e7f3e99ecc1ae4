"""Peak memory and time of the distillation loss in chunks against the plain form, side by side.

    python benchmarks/distillation.py --tokens 2048 --vocab 49152 --hidden 576

Each form runs in a process of its own, forwards and backwards; its peak is above what the inputs take. The plain form
makes the logits of student and teacher whole, as a loss on two models' outputs does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darwinlm.losses.distillation import HiddenTarget, TopKTarget, chunked_loss
from darwinlm.losses.logits import Logits

FORMS = ("plain", "chunked", "top-k")
TOP_K = 64


def inputs(tokens: int, vocab: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and output embeddings of student and teacher, and labels."""
    generator = torch.Generator().manual_seed(0)
    states, teacher_states = (torch.randn(tokens, hidden, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5 for _ in range(2))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return states.requires_grad_(), weight.requires_grad_(), teacher_states, teacher_weight, labels


def plain(states: Tensor, weight: Tensor, teacher_states: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    """Half cross-entropy, half forward KL, on whole logits."""
    logits = states @ weight.T
    with torch.no_grad():
        log_p = (teacher_states @ teacher_weight.T).log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="batchmean")
    return 0.5 * F.cross_entropy(logits, labels) + 0.5 * kl


def measure(form: str, tokens: int, vocab: int, hidden: int) -> None:
    """Print peak bytes above the inputs, seconds, and the loss, as JSON."""
    states, weight, teacher_states, teacher_weight, labels = inputs(tokens, vocab, hidden)
    warm = 8
    if form == "top-k":
        with torch.no_grad():
            parts = [(rows @ teacher_weight.T).log_softmax(-1).topk(TOP_K) for rows in teacher_states.split(64)]
        target = TopKTarget(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))
    else:
        target = HiddenTarget(teacher_states, lambda rows: rows @ teacher_weight.T, 1.0)
    plain(states[:warm], weight, teacher_states[:warm], teacher_weight, labels[:warm]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if form == "plain":
        loss = plain(states, weight, teacher_states, teacher_weight, labels)
    else:
        linear = nn.Linear(hidden, vocab, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        loss = chunked_loss(states, Logits(linear), labels, target, kl_weight=0.5).loss
    loss.backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start, "loss": loss.item()}))


def main() -> None:
    """Measure each form and print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("vocab", 49152), ("hidden", 576)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--form", choices=FORMS, help="measure one form in this process")
    arguments = parser.parse_args()
    shape = arguments.tokens, arguments.vocab, arguments.hidden
    if arguments.form:
        measure(arguments.form, *shape)
        return
    found = {}
    for form in FORMS:
        flags = [f"--{name}={value}" for name, value in zip(("tokens", "vocab", "hidden"), shape, strict=True)]
        command = [sys.executable, __file__, "--form", form, *flags]
        found[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{shape[0]:,} tokens, vocabulary {shape[1]:,}, hidden {shape[2]}, float32, {torch.get_num_threads()} threads"
    )
    print("\n| form | peak beyond inputs | of plain | seconds | loss |\n| --- | ---: | ---: | ---: | ---: |")
    for form, figures in found.items():
        share = figures["peak"] / found["plain"]["peak"]
        size = f"{figures['peak'] / 1e6:,.0f} MB"
        print(f"| {form} | {size} | {share:.0%} | {figures['seconds']:.1f} | {figures['loss']:.4f} |")


if __name__ == "__main__":
    main()
