"""The Trainer's arguments for the device that this process computes on."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments

from darwinlm.runtime import parallel

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
