"""vLLM itself serves an export, where `benchmarks/serving.py` has made its environment; it never is made here."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from darwinlm.export.vllm import check_vllm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
models: Any = import_module("serving_models")  # of a benchmark
vllm: Any = import_module("vllm_server")

PYTHON = vllm.vllm_python(build=False)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(PYTHON is None, reason="needs the environment that benchmarks/serving.py makes, of 3.4 GB")
def test_vllm_gives_the_greedy_tokens_of_transformers(tmp_path: Path) -> None:
    """An uneven export in which an attention and an MLP of zeros take the place of what is gone."""
    assert PYTHON is not None
    directory = models.prepare("llama-gqa", tmp_path) / "stubs"
    assert check_vllm(directory) == []
    wanted = models.expected(directory)
    with vllm.Server(PYTHON, directory, "--enforce-eager") as server:
        assert [
            server.tokens(prompt, len(tokens)) for prompt, tokens in zip(models.PROMPTS, wanted, strict=True)
        ] == wanted
        assert server.architecture() == "TransformersForCausalLM"
