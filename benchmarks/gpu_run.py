"""A whole run and a training at the widths of a real model, with few blocks and random weights: seconds and memory.

    python benchmarks/gpu_run.py --shape Llama-3.1-8B --blocks 4    # on a GPU
    python benchmarks/gpu_run.py --blocks 16 --untrained --memory 7GiB --stages database search
    python benchmarks/gpu_run.py --shape tiny --device cpu          # anywhere, to try the script itself

The model is written to a temporary directory and goes through every stage as a user's would. Random weights tell
nothing about quality. Memory is what torch took for tensors, and what it kept of the GPU to do so. A search that kept
more than `--memory` allows ends in exit code 1. With a limit, the search is run without one as well, as `search, free`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # whose text and tokenizer these are

import torch
from gpu import shapes
from transformers import AutoModelForCausalLM

import runs
import tiny
from darwinlm.commands.compress import run
from darwinlm.commands.train import train
from darwinlm.config.checks import bytes_of
from darwinlm.config.run import (
    CalibrationConfig,
    DatabaseConfig,
    EvaluationConfig,
    RefitConfig,
    RunConfig,
    SearchConfig,
    Stage,
)
from darwinlm.config.training import DistillationConfig, StreamConfig, TrainConfig, TrainingConfig
from darwinlm.runtime.device import memory_limit, processor_name, resolve_device
from darwinlm.runtime.files import write_json
from darwinlm.types import SelectionStage


@dataclass(frozen=True)
class Measured:
    """Seconds of a stage and the largest memory in it, which is 0 on a CPU."""

    stage: str
    seconds: float
    allocated_bytes: int
    reserved_bytes: int


def measured(stage: str, work: Callable[[], Any], device: torch.device) -> Measured:
    """One call of the work. A failure is printed, so that the stages after it are still tried."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    try:
        work()
    except Exception:
        traceback.print_exc()
        stage += " (failed)"
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    peaks = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)) if on_gpu else (0, 0)
    print(
        f"{stage}: {seconds:.1f} s, {peaks[0] / 2**30:.1f} GiB of tensors, {peaks[1] / 2**30:.1f} GiB kept", flush=True
    )
    return Measured(stage, seconds, *peaks)


def write_model(shape: str, blocks: int, device: torch.device, directory: Path) -> Path:
    """A checkpoint with random weights in bfloat16, and a tokenizer that needs no network."""
    config = shapes(shape == "tiny")[shape].config
    config.num_hidden_layers = blocks
    config.layer_types = None  # written for another number of blocks
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(type(config)(**config.to_diff_dict()), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def settings(
    model: Path, directory: Path, length: int, device: torch.device, trained: bool, memory: str | None
) -> RunConfig:
    """A short run: the paper's stages of selection with training in the last two, as many tokens as the text gives."""
    text = tiny.write_text(directory / "topics.jsonl")
    stages = (
        SelectionStage(4, 2 * length),
        SelectionStage(2, 4 * length, 2 * length * trained),
        SelectionStage(1, 8 * length, 4 * length * trained),
    )
    return RunConfig(
        model=str(model),
        data=str(text),
        out=str(directory / "run"),
        target="params=0.7",
        memory=memory,
        device=str(device),
        dtype="bfloat16",
        fit_data=True,
        verify=False,
        calibration=CalibrationConfig(tokens=64 * length, sequence_length=length, batch_size=4, dtype="bfloat16"),
        database=DatabaseConfig(levels=8),
        search=SearchConfig(generations=2, offspring=8, stages=stages),
        refit=RefitConfig(tokens=16 * length * trained),
        evaluation=EvaluationConfig(
            tokens=8 * length, speed_tokens=length // 2, decode_tokens=8, continuation_tokens=8
        ),
    )


def training_of(config: RunConfig, length: int) -> TrainConfig:
    """A few steps of training of the run's export, taught by the dense model."""
    return TrainConfig(
        model=config.out,
        data=config.data,
        out=f"{config.out}-trained",
        teacher=config.model,
        device=config.device,
        tokens=4 * 4 * length,
        verify=False,
        stream=StreamConfig(sequence_length=length),
        distillation=DistillationConfig(weight=0.5),
        training=TrainingConfig(
            batch_size=4,
            warmup_steps=1,
            save_every=4,
            log_every=1,
            gradient_checkpointing=True,
            evaluation_tokens=2 * length,
        ),
    )


def search_without_limit(config: RunConfig) -> None:
    """The run's search on the same database in another directory, with all of the device's memory."""
    free = replace(config, out=f"{config.out}-free", memory=None)
    shutil.copytree(config.out, free.out, ignore=shutil.ignore_patterns("search"))
    run(free, until="search")
    same = runs.history(Path(config.out)) == runs.history(Path(free.out))
    print(f"the limit {'changed no' if same else 'changed the'} result")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Llama-3.1-8B")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--stages", nargs="*", default=[*get_args(Stage), "train"], choices=[*get_args(Stage), "train"])
    parser.add_argument("--untrained", action="store_true", help="select without training, and do not refit")
    parser.add_argument("--memory", help="a limit of what the search holds on the device, such as 7GiB")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device, length = resolve_device(arguments.device), arguments.length
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model = write_model(arguments.shape, arguments.blocks, device, directory / "dense")
        config = settings(model, directory, length, device, not arguments.untrained, arguments.memory)
        calibration = replace(config.calibration, tokens=min(arguments.calibration_tokens, 64 * length))
        config = replace(config, calibration=calibration, database=DatabaseConfig(levels=arguments.levels))
        work: dict[str, Callable[[], Any]] = {stage: partial(run, config, until=stage) for stage in get_args(Stage)}
        work["train"] = partial(train, training_of(config, length))
        rows = [measured(stage, work[stage], device) for stage in arguments.stages]
        if arguments.memory is not None:
            rows.append(measured("search, free", partial(search_without_limit, config), device))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    shape = f"{arguments.shape}, {arguments.blocks} blocks, sequences of {length} tokens"
    print(f"{card}, torch {torch.__version__}, {datetime.date.today()}; {shape}\n")
    print("| stage | seconds | tensors | kept of the GPU |\n|---|---|---|---|")
    for row in rows:
        allocated, reserved = row.allocated_bytes / 2**30, row.reserved_bytes / 2**30
        print(f"| {row.stage} | {row.seconds:.1f} | {allocated:.1f} GiB | {reserved:.1f} GiB |")
    if "OUT" in os.environ:  # where a lent machine's files come back from
        write_json(Path(os.environ["OUT"]) / f"gpu-run-{arguments.shape}.json", [asdict(row) for row in rows])
    limit = memory_limit(device, None if arguments.memory is None else bytes_of(arguments.memory))
    return int(any(row.stage == "search" and limit is not None and row.reserved_bytes > limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
