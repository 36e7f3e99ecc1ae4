"""The speed of models, measured side by side, and the speed that counting operations and bytes predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from darwinlm.config.evaluation import SpeedConfig
from darwinlm.config.run import EvaluationConfig
from darwinlm.evaluation.generation import next_token
from darwinlm.evaluation.quality import evaluation_mode
from darwinlm.model.families import block_sizes_of
from darwinlm.model.layers import head_dim
from darwinlm.model.size import parameter_bytes
from darwinlm.runtime import timing
from darwinlm.runtime.peaks import Peaks, held
from darwinlm.runtime.timing import Ratio


@dataclass(frozen=True)
class Measured:
    """The measured speed and memory of one model.

    Attributes:
        first_token_s: seconds from the prompt to the first new token, which is all of prefill.
        prefill_seconds, decode_seconds: those of every turn.
        peak_bytes: the highest memory while the model runs, weights included; None where the system does not report it.
        cache_bytes: the size of the keys and values at the end.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    peak_bytes: int | None
    cache_bytes: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Counted:
    """The operations and bytes that reading a prompt and writing one token take, by counting.

    Attributes:
        prefill_flops: the operations for all prompts, with logits for their last tokens only.
        decode_bytes: the weights and the cached keys and values that one token reads, halfway through the new tokens.
    """

    prefill_flops: float
    decode_bytes: float


@torch.inference_mode()
def measure(models: Mapping[str, PreTrainedModel], config: SpeedConfig) -> dict[str, Measured]:
    """Time every model on the same random tokens; the models take turns."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (config.batch, config.prompt_tokens), generator=generator)
    works = {name: partial(_turn, model, prompts.to(model.device), config.new_tokens) for name, model in models.items()}
    with evaluation_mode(models.values()):
        turns = timing.alternate(works, config.repeats, "speed")
    return {name: _summary(models[name], turns[name], config) for name in models}


class _Seconds(NamedTuple):
    """Seconds from the prompt to the first new token, and seconds of all further tokens."""

    first_token: float
    further_tokens: float


@dataclass(frozen=True)
class _Turn:
    """The time and memory of one turn of a model."""

    seconds: _Seconds
    extra_bytes: int | None
    cache_bytes: int


def _turn(model: PreTrainedModel, prompts: Int[Tensor, "batch length"], new_tokens: int) -> _Turn:
    on_gpu = model.device.type == "cuda"
    before = torch.cuda.memory_allocated(model.device) if on_gpu else held()
    with Peaks(model.device) as peaks:
        seconds, cache = _generate(model, prompts, new_tokens)
    extra = peaks.device - before if on_gpu else peaks.host - before if peaks.exact else None
    return _Turn(seconds, extra, _cache_bytes(cache))


def _generate(model: PreTrainedModel, prompts: Int[Tensor, "batch length"], new_tokens: int) -> tuple[_Seconds, Cache]:
    """Read the prompts, write `new_tokens` further tokens after the first one, and time both."""
    start = timing.now(model.device)
    token, cache = next_token(model, prompts)
    first = timing.now(model.device)
    for _ in range(new_tokens):
        token, cache = next_token(model, token, cache)
    return _Seconds(first - start, timing.now(model.device) - first), cache


def _summary(model: PreTrainedModel, turns: list[_Turn], config: SpeedConfig) -> Measured:
    prefill = tuple(turn.seconds.first_token for turn in turns)
    decode = tuple(turn.seconds.further_tokens for turn in turns)
    extra = [turn.extra_bytes for turn in turns if turn.extra_bytes is not None]
    return Measured(
        prefill_tokens_per_s=config.batch * config.prompt_tokens / median(prefill),
        decode_tokens_per_s=config.batch * config.new_tokens / median(decode),
        first_token_s=median(prefill),
        peak_bytes=parameter_bytes(model) + max(extra) if extra else None,
        cache_bytes=turns[-1].cache_bytes,
        prefill_seconds=prefill,
        decode_seconds=decode,
    )


def _cache_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values of all layers that have any."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(model: PreTrainedModel, config: SpeedConfig) -> Counted:
    """Count what the model has to compute and to read, from the sizes of its blocks and weights."""
    sizes = block_sizes_of(model)
    widths = [head_dim(model.config, index) for index in range(len(sizes))]
    linears = [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    linear: Any = model.get_output_embeddings()
    output_embedding: Tensor = linear.weight
    length = config.prompt_tokens
    # Causal attention: a token looks at half of the others, in two products.
    pairs = list(zip(sizes, widths, strict=True))
    scores = sum(2 * 2 * block.query_heads * width * length * length / 2 for block, width in pairs)
    prompt = length * sum(2 * weight.numel() for weight in linears) + scores + 2 * output_embedding.numel()
    read = sum(weight.numel() * weight.element_size() for weight in [*linears, output_embedding])
    cached = length + config.new_tokens / 2
    cache = sum(2 * block.key_value_heads * width * cached for block, width in pairs) * output_embedding.element_size()
    return Counted(config.batch * prompt, read + config.batch * cache)


DECODE_PROMPT = 16  # tokens in the cache before decoding is timed


@dataclass(frozen=True)
class Speed:
    """Tokens a second in reading a prompt, and in writing one token at a time, also beside the first model's."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_ratio: Ratio
    decode_ratio: Ratio


@torch.inference_mode()
def speed(
    models: Mapping[str, PreTrainedModel], token_ids: Int[Tensor, "sequences length"], config: EvaluationConfig
) -> dict[str, Speed]:
    """Return the prefill and decode speed of every model, one sequence at a time.

    The models take turns, and the median of `config.repeats` turns counts. The prompt is the beginning of `token_ids`,
    repeated where it is too short. Decoding starts from a short prompt of its own.
    """
    text = token_ids.flatten()
    text = text.repeat(math.ceil(max(config.speed_tokens, DECODE_PROMPT) / len(text)))[None]
    works = {name: partial(_short_turn, model, text.to(model.device), config) for name, model in models.items()}
    with evaluation_mode(models.values()):
        turns = timing.alternate(works, config.repeats, "speed")
    seconds = {name: list(zip(*turns_of, strict=True)) for name, turns_of in turns.items()}
    first = next(iter(seconds.values()))
    return {
        name: Speed(
            config.speed_tokens / median(prefill),
            config.decode_tokens / median(decode),
            Ratio.of(first[0], prefill),
            Ratio.of(first[1], decode),
        )
        for name, (prefill, decode) in seconds.items()
    }


def _short_turn(model: PreTrainedModel, text: Int[Tensor, "1 length"], config: EvaluationConfig) -> tuple[float, float]:
    """Return the seconds of prefill, and those of decoding after a short prompt."""
    prefill, _ = _generate(model, text[:, : config.speed_tokens], 0)
    decode, _ = _generate(model, text[:, :DECODE_PROMPT], config.decode_tokens)
    return prefill.first_token, decode.further_tokens
