"""The Trainer's arguments for a training on the device that this process computes on."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from darwinlm.config.training import TrainConfig
from darwinlm.runtime import parallel
from darwinlm.types import UsageError

_ACCELERATE = "ACCELERATE_TORCH_DEVICE"  # by which accelerate is told its device


def arguments_on(device: torch.device, **arguments: Any) -> TrainingArguments:
    """Return the Trainer's arguments for a device. Of several processes, each gets the GPU of its number instead.

    Left alone, transformers takes `cuda:0` whatever the device is, and where one process sees several GPUs all of them
    at once (`nn.DataParallel`), each with a micro-batch of its own.
    """
    if parallel.processes() > 1:
        return TrainingArguments(**arguments)
    before = os.environ.get(_ACCELERATE)
    os.environ[_ACCELERATE] = str(device)
    try:
        result = TrainingArguments(**arguments)
    finally:
        del os.environ[_ACCELERATE]
        if before is not None:
            os.environ[_ACCELERATE] = before
    result.__dict__["_setup_devices"] = device  # a cached property
    result._n_gpu = min(result._n_gpu, 1)
    return result


# Gradients are reduced after every batch, so that what is kept of them in float32 is sharded too.
SHARDING = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
}


def training_arguments(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, checkpoints: Path, resumed: bool
) -> TrainingArguments:
    """Return the Trainer's arguments for a training.

    Args:
        dtype: precision of the forward pass.
        checkpoints: the directory in which checkpoints are kept.
        resumed: whether the training goes on from one of them.
    """
    training, low = config.training, dtype == torch.bfloat16
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if low else "no"  # which a launcher may have set otherwise
    return arguments_on(
        device,
        output_dir=str(checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=accumulation(config),
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=training.max_gradient_norm,
        bf16=low,
        **(_activation_checkpointing() if training.gradient_checkpointing else {}),
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=training.evaluate_every,
        eval_on_start=not resumed,
        save_steps=training.save_every,
        save_total_limit=2,
        seed=config.seed,
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        **(SHARDING if is_sharded(config) else {}),
    )


def accumulation(config: TrainConfig) -> int:
    """Forward passes of one process in a step. Raises `UsageError` unless they make up the batch."""
    together = config.training.micro_batch_size * parallel.processes()
    if config.training.batch_size % together:
        raise UsageError(
            f"--training.batch-size: expected a multiple of {together} ({parallel.processes()} processes with "
            f"{config.training.micro_batch_size} sequences at a time), found {config.training.batch_size}; "
            "change it or --training.micro-batch-size"
        )
    return config.training.batch_size // together


def is_sharded(config: TrainConfig) -> bool:
    """Return whether weights, gradients and moments are split among processes."""
    return config.training.fsdp and parallel.processes() > 1


def _activation_checkpointing() -> dict[str, Any]:
    """The arguments by their name in the transformers that is installed: it has changed within 5."""
    names = {field.name for field in fields(TrainingArguments)}
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
