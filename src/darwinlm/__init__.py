"""Evolutionary, training-aware structured pruning of large language models.

    run = darwinlm.compress("MODEL", "text.jsonl", target_level=5, out="runs/mine")
    run.model, run.genome, run.table

    model = darwinlm.load("runs/mine")  # later: a run, an export, or one on the hub

Names are imported when they are first used: `import darwinlm` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darwinlm.commands.compress import compress
    from darwinlm.commands.evaluate import evaluate_models
    from darwinlm.commands.export import export_model
    from darwinlm.commands.frontier import frontier
    from darwinlm.commands.plan.work import plan
    from darwinlm.commands.run_directory import Run, load
    from darwinlm.commands.train import train
    from darwinlm.config.evaluation import EvaluateConfig
    from darwinlm.config.frontier import FrontierConfig
    from darwinlm.config.run import (
        CalibrationConfig,
        DatabaseConfig,
        EvaluationConfig,
        ExportConfig,
        RefitConfig,
        RunConfig,
        SearchConfig,
    )
    from darwinlm.config.training import TrainConfig
    from darwinlm.database.calibrate import calibrate
    from darwinlm.database.cholesky import dampen
    from darwinlm.database.eliminate import eliminate, solve_levels
    from darwinlm.database.stitch import Stitcher
    from darwinlm.database.store import Database
    from darwinlm.evaluation.quality import perplexity_and_kl
    from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
    from darwinlm.search.evolution import evolve
    from darwinlm.search.fitness import Fitness, Scorer
    from darwinlm.types import DarwinError, Genome, SelectionStage, UsageError

__version__ = version("darwinlm")
__all__ = [
    "CalibrationConfig",
    "Checkpoint",
    "DarwinError",
    "Database",
    "DatabaseConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "Fitness",
    "FrontierConfig",
    "Genome",
    "RefitConfig",
    "Run",
    "RunConfig",
    "Scorer",
    "SearchConfig",
    "SelectionStage",
    "Stitcher",
    "TrainConfig",
    "UsageError",
    "__version__",
    "calibrate",
    "compress",
    "dampen",
    "eliminate",
    "evaluate_models",
    "evolve",
    "export_model",
    "find_checkpoint",
    "frontier",
    "load",
    "perplexity_and_kl",
    "plan",
    "solve_levels",
    "train",
]
_MODULES = {
    "config.run": (
        "CalibrationConfig",
        "DatabaseConfig",
        "EvaluationConfig",
        "ExportConfig",
        "RefitConfig",
        "RunConfig",
        "SearchConfig",
    ),
    "config.training": ("TrainConfig",),
    "config.evaluation": ("EvaluateConfig",),
    "config.frontier": ("FrontierConfig",),
    "commands.compress": ("compress",),
    "commands.evaluate": ("evaluate_models",),
    "commands.export": ("export_model",),
    "commands.frontier": ("frontier",),
    "commands.plan.work": ("plan",),
    "commands.run_directory": (
        "Run",
        "load",
    ),
    "commands.train": ("train",),
    "database.calibrate": ("calibrate",),
    "database.cholesky": ("dampen",),
    "database.eliminate": (
        "eliminate",
        "solve_levels",
    ),
    "database.stitch": ("Stitcher",),
    "database.store": ("Database",),
    "evaluation.quality": ("perplexity_and_kl",),
    "model.checkpoint": (
        "Checkpoint",
        "find_checkpoint",
    ),
    "search.evolution": ("evolve",),
    "search.fitness": (
        "Fitness",
        "Scorer",
    ),
    "types": (
        "DarwinError",
        "Genome",
        "SelectionStage",
        "UsageError",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
