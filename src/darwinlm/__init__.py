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
    from darwinlm.commands.run_directory import Run, load
    from darwinlm.config.run import CalibrationConfig, DatabaseConfig, EvaluationConfig, RunConfig, SearchConfig
    from darwinlm.types import DarwinError, Genome, SelectionStage, UsageError

__version__ = version("darwinlm")
__all__ = [
    "CalibrationConfig",
    "DarwinError",
    "DatabaseConfig",
    "EvaluationConfig",
    "Genome",
    "Run",
    "RunConfig",
    "SearchConfig",
    "SelectionStage",
    "UsageError",
    "__version__",
    "compress",
    "load",
]
_MODULES = {
    "config.run": ("CalibrationConfig", "DatabaseConfig", "EvaluationConfig", "RunConfig", "SearchConfig"),
    "commands.compress": ("compress",),
    "commands.run_directory": ("Run", "load"),
    "types": ("DarwinError", "Genome", "SelectionStage", "UsageError"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
