"""A causal language model of a decoder that transformers has inside other models alone. Exports contain its source."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Base: Any = LlamaModel.__base__


class LlamaForCausalLM(Base, GenerationMixin):
    """A decoder and its output embedding, which transformers has inside other models alone."""

    config_class = LlamaConfig
    _tied_weights_keys: ClassVar[Any] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int = 0, **others: Any
    ) -> CausalLMOutputWithPast:
        output = self.model(input_ids=input_ids, **others)
        logits = self.lm_head(output.last_hidden_state[:, slice(-logits_to_keep or None, None)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states,
            attentions=output.attentions,
        )  # fmt: skip
