# Llava around a pruned language model, written by darwinlm. It needs torch and transformers >= 5.0, nothing else.
"""A Llava whose language model has layers of different sizes, as `config.text_config` describes them."""

from typing import Any

from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel

from .modeling_pruned_llama import PrunedLlamaConfig, PrunedLlamaModel

AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel, exist_ok=True)  # by which Llava finds its language model


class PrunedLlavaConfig(LlavaConfig):
    """A `LlavaConfig` around the config of a pruned language model."""

    model_type = "pruned_llava"

    def __init__(self, text_config: Any = None, **others: Any):
        text = PrunedLlamaConfig(**text_config) if isinstance(text_config, dict) else text_config
        super().__init__(text_config=text, **others)


class WithPrunedText(PreTrainedModel):
    """A stock model whose language model is replaced before weights are loaded, unless its config led to it."""

    config_class = PrunedLlavaConfig

    def __init__(self, config: PrunedLlavaConfig):
        super().__init__(config)
        text: Any = config.text_config
        for path, module in list(self.named_modules()):
            if type(module) is PrunedLlamaModel.__base__:
                self.set_submodule(path, PrunedLlamaModel(text))
        self.post_init()


class PrunedLlavaModel(WithPrunedText, LlavaModel):
    """Language model and towers without the output embedding."""


class PrunedLlavaForConditionalGeneration(WithPrunedText, LlavaForConditionalGeneration):
    """The whole."""
