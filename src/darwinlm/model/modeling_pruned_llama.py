"""A Llama whose decoder layers differ in query heads, KV heads and MLP width, and may lack their attention or MLP.

darwinlm wrote this; it needs torch >= 2.5 and transformers >= 5.0 alone. Every layer is a stock layer that is narrowed
to what `config.per_layer_config[i]` says: `num_attention_heads`, `num_key_value_heads`, `intermediate_size`, and under
`skip` what it lacks, "attention", "mlp" or "mixer". `config.layer_parts` says what each module of a layer is for.
"""

import copy
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

if int(transformers.__version__.split(".")[0]) < 5:  # it would ignore `rope_parameters` and compute wrong logits
    raise ImportError(f"expected transformers 5.0 or newer, found {transformers.__version__}; install a newer one")

recorded: Any = (LlamaModel._can_record_outputs or {}).get("attentions", nn.Module)  # for `output_attentions`
CHOICE = "_attn_implementation_internal"  # where `set_attn_implementation` stores it


class LayersOf(list[Any]):
    """The configs of layers by number, or one by a type, of which all layers have heads of one width."""

    types: tuple[str, ...] = ()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.types.index(key) if isinstance(key, str) else key)


class PrunedLlamaConfig(LlamaConfig):
    """A `LlamaConfig` in which each layer may have sizes of its own."""

    model_type = "pruned_llama"
    whole: ClassVar[Any] = None  # of the config of a layer, that of its model, whose choice of attention it has

    def __getattribute__(self, key: str) -> Any:
        # transformers >= 5.14 warns or raises when code reads a size of the model whose layers have their own.
        if key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim"):
            return object.__getattribute__(self, self.attribute_map.get(key, key))
        if key == "per_layer_config":
            layers = LayersOf(super().__getattribute__(key))
            layers.types = (*self.layer_types,)
            return layers
        return super().__getattribute__(key) if key != CHOICE or not self.whole else getattr(self.whole, key)

    def __setattr__(self, key: str, value: Any) -> None:
        (super() if key != CHOICE or not self.whole else self.whole).__setattr__(key, value)

    def layer(self, index: int) -> "PrunedLlamaConfig":
        """Return the config of one layer. Before transformers 5.14, `per_layer_config` is a plain dictionary."""
        layers = getattr(self, "per_layer_config", {})
        layer = copy.copy(self if isinstance(layers, dict) else layers[index])
        own = {int(key): sizes for key, sizes in layers.items()} if isinstance(layers, dict) else {}
        for name, size in own.get(index, {}).items():
            setattr(layer, name, size)
        vars(layer)["whole"] = self
        return layer


