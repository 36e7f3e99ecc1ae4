"""Low-rank adapters (LoRA, by peft): added before a training, merged into the weights after it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from darwinlm.config.training import TrainingConfig


def add_adapters(model: PreTrainedModel, config: TrainingConfig) -> nn.Module:
    """The model with an adapter of rank `lora_rank` in each linear module of its blocks; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's own, about names in transformers
        return get_peft_model(model, adapters)  # pyright: ignore[reportArgumentType]


def merge_adapters(model: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """The model with the adapters of a checkpoint added to its weights."""
    from peft import PeftModel

    untrained: Any = model
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        trained: Any = PeftModel.from_pretrained(untrained, checkpoint).merge_and_unload()
    return trained
