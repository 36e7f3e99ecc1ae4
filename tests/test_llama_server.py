"""llama-server answers over HTTP, to several clients at once, with the greedy tokens of the model in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llama_cpp
from darwinlm.export.gguf import export_gguf
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from llama_cpp import needs_llama_cpp
from test_export_gguf import exports  # noqa: F401
from test_export_gguf_bits import wide  # noqa: F401

PROMPTS = [list(range(20, 32)), [100, 50, 7, 9, 200, 11], list(range(40, 80))]
NEW_TOKENS, END = 24, 0
TIE = 0.05  # between log-probabilities: llama.cpp rounds activations to 16 bits, which decides below it


@torch.inference_mode()
def shortfall(directory: Path, prompt: list[int], tokens: list[int]) -> float:
    """By how much the model, its matrices in float16, likes another token better, where that is most."""
    model = load(directory)
    for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
        matrix.data = matrix.half().float()
    log_probs = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    log_probs[:, END] = -torch.inf
    return (log_probs.max(-1).values - log_probs[range(len(tokens)), tokens]).max().item()


def sharpen(directory: Path, out: Path) -> Path:
    """The model with logits eight times as far apart, so that rounding decides no token."""
    model: Any = load(directory)
    model.get_output_embeddings().weight.data *= 8
    model.save_pretrained(out)
    Checkpoint(directory).tokenizer.save_pretrained(out)
    return out


@pytest.mark.slow
@needs_llama_cpp
def test_llama_server_gives_the_models_greedy_tokens(
    exports: dict[str, Path],  # noqa: F811
    wide: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Those of transformers for f16, those of llama.cpp without a server for four bits."""
    uneven = ("llama-untied", "qwen3-tied")
    files = {name: export_gguf(exports[name], tmp_path / f"{name}.gguf", "f16") for name in uneven}
    few = {"few": export_gguf(sharpen(wide, tmp_path / "wide"), tmp_path / "few.gguf", "q4_k_m")}
    served = llama_cpp.served(files | few, PROMPTS, tmp_path, NEW_TOKENS)
    for index, prompt in enumerate(PROMPTS):
        assert {len(served[name][index]) for name in served} == {NEW_TOKENS}
        assert max(shortfall(exports[name], prompt, served[name][index]) for name in uneven) < TIE
        assert llama_cpp.answers(few, prompt, tmp_path, 1, NEW_TOKENS)["few"].tokens == served["few"][index]
