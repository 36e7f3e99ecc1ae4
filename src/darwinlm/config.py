"""One frozen dataclass a stage: the same serve the command line, YAML and Python.

The first line under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from darwinlm.types import SelectionStage, UsageError


@dataclass(frozen=True)
class CalibrationConfig:
    """Calibration: which text the dense model is measured on."""

    tokens: int = 131_072
    """Calibration tokens."""
    sequence_length: int = 512
    """Tokens in a sequence, for calibration, search and evaluation."""
    batch_size: int = 8
    """Sequences in one forward pass."""


@dataclass(frozen=True)
class DatabaseConfig:
    """Database: which levels every unit gets, and how they are solved."""

    levels: int = 10
    """Levels a unit, N; at level i it has lost i/N of its structures. Fewer where a unit has fewer structures."""
    granularity: int = 32
    """MLP channels are removed in multiples of this many."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""


@dataclass(frozen=True)
class SearchConfig:
    """Search: Algorithm 1."""

    generations: int = 40
    """Generations of the evolution."""
    offspring: int = 16
    """Mutants of the parent in each generation."""
    stages: tuple[SelectionStage, ...] = (
        SelectionStage(survivors=8, fitness_tokens=1024),
        SelectionStage(survivors=4, fitness_tokens=2048),
        SelectionStage(survivors=2, fitness_tokens=4096),
        SelectionStage(survivors=1, fitness_tokens=8192),
    )
    """Rounds of selection within a generation: survivors, fitness tokens, training tokens."""
    max_switches: int = 3
    """Level switches in one mutant, at most."""
    learning_rate: float = 1e-5
    """Learning rate of the training before selection."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out documents."""

    tokens: int = 16_384
    """Held-out tokens for perplexity and KL divergence."""
    prompts: tuple[str, ...] = (
        "The capital of France is",
        "Water boils at",
        "The Roman Empire was",
    )
    """Beginnings that each model continues greedily."""
    continuation_tokens: int = 32
    """New tokens in each continuation."""
    speed_tokens: int = 512
    """Prompt tokens of the prefill timing."""
    decode_tokens: int = 32
    """New tokens of the decode timing."""
    repeats: int = 5
    """Alternating timings a model; the median counts."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, and where it goes."""

    model: str
    """A hub id, a directory, a .gguf file, or smollm2-135m."""
    data: str
    """Text: fineweb-edu, wikitext2, c4, a datasets id, a .txt, .jsonl or .parquet file, vital-wiki; SOURCE=WEIGHT,SOURCE=WEIGHT mixes."""
    out: str
    """Directory of the run. The same command resumes it."""
    target_level: float = 5.0
    """Uniform level whose size the result must not exceed, out of database.levels; need not be whole."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda."""
    dtype: str = "auto"
    """Precision of the search: float32, bfloat16, or auto (bfloat16 where the device is fast at it)."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def read_config(path: Path) -> RunConfig:
    """A run's settings from a YAML file that holds all of them, as a run directory's `run.yaml` does.

    Raises:
        UsageError: if the file is no such settings.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    try:
        settings = parser.parse_path(path)
    except (ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} does not hold the settings of a run ({reason}); restore it or use another directory")
    return RunConfig(**parser.instantiate(settings).as_dict())


# What `darwinlm demo` runs: a quarter of a small real model's prunable parameters, in minutes on two cores.
DEMO = RunConfig(
    model="smollm2-135m",
    data="vital-wiki",
    out="runs/demo",
    target_level=3.0,
    calibration=CalibrationConfig(tokens=32_768),
    database=DatabaseConfig(levels=12),
    search=SearchConfig(generations=12),
)
