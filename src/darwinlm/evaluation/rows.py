"""The rows of a run's table: quality, speed and continuations of each model, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.config.run import EvaluationConfig
from darwinlm.evaluation.generation import continuations
from darwinlm.evaluation.quality import Quality, perplexity_and_kl
from darwinlm.evaluation.speed import speed
from darwinlm.model.size import parameter_count
from darwinlm.runtime.progress import track


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
