# Llama with layers of different sizes, written by darwinlm. It needs torch and transformers >= 5.0, nothing else.
"""A Llama whose decoder layers differ in query heads, KV heads and MLP width, and may lack their attention or MLP.

`config.per_layer_config[i]` describes layer `i`: its `num_attention_heads`, `num_key_value_heads` and
`intermediate_size`, and under `skip` the parts that it lacks, "attention" or "mlp". A size that is missing there is as
in the config, whose own sizes are those of the model before pruning. A layer without a part lacks the part's norm too.
"""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import StaticLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

if int(transformers.__version__.split(".")[0]) < 5:  # it would ignore `rope_parameters` and compute wrong logits
    raise ImportError(f"expected transformers 5.0 or newer, found {transformers.__version__}; install a newer one")

NORMS = {"attention": ["input_layernorm"], "mlp": ["post_attention_layernorm"]}  # which go with the part
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


# Not "NoAttention": transformers takes a file with a class of that name for one whose attention cannot be switched.
class NoAttn(nn.Module):
    """Takes the place of an attention that a layer lacks: its output, which the layer adds to the stream, is zero."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, **arguments: Any) -> tuple[Tensor, None]:
        cache = arguments.get("past_key_values")
        for layer in getattr(cache, "layers", [])[self.layer_idx : self.layer_idx + 1]:
            if isinstance(layer, StaticLayer) and not layer.is_initialized:
                layer.max_batch_size = hidden_states.shape[0]  # which older transformers read in a second use
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Takes the place of an MLP that a layer lacks."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    """A decoder layer with sizes of its own, which may lack its attention or its MLP."""

    self_attn: Any
    mlp: Any

    def __init__(self, config: PrunedLlamaConfig, layer_idx: int):
        layer = config.layer(layer_idx)
        super().__init__(layer, layer_idx)
        self.self_attn.config = self.mlp.config = config  # where `set_attn_implementation` stores its choice
        skipped = getattr(layer, "skip", ())
        if "attention" in skipped:
            self.self_attn = NoAttn(layer_idx)
        if "mlp" in skipped:
            self.mlp = NoMLP()
        for part, norms in NORMS.items():
            for norm in norms if part in skipped else ():
                setattr(self, norm, nn.Identity())


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
        super().__init__(config)
        self.model = PrunedLlamaModel(config)
        self._no_split_modules = self.model._no_split_modules  # not those of the stock layers that it replaces
        self.post_init()
