"""vLLM itself serves an export, where `benchmarks/serving.py` has made its environment; it never is made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from serving_models import PROMPTS, expected, prepare
from vllm_server import Server, vllm_python

from darwinlm.export.vllm import check_vllm

PYTHON = vllm_python(build=False)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs the environment that benchmarks/serving.py makes, of 3.4 GB")
def test_vllm_gives_the_greedy_tokens_of_transformers(tmp_path: Path) -> None:
    """An uneven export in which an attention and an MLP of zeros take the place of what is gone."""
    assert PYTHON is not None
    directory = prepare("llama-gqa", tmp_path) / "stubs"
    assert check_vllm(directory) == []
    wanted = expected(directory)
    with Server(PYTHON, directory, "--enforce-eager") as server:
        assert [server.tokens(prompt, len(tokens)) for prompt, tokens in zip(PROMPTS, wanted, strict=True)] == wanted
        assert server.architecture() == "TransformersForCausalLM"
