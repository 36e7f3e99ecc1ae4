# Llava around a pruned language model, written by darwinlm. It needs torch and transformers >= 5.0, nothing else.
"""A Llava whose language model has layers of different sizes, as `config.text_config` describes them."""

from typing import Any

from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from .modeling_pruned_llama import PrunedLlamaConfig, PrunedLlamaModel

AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel, exist_ok=True)  # by which Llava finds its language model


class PrunedLlavaConfig(LlavaConfig):
    """A `LlavaConfig` around the config of a pruned language model."""

    model_type = "pruned_llava"

    def __init__(self, text_config: Any = None, **others: Any):
        text = PrunedLlamaConfig(**text_config) if isinstance(text_config, dict) else text_config
        super().__init__(text_config=text, **others)


class PrunedLlavaModel(LlavaModel):
    """Language model and towers without the output embedding."""

    config_class = PrunedLlavaConfig


class PrunedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole."""

    config_class = PrunedLlavaConfig
