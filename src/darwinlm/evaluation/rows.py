"""The rows of a run's table: quality, speed and continuations of each model, measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.config.run import EvaluationConfig
from darwinlm.data.corpus import Drawn
from darwinlm.evaluation.answering import Answers, answer
from darwinlm.evaluation.generation import continuations
from darwinlm.evaluation.prompts import chat_prompts
from darwinlm.evaluation.quality import ByBlock, Quality, perplexity_and_kl
from darwinlm.evaluation.speed import speed
from darwinlm.model.size import parameter_count
from darwinlm.runtime.progress import track
from darwinlm.runtime.timing import Ratio

ANSWERS = 8  # written at a time


@dataclass(frozen=True)
class Row:
    """The figures of one model; the first row of a table is the dense model.

    Attributes:
        parameters: the number of parameters; tied tensors count once.
        kl: KL(dense || model) in nats a token; 0 for the dense model itself.
        prefill_ratio, decode_ratio: the speeds as multiples of the dense model's.
        bytes: the size of the checkpoint.
        continuations: each prompt, followed by the model's continuation.
        texts: the model's quality on further texts, by name.
        parts: the names among them that are of a mixture's parts.
        answers: its answers to chat prompts, if they were asked for.
    """

    model: str
    parameters: int
    perplexity: float
    kl: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_ratio: Ratio
    decode_ratio: Ratio
    bytes: int
    continuations: tuple[str, ...]
    texts: dict[str, Quality] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    answers: Answers | None = None


def evaluate(
    models: Mapping[str, PreTrainedModel],
    token_ids: Int[Tensor, "sequences length"],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    sizes_in_bytes: Mapping[str, int],
    texts: Mapping[str, Drawn] | None = None,
    by_block: Callable[[str], ByBlock] | None = None,
    counts: Bool[Tensor, "sequences length"] | None = None,
) -> list[Row]:
    """Return a row for each model, in the order given; the first model is the dense one.

    No stage may have seen `token_ids`. All of them are used, and so are all of the further `texts`.

    Args:
        by_block: gives the blocks of a model by its name, with which perplexity and KL are then measured. It is called
            after everything else, for it may move what a model has beside its blocks to another device.
        counts: for each token of `token_ids`, whether the prediction after it counts; if None, all do.

    Raises:
        UsageError: if the sequences have fewer than two tokens, or a prompt is empty.
    """
    speeds = speed(models, token_ids, config)
    written = {
        name: continuations(model, tokenizer, config.prompts, config.continuation_tokens)
        for name, model in track(models.items(), "continuations", len(models))
    }
    answers = {name: answers_of(model, tokenizer, config) for name, model in models.items()}
    blocks = {name: by_block(name) for name in models} if by_block is not None else {}
    qualities = perplexity_and_kl(models, token_ids, blocks=blocks, counts=counts)
    further = {
        text: perplexity_and_kl(models, judged.ids, blocks=blocks, counts=judged.counts)
        for text, judged in (texts or {}).items()
    }
    return [
        Row(
            model=name,
            parameters=parameter_count(model),
            perplexity=qualities[name].perplexity,
            kl=qualities[name].kl,
            prefill_tokens_per_s=speeds[name].prefill_tokens_per_s,
            decode_tokens_per_s=speeds[name].decode_tokens_per_s,
            prefill_ratio=speeds[name].prefill_ratio,
            decode_ratio=speeds[name].decode_ratio,
            bytes=sizes_in_bytes[name],
            continuations=written[name],
            texts={text: by_model[name] for text, by_model in further.items()},
            answers=answers[name],
        )
        for name, model in models.items()
    ]


def answers_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig) -> Answers | None:
    """A model's answers to the chat prompts that the settings name, if they do. Raises as `prompts_of`."""
    prompts = prompts_of(tokenizer, model.config, config)
    return answer(model, tokenizer, prompts, config.answer_tokens, ANSWERS) if prompts else None


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig, config: EvaluationConfig
) -> list[list[int]]:
    """The chat prompts that the settings name, if they do, without those that leave no room for an answer.

    Raises:
        UsageError: as `chat_prompts`.
    """
    if config.chat is None:
        return []
    return chat_prompts(config.chat, tokenizer, model, config.chat_prompts, config.answer_tokens, "evaluation.chat")
