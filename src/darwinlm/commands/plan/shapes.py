"""Shapes of published models, from which a plan can be made without a network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PretrainedConfig

TABLE = Path(__file__).parent / "shapes.yaml"


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """The fields of the configs, by the model's hub id."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def shape_of(model: str) -> PretrainedConfig | None:
    """Return the config of a published model, by its hub id or the end of it in any case, or None if it is no such."""
    known = {name.lower(): name for name in shapes()}
    known |= {name.rpartition("/")[2].lower(): name for name in shapes()}
    if model.lower() not in known:
        return None
    fields = dict(shapes()[known[model.lower()]])
    return AutoConfig.for_model(fields.pop("model_type"), **fields, dtype=torch.bfloat16)
