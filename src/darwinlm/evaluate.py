"""How good and how fast models are, side by side: perplexity, KL divergence, speed, and what they write."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from darwinlm.config.run import EvaluationConfig
from darwinlm.progress import track
from darwinlm.types import UsageError

CHUNK = 256  # tokens whose logits over the whole vocabulary exist at once
DECODE_PROMPT = 16  # tokens in the cache before decoding is timed


@dataclass(frozen=True)
class Quality:
    """Perplexity, and the KL divergence from the dense model in nats a token."""

    perplexity: float
    kl: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second, reading a prompt and writing one token at a time."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Row:
    """What is known of one model; the first row of a table is the dense model.

    Attributes:
        parameters: tied tensors count once.
        kl: KL(dense || model) in nats a token; 0 for the dense model itself.
        bytes: size of the checkpoint.
        continuations: each prompt with what the model makes of it.
        texts: its quality on further texts, by name.
    """

    model: str
    parameters: int
    perplexity: float
    kl: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bytes: int
    continuations: tuple[str, ...]
    texts: dict[str, Quality] = field(default_factory=dict)


def evaluate(
    models: Mapping[str, PreTrainedModel],
    token_ids: Int[Tensor, "sequences length"],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    sizes_in_bytes: Mapping[str, int],
    texts: Mapping[str, Int[Tensor, "_ length"]] | None = None,
) -> list[Row]:
    """One row a model, in the order given; the first model is the dense one.

    `token_ids` are held out: no stage has seen them. All of them are used, and all of the further `texts`.

    Raises:
        UsageError: if the sequences hold no two tokens or a prompt is empty.
    """
    qualities = perplexity_and_kl(models, token_ids)
    elsewhere = {text: perplexity_and_kl(models, ids) for text, ids in (texts or {}).items()}
    speeds = speed(models, token_ids, config)
    written = {
        name: continuations(model, tokenizer, config.prompts, config.continuation_tokens)
        for name, model in track(models.items(), "continuations", len(models))
    }
    return [
        Row(
            model=name,
            parameters=parameter_count(model),
            perplexity=qualities[name].perplexity,
            kl=qualities[name].kl,
            prefill_tokens_per_s=speeds[name].prefill_tokens_per_s,
            decode_tokens_per_s=speeds[name].decode_tokens_per_s,
            bytes=sizes_in_bytes[name],
            continuations=written[name],
            texts={text: found[name] for text, found in elsewhere.items()},
        )
        for name, model in models.items()
    ]


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes that the parameters of a model take, in memory and in a checkpoint."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text, of which those from `first` on count; what is before them is context."""

    token_ids: Int[Tensor, " length"]
    first: int = 1


def windows_over(stream: Int[Tensor, " tokens"], length: int, stride: int) -> list[Window]:
    """Windows of at most `length` tokens, each `stride` further on, in which no token counts twice.

    With `stride == length` they are disjoint, and the first token of each is predicted from nothing, so it does not
    count. With less, every token but the first of all counts, those after the first window with at least
    `length - stride` tokens before them.
    """
    windows, end = [], 0
    for start in range(0, len(stream), stride):
        window = Window(stream[start : start + length], max(1, end - start))
        if len(window.token_ids) > window.first:
            windows.append(window)
        end = start + length
        if end >= len(stream):
            break
    return windows


def perplexity_and_kl(
    models: Mapping[str, PreTrainedModel],
    token_ids: Int[Tensor, "sequences length"],
    kept: list[Tensor] | None = None,
) -> dict[str, Quality]:
    """Perplexity of every model, and its KL divergence from the first, over the same tokens in one pass.

    Every token but the first of a sequence is predicted from those before it.

    Args:
        kept: for many calls with one first model and the same tokens: the first call leaves that model's last hidden
            states in it, and the others read them.

    Raises:
        UsageError: if there are no sequences, or a sequence has fewer than two tokens.
    """
    sequences, length = token_ids.shape
    if sequences < 1 or length < 2:
        raise UsageError(
            f"too little held-out text: expected a sequence of at least 2 tokens, found {sequences} sequences of "
            f"{length} tokens; raise evaluation.tokens or give more text"
        )
    return quality_over(models, [Window(sequence) for sequence in token_ids], kept)


