"""The HTML report of a training, from what it has logged and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from darwinlm.commands.run_directory import TRAIN_SETTINGS
from darwinlm.config.run import EvaluationConfig
from darwinlm.config.training import TrainConfig
from darwinlm.evaluation.generation import continuations
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.licence import licence_of
from darwinlm.model.reading import load
from darwinlm.report.html import write_page
from darwinlm.report.training_page import TrainingFacts, lead, sections
from darwinlm.runtime.names import short_name
from darwinlm.training.directory import Training

Texts = tuple[str, ...]


def what_it_writes(training: Training, checkpoint: Checkpoint, device: torch.device) -> dict[str, Texts]:
    """Return what the untrained and the trained model make of the usual prompts; one of them is loaded at a time."""
    usual = EvaluationConfig()

    def written(model: Any) -> Texts:
        return continuations(model.to(device), checkpoint.tokenizer, usual.prompts, usual.continuation_tokens)

    before = written(checkpoint.load(checkpoint.dtype, device))
    return {"before": before, "after": written(load(training.exported))}


def write_training_page(
    page: Path,
    config: TrainConfig,
    checkpoint: Checkpoint,
    settings: Mapping[str, str],
    provenance: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    figures: tuple[Mapping[str, float], Mapping[str, float]],
    written: Mapping[str, Texts],
) -> None:
    """Write the page.

    Args:
        checkpoint: the model that was trained.
        settings: the settings of the training, for people.
        provenance: the hashes of model, teacher and text.
        log: lines with a step and what was measured there.
        figures: held-out figures before and after the training.
        written: what the model wrote before and after it; may be empty.
    """
    hashes = {f"SHA-256 of the {what}": provenance[what] for what in ("model", "teacher", "text") if provenance[what]}
    licence = licence_of(checkpoint.path)
    named = {"Licence of the model": ", ".join(licence.values()) or "its card names none"}
    before, after = figures
    facts = TrainingFacts(
        title=f"{short_name(config.model)}, trained",
        log=log,
        before=before,
        after=after,
        written=written,
        settings=settings,
        provenance=hashes | named,
        recipe=(page.parent / TRAIN_SETTINGS).read_text(encoding="utf-8"),
    )
    write_page(page, facts.title, lead(facts), sections(facts))
