# Llama with layers of different sizes, written by darwinlm. It needs torch and transformers >= 5.0, nothing else.
"""A Llama whose decoder layers differ in query heads, KV heads and MLP width, and may lack their attention or MLP.

`config.per_layer_config[i]` describes layer `i`: its `num_attention_heads`, `num_key_value_heads` and
`intermediate_size`, and under `skip` the parts that it lacks, "attention" or "mlp". A size that is missing there is as
in the config, whose own sizes are those of the model before pruning. A layer without a part lacks the part's norm too.
"""

import copy
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import StaticLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

if int(transformers.__version__.split(".")[0]) < 5:  # it would ignore `rope_parameters` and compute wrong logits
    raise ImportError(f"expected transformers 5.0 or newer, found {transformers.__version__}; install a newer one")

LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class PrunedLlamaConfig(LlamaConfig):
    """A `LlamaConfig` in which each layer may have sizes of its own."""

    model_type = "pruned_llama"

    def __getattribute__(self, key: str) -> Any:
        # transformers >= 5.14 warns or raises when code reads a size of the model whose layers have their own.
        if key in LAYER_SIZES:
            return object.__getattribute__(self, key)
        return super().__getattribute__(key)

    def layer(self, index: int) -> "PrunedLlamaConfig":
        """Return the config of one layer. Before transformers 5.14, `per_layer_config` is a plain dictionary."""
        layers = getattr(self, "per_layer_config", {})
        if not isinstance(layers, dict):
            return layers[index]
        layer = copy.copy(self)
        for key, sizes in layers.items():
            if int(key) == index:
                layer.__dict__.update(sizes)
        return layer


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    """A decoder layer with sizes of its own. `self_attn` or `mlp` is None if the layer lacks it."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, config: PrunedLlamaConfig, layer_idx: int):
        layer = config.layer(layer_idx)
        super().__init__(layer, layer_idx)
        self.layer_idx = layer_idx
        self.self_attn.config = self.mlp.config = config  # where `set_attn_implementation` stores its choice
        skipped = getattr(layer, "skip", ())
        if "attention" in skipped:
            self.self_attn = self.input_layernorm = None
        if "mlp" in skipped:
            self.mlp = self.post_attention_layernorm = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.self_attn is not None:
            attended, *_ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
            hidden_states = hidden_states + attended
        else:
            self._note_batch_size(kwargs.get("past_key_values"), hidden_states.shape[0])
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states

    def _note_batch_size(self, cache: Any, batch_size: int) -> None:
        """Give a static cache's empty layer its batch size, which older transformers read in a second use."""
        for layer in getattr(cache, "layers", [])[self.layer_idx : self.layer_idx + 1]:
            if isinstance(layer, StaticLayer) and not layer.is_initialized:
                layer.max_batch_size = batch_size


class PrunedLlamaModel(LlamaModel):
    """The decoder without the output embedding."""

    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: PrunedLlamaConfig):
        super().__init__(config)  # its layers of one size are replaced here, before weights are loaded
        self.layers = nn.ModuleList(PrunedLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """The causal language model."""

    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: PrunedLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)  # skips the stock class, which would build stock layers
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