@torch.inference_mode()
def quality_over(
    models: Mapping[str, PreTrainedModel], windows: Sequence[Window], kept: list[Tensor] | None = None
) -> dict[str, Quality]:
    """Perplexity of every model, and its KL divergence from the first, over the tokens that count.

    Logits are made for `CHUNK` tokens of two models at a time; probabilities are float32 and sums float64 whatever the
    models' precision. `kept` is as for `perplexity_and_kl`.
    """
    first, *others = models
    loss, divergence = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    with _evaluation_mode(models.values()):
        for number, window in enumerate(track(windows, "perplexity and KL", len(windows))):
            inputs, targets = window.token_ids[:-1], window.token_ids[1:, None]
            hidden = {name: hidden_states(models[name], inputs) for name in others}
            if kept is None:
                hidden[first] = hidden_states(models[first], inputs)
            else:
                if number == len(kept):
                    kept.append(hidden_states(models[first], inputs))
                hidden[first] = kept[number]
            for start in range(window.first - 1, len(inputs), CHUNK):
                chunk = slice(start, start + CHUNK)
                dense = None
                for name, model in models.items():
                    log_probs = F.log_softmax(final_logits(model, hidden[name][chunk]).float(), dim=-1)
                    loss[name] -= log_probs.gather(1, targets[chunk].to(log_probs.device)).double().sum().item()
                    if dense is None:
                        dense = log_probs
                    else:
                        divergence[name] += _kl(dense.to(log_probs.device), log_probs)
    predicted = sum(len(window.token_ids) - window.first for window in windows)
    return {name: Quality(perplexity_of(loss[name] / predicted), divergence[name] / predicted) for name in models}


def _kl(dense: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]) -> float:
    """Summed over tokens; both are log-probabilities."""
    return F.kl_div(other, dense, reduction="none", log_target=True).sum(dtype=torch.float64).item()


def perplexity_of(loss: float) -> float:
    """Of a mean loss in nats a token; infinite where it is beyond float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def hidden_states(model: PreTrainedModel, token_ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens hidden"]:
    """What the model's head reads, for one sequence."""
    return model.base_model(input_ids=token_ids[None].to(model.device), use_cache=False).last_hidden_state[0]


def final_logits(model: PreTrainedModel, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
    """The logits of `hidden_states`, in the model's precision.

    The model's own forward makes them, around a backbone that hands `hidden` through. So the scaling or capping that a
    family does after its head (Granite, Cohere, Gemma 2) is done here too, and no list of families has to say so.
    """
    around = copy.copy(model)
    around._modules = model._modules | {model.base_model_prefix: _HandThrough()}
    return around(inputs_embeds=hidden[None], use_cache=False).logits[0]


class _HandThrough(nn.Module):
    @property
    def decoder(self) -> _HandThrough:
        """Which some families call instead of the backbone around it (OPT)."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


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
    with _evaluation_mode(models.values()):
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
    _next_token(model, prompt)
    return _now(model) - start


def _decode_seconds(model: PreTrainedModel, prompt: Int[Tensor, "1 length"], steps: int) -> float:
    token, cache = _next_token(model, prompt.to(model.device))
    start = _now(model)
    for _ in range(steps):
        token, cache = _next_token(model, token, cache)
    return _now(model) - start


def _now(model: PreTrainedModel) -> float:
    """Seconds, once the model's device has done all it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> tuple[str, ...]:
    """Each prompt with at most `new_tokens` more tokens, the likeliest at every step.

    Plain greedy decoding: what a checkpoint's generation config says of sampling or repetition penalties does not
    count, but its end-of-text tokens do. Prompt and continuation are decoded together, because a tokenizer may drop the
    space between two texts that it decodes apart.

    Raises:
        UsageError: if a prompt has no tokens.
    """
    result: list[str] = []
    with _evaluation_mode([model]):
        for prompt in prompts:
            ids: list[int] = tokenizer(prompt)["input_ids"]
            if not ids:
                raise UsageError("evaluation.prompts holds an empty prompt; give it a word, or leave it out")
            result.append(str(tokenizer.decode(ids + greedy(model, ids, new_tokens), skip_special_tokens=True)))
    return tuple(result)


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """At most `new_tokens` tokens after a prompt, the likeliest at every step, up to an end-of-text token."""
    ends = _end_tokens(model)
    result: list[int] = []
    token, cache = torch.tensor([prompt], device=model.device), None
    while len(result) < new_tokens:
        token, cache = _next_token(model, token, cache)
        result.append(int(token.item()))
        if result[-1] in ends:
            break
    return result


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = (model.generation_config or model.config).eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def _next_token(
    model: PreTrainedModel, token_ids: Int[Tensor, "1 length"], cache: Cache | None = None
) -> tuple[Int[Tensor, "1 1"], Cache]:
    """The likeliest token after `token_ids`, and the cache that now holds them."""
    output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(dim=-1), output.past_key_values


@contextmanager
def _evaluation_mode(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which would switch the cache off; afterwards all is as it was."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
