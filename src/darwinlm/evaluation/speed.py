"""How fast models are, side by side, and how fast counting says that they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from darwinlm.config.evaluation import SpeedConfig
from darwinlm.config.run import EvaluationConfig
from darwinlm.evaluation.generation import next_token
from darwinlm.evaluation.quality import evaluation_mode
from darwinlm.model.families import head_dim
from darwinlm.model.pruned import block_sizes_of
from darwinlm.model.size import parameter_bytes
from darwinlm.runtime.progress import track

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


RESET_PEAK = "5"  # written to CLEAR: Linux forgets the highest memory so far


@dataclass(frozen=True)
class Measured:
    """What one model takes.

    Attributes:
        first_token_s: seconds from the prompt to the first new token; all of prefill.
        peak_bytes: memory while it runs, weights included; None where the system does not say.
        cache_bytes: keys and values in the end.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    peak_bytes: int | None
    cache_bytes: int


@dataclass(frozen=True)
class Counted:
    """What reading a prompt and writing one token takes, by counting.

    Attributes:
        prefill_flops: operations for all prompts, the head for their last tokens only.
        decode_bytes: weights and cached keys and values that are read for one token, halfway through the new tokens.
    """

    prefill_flops: float
    decode_bytes: float


@torch.inference_mode()
def measure(models: Mapping[str, PreTrainedModel], config: SpeedConfig, seed: int = 0) -> dict[str, Measured]:
    """Time every model on the same random tokens.

    The models take turns (A B C A B C ...), so that what slows the machine for a while slows them all; the first turn
    warms up.
    """
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocabulary, (config.batch, config.prompt_tokens), generator=generator)
    turns: dict[str, list[_Turn]] = {name: [] for name in models}
    order = [(turn, name) for turn in range(config.repeats + 1) for name in models]
    for turn, name in track(order, "speed", len(order)):
        taken = _turn(models[name].eval(), prompts, config.new_tokens)
        if turn > 0:
            turns[name].append(taken)
    return {name: _summary(models[name], found, config) for name, found in turns.items()}


@dataclass(frozen=True)
class _Turn:
    first_token_s: float
    decode_s: float
    extra_bytes: int | None
    cache_bytes: int


def _turn(model: PreTrainedModel, prompts: Int[Tensor, "batch length"], new_tokens: int) -> _Turn:
    added = _added_memory(model.device)
    start = _now(model)
    token, cache = _next(model, prompts.to(model.device), None)
    first = _now(model)
    for _ in range(new_tokens):
        token, cache = _next(model, token, cache)
    end = _now(model)
    return _Turn(first - start, end - first, added(), _cache_bytes(cache))


def _next(model: PreTrainedModel, token_ids: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(dim=-1), output.past_key_values


def _now(model: PreTrainedModel) -> float:
    """Seconds, once the model's device has done all it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return perf_counter()


def _summary(model: PreTrainedModel, turns: list[_Turn], config: SpeedConfig) -> Measured:
    first = median(turn.first_token_s for turn in turns)
    decode = median(turn.decode_s for turn in turns)
    extra = [turn.extra_bytes for turn in turns if turn.extra_bytes is not None]
    return Measured(
        prefill_tokens_per_s=config.batch * config.prompt_tokens / first,
        decode_tokens_per_s=config.batch * config.new_tokens / decode,
        first_token_s=first,
        peak_bytes=parameter_bytes(model) + max(extra) if extra else None,
        cache_bytes=turns[-1].cache_bytes,
    )


def _cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values of every layer that has some."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _added_memory(device: torch.device) -> Callable[[], int | None]:
    """What memory will have been added at most, from now to when the result is called."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    try:
        CLEAR.write_text(RESET_PEAK)
        before = _status("VmRSS")
    except OSError:
        return lambda: None
    return lambda: _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of this process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def count(model: PreTrainedModel, config: SpeedConfig) -> Counted:
    """What the model has to compute and to read, from the sizes of its blocks and weights."""
    sizes = block_sizes_of(model.config)
    width = head_dim(model.config)
    linears = [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    output: Any = model.get_output_embeddings()
    head: Tensor = output.weight
    length = config.prompt_tokens
    # Causal attention: a token looks at half of the others, in two products.
    scores = sum(2 * 2 * block.query_heads * width * length * length / 2 for block in sizes)
    each = length * sum(2 * weight.numel() for weight in linears) + scores + 2 * head.numel()
    read = sum(weight.numel() * weight.element_size() for weight in [*linears, head])
    cached = length + config.new_tokens / 2
    cache = sum(2 * block.key_value_heads * width * cached for block in sizes) * head.element_size()
    return Counted(config.batch * each, read + config.batch * cache)


DECODE_PROMPT = 16  # tokens in the cache before decoding is timed


@dataclass(frozen=True)
class Speed:
    """Tokens a second, reading a prompt and writing one token at a time."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@torch.inference_mode()
def speed(
    models: Mapping[str, PreTrainedModel], token_ids: Int[Tensor, "sequences length"], config: EvaluationConfig
) -> dict[str, Speed]:
    """Prefill and decode speed of every model, one sequence at a time.

    The models take turns (A B C A B C ...), so that what slows the machine for a while slows them all; the first turn
    warms up, and the median of `config.repeats` others counts. The prompt is the beginning of `token_ids`, again and
    again where it is too short.
    """
    text = token_ids.flatten()
    text = text.repeat(math.ceil(max(config.speed_tokens, DECODE_PROMPT) / len(text)))
    prompts = {name: text[None, : config.speed_tokens].to(model.device) for name, model in models.items()}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    turns = [(turn, name) for turn in range(config.repeats + 1) for name in models]
    with evaluation_mode(models.values()):
        for turn, name in track(turns, "speed", len(turns)):
            taken = (
                _prefill_seconds(models[name], prompts[name]),
                _decode_seconds(models[name], text[None, :DECODE_PROMPT], config.decode_tokens),
            )
            if turn > 0:
                prefill[name].append(taken[0])
                decode[name].append(taken[1])
    return {
        name: Speed(config.speed_tokens / median(prefill[name]), config.decode_tokens / median(decode[name]))
        for name in models
    }


def _prefill_seconds(model: PreTrainedModel, prompt: Int[Tensor, "1 length"]) -> float:
    start = _now(model)
    next_token(model, prompt)
    return _now(model) - start


def _decode_seconds(model: PreTrainedModel, prompt: Int[Tensor, "1 length"], steps: int) -> float:
    token, cache = next_token(model, prompt.to(model.device))
    start = _now(model)
    for _ in range(steps):
        token, cache = next_token(model, token, cache)
    return _now(model) - start