# Not "NoAttention": transformers takes a file with a class of that name for one whose attention cannot be switched.
class NoAttn(getattr(recorded, "target_class", recorded)):  # whose weights, here of no heads, are recorded
    """Takes the place of an attention that a layer lacks: its output, which the layer adds to the stream, is zero."""

    def __init__(self, layer_idx: int, adds: bool):
        nn.Module.__init__(self)
        self.layer_idx, self.adds = layer_idx, adds  # whether an attention adds the stream itself

    def forward(self, hidden_states: Tensor, *others: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
        for cache in arguments.values():
            for layer in getattr(cache, "layers", [])[self.layer_idx : self.layer_idx + 1]:
                layer.max_batch_size = len(hidden_states)  # which older transformers read in a second use
        states = others[0] if self.adds else torch.zeros_like(hidden_states)
        return states, hidden_states.new_zeros(len(hidden_states), 0, 1, 1)


class NoMLP(nn.Identity):
    """Takes the place of an MLP that a layer lacks, or of what mixes tokens without attention."""

    def forward(self, hidden_states: Tensor, *stream: Any, **__: Any) -> Tensor:
        return stream[0] if stream else torch.zeros_like(hidden_states)


class Selected(nn.Module):
    """Some outputs of a norm that must see all heads."""

    def __init__(self, module: nn.Module, size: int):
        super().__init__()
        self.module = module
        self.register_buffer("index", torch.arange(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs).index_select(-1, self.index)


def select_heads(name: str, count: int, attention: Any, others: Any, arguments: Any) -> Any:
    """Of what an attention is given for each of `count` heads before pruning, keep what is for those that are left."""
    given = arguments[name]  # [sequences * heads, 1, length], or [sequences, heads, length, length]
    if given is not None and given.shape[-3] % count == 0:
        arguments[name] = given.unflatten(-3, (-1, count))[..., attention.bias_heads.index, :, :].flatten(-4, -3)
    return others, arguments


def resized(module: Any, rows: Any, columns: Any) -> nn.Module:
    """Return a linear module of another size, or of a norm as many outputs as `rows` says; None is the stock size."""
    if module.weight.dim() == 1:
        return Selected(module, rows)
    shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    return nn.Linear(columns or shape[1], rows or shape[0], module.bias is not None, device=module.weight.device)


def narrow(layer: nn.Module, config: Any, index: int) -> None:
    """Give a stock layer the sizes that the config of the layer says."""
    size, parts = config.layer(index), config.layer_parts
    queries, keys = size.num_attention_heads, size.num_key_value_heads
    width = vars(size).get("head_dim", config.head_dim)  # some compute it, of heads that the layer has lost
    numbers = {"config": size, "queries": queries, "keys": keys, "readers": queries // keys}
    numbers |= {"query width": queries * width, "key width": keys * width, "channels": size.intermediate_size}
    present = {path for path, _ in layer.named_modules()}  # not every layer has every part
    for path in present & (parts["rows"].keys() | parts["columns"].keys()):
        rows, columns = sum(numbers[name] for name in parts["rows"].get(path, [])), parts["columns"].get(path)
        module: Any = layer.get_submodule(path)
        if module.weight.dim() > 1 or queries != config.num_attention_heads:  # a norm over all heads that are left
            layer.set_submodule(path, resized(module, rows or None, numbers.get(columns)))
    for attribute, name in parts["attributes"].items() if parts["attention"] in present else ():
        setattr(layer.get_submodule(parts["attention"]), attribute, numbers[name])
    for name in parts["biases"] if queries != config.num_attention_heads else ():
        attention: Any = layer.get_submodule(parts["attention"])
        attention.bias_heads = nn.Module()
        attention.bias_heads.register_buffer("index", torch.arange(queries))
        attention.register_forward_pre_hook(partial(select_heads, name, config.num_attention_heads), with_kwargs=True)
    for part in getattr(size, "skip", ()):
        for path, stub in parts["stubs"][part].items() if present >= parts["stubs"][part].keys() else ():
            made = {"NoAttn": NoAttn(index, parts["attention adds"]), "NoMLP": NoMLP(), "Identity": nn.Identity()}
            old, new = layer.get_submodule(path), made[stub]  # whose buffers some models fill in every layer
            vars(new).update(_buffers=old._buffers, _non_persistent_buffers_set=old._non_persistent_buffers_set)
            layer.set_submodule(path, new)


class PrunedLlamaModel(LlamaModel):  # without the output embedding
    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig):
        super().__init__(config)
        for index, layer in enumerate(self.get_submodule(config.layer_parts["layers"]).children()):
            narrow(layer, config, index)
        self.register_buffer("unfilled", torch.zeros(0), persistent=False)  # else `_init_weights` would skip this
        self.post_init()


class WithPrunedModel(PreTrainedModel):
    """A stock model whose decoder is replaced, before weights are loaded."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig):
        super().__init__(config)
        output, head = config.layer_parts["output"], self.get_output_embeddings() if self.can_generate() else None
        for name in [path for path, module in self.named_children() if module is head and path != output]:
            # Older versions of transformers name it otherwise: there the new name is stored, the old one read.
            vars(self)[name] = self._modules[output] = self._modules.pop(name)
            self._tied_weights_keys = {f"{output}.weight": of for of in self._tied_weights_keys.values()}
        self.get_submodule(config.layer_parts["output"] if self.can_generate() else "")  # raises if it has another name
        setattr(self, self.base_model_prefix, PrunedLlamaModel(config))
        self.post_init()


class PrunedLlamaForCausalLM(WithPrunedModel, LlamaForCausalLM):
    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("continuous batching has a cache of one size for all layers: use generate instead")


AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel, exist_ok=True)  # stock classifiers ask for their decoder there
Generic: Any = (transformers.modeling_layers.GenericForSequenceClassification, LlamaModel.__base__)
LlamaClassifier: Any = getattr(transformers, "LlamaForSequenceClassification", None) or type("Generic", Generic, {})


class PrunedLlamaForSequenceClassification(WithPrunedModel, LlamaClassifier):
    """A classifier of whole texts, whose last layer is yet to be trained."""
