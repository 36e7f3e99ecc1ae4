"""Real llama.cpp, in a process of its own: what it makes of a prompt, and how it splits a text into tokens."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp, a prebuilt llama.cpp"
)

PATIENCE = 120.0  # seconds

# Runs apart, for llama.cpp ends the process when it asserts. Reads and writes JSON.
SCRIPT = """
import json, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
import xllamacpp as llama

def run(job):
    params = llama.CommonParams()
    params.model.path = job["file"]
    params.n_ctx, params.n_parallel, params.warmup = 512, len(job.get("prompts", [0])), False
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 1
    server = llama.Server(params)
    if "texts" in job:
        return [tokenize(server.listening_address, text) for text in job["texts"]]
    if "prompts" in job:
        ask = partial(complete, server.listening_address, job["tokens"])
        with ThreadPoolExecutor(len(job["prompts"])) as pool:
            return list(pool.map(ask, job["prompts"]))
    wanted = {"prompt": job["prompt"], "n_predict": job["tokens"], "temperature": 0.0, "n_probs": job["probabilities"],
              "ignore_eos": True, "cache_prompt": False}
    return server.handle_completions(wanted)

def post(address, path, body):
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))

def tokenize(address, text):
    return post(address, "/tokenize", {"content": text, "add_special": True})["tokens"]

def complete(address, count, prompt):
    wanted = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "ignore_eos": True, "return_tokens": True}
    return post(address, "/completion", wanted)["tokens"]

json.dump([run(job) for job in json.load(sys.stdin)], open(sys.argv[1], "w"))
"""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a prompt: its greedy tokens, and the log-probabilities of all tokens at each of them."""

    tokens: list[int]
    log_probs: list[dict[int, float]]
    prompt_tokens: int


def answers(
    files: Mapping[str, Path], prompt: Any, tmp_path: Path, probabilities: int, tokens: int
) -> dict[str, Answer]:
    """What every file answers to a prompt, a text or token ids."""
    found = _run(files, tmp_path, {"prompt": prompt, "tokens": tokens, "probabilities": probabilities})
    return {name: _answer(completion) for name, completion in found.items()}


def _answer(found: Mapping[str, Any]) -> Answer:
    places = found["choices"][0]["logprobs"]["content"]
    log_probs = [{top["id"]: top["logprob"] for top in place["top_logprobs"]} for place in places]
    return Answer([place["id"] for place in places], log_probs, found["usage"]["prompt_tokens"])


def token_ids(files: Mapping[str, Path], texts: Sequence[str], tmp_path: Path) -> dict[str, list[list[int]]]:
    """How every file's vocabulary splits the texts."""
    return _run(files, tmp_path, {"texts": list(texts)})


def served(
    files: Mapping[str, Path], prompts: Sequence[Sequence[int]], tmp_path: Path, tokens: int
) -> dict[str, list[list[int]]]:
    """The greedy tokens after every prompt, all asked of one llama-server at once, over HTTP."""
    return _run(files, tmp_path, {"prompts": [list(prompt) for prompt in prompts], "tokens": tokens})


def _run(files: Mapping[str, Path], tmp_path: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    out = tmp_path / "answers.json"
    jobs = [{"file": str(file), **job} for file in files.values()]
    command = [sys.executable, "-c", SCRIPT, str(out)]
    given: dict[str, Any] = {"input": json.dumps(jobs), "capture_output": True, "text": True, "timeout": PATIENCE}
    try:
        result = subprocess.run(command, **given, check=False)
    except subprocess.TimeoutExpired:  # on a loaded machine its server once never answered
        result = subprocess.run(command, **given, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(zip(files, json.loads(out.read_text()), strict=True))


@torch.inference_mode()
def difference(
    model: PreTrainedModel, prompt: list[int], answer: Answer, ends: tuple[int, ...] = (0,)
) -> tuple[int, float]:
    """Tokens in which the model agrees with llama.cpp, and the largest difference of a log-probability.

    llama.cpp was told not to choose those that end a text.
    """
    token_ids = torch.tensor([prompt + answer.tokens])
    log_probs = model(token_ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    ending = log_probs.new_zeros(log_probs.shape[1])
    ending[list(ends)] = -torch.inf
    agreed = int(((log_probs + ending).argmax(-1) == torch.tensor(answer.tokens)).sum())
    largest = 0.0
    for row, places in zip(log_probs, answer.log_probs, strict=True):
        found = torch.tensor(list(places.values()))
        largest = max(largest, (row[list(places)] - found).abs().max().item())
    return agreed, largest
