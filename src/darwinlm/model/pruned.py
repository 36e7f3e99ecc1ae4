"""Pruned models: classes whose layers each have sizes of their own, and how a stitched model becomes one of them.

`modeling_pruned_llama.py` is the only source of these classes. Other families differ from it only in names, so their
source is the same text with the names replaced. An export contains this text and therefore does not need darwinlm; a
program that has called `register` loads exports without `trust_remote_code`.
"""

from __future__ import annotations

import atexit
import copy
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from darwinlm.model.families import GIVEN_BY_HEAD, NORMED_OVER_HEADS, RENAMED, STAYING, find_family, mlp_width
from darwinlm.model.frame import find_frame
from darwinlm.model.layers import (
    DENSE_SIZES,
    check_sharing,
    dense_sizes,
    family_of,
    head_counts,
    head_dim,
    head_width,
    layer_config,
    layer_fields,
    layer_types,
)
from darwinlm.model.naming import plain_linears
from darwinlm.model.parts import layer_parts
from darwinlm.runtime.scratch import scratch_directory
from darwinlm.types import BlockSizes, DarwinError, UsageError

TEMPLATE = Path(__file__).with_name("modeling_pruned_llama.py")
CAUSAL = Path(__file__).with_name("modeling_causal_llama.py")  # for decoders without a causal language model
# Parts of the template that only some families need: those families, then where each part begins and what follows it.
PARTS = (
    (
        GIVEN_BY_HEAD,
        ("from functools", "from typing"),
        ("def select_heads", "def resized"),
        ("    for name in parts", "    for part in"),
    ),
    (
        STAYING,
        ("class LayersOf", "class PrunedLlamaConfig"),
        ('        if key == "per_l', "        return super().__geta"),
    ),
    (
        NORMED_OVER_HEADS,
        ("class Selected", "def select_heads"),
        ("    if module.weight.dim() == 1", "    shape = module.weight"),
    ),
    (RENAMED, ("        output, head =", "        self.get_submodule")),
)
CLASSIFIER = "AutoModelForSequenceClassification"
FIRST_KEPT = "first_kept"  # the field that says how many blocks stay whatever is left of them
INDICES = ("mlp_only_layers", "full_attn_idxs")  # fields that list blocks, rather than something of each


def module_name(family: str) -> str:
    """Return the name of the Python module that an export of a family contains."""
    return f"modeling_pruned_{family}"


def auto_map(family: str) -> dict[str, str]:
    """Return where the Auto classes of transformers find the pruned classes of a family. vLLM needs `AutoModel` too."""
    return {auto: f"{module_name(family)}.Pruned{stock}" for auto, stock in stock_names(family).items()}


def stock_names(family: str) -> dict[str, str]:
    """Return the names of a family's config and model classes in transformers, by the Auto class that finds them."""
    classifiers = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    names = {
        "AutoConfig": CONFIG_MAPPING_NAMES[family],
        "AutoModel": MODEL_MAPPING_NAMES[family],
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family) or _causal_name(family),
    }
    return names | ({CLASSIFIER: classifiers[family]} if family in classifiers else {})


def is_text_family(family: str) -> bool:
    """Whether transformers has a causal language model of a family, or the decoder of one inside another model."""
    inner = family.endswith("_text") and family in MODEL_MAPPING_NAMES
    return inner or family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _causal_name(family: str) -> str:
    return f"{MODEL_MAPPING_NAMES[family].removesuffix('Model')}ForCausalLM"


@cache
def complete_family(family: str) -> None:
    """Register a causal language model of a family of which transformers has the decoder alone."""
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = sys.modules[pruned_classes(family)["AutoModelForCausalLM"].__module__]
        AutoModelForCausalLM.register(CONFIG_MAPPING[family], getattr(module, _causal_name(family)), exist_ok=True)


def _with_causal_class(text: str) -> str:
    """The source of the classes of pruned models, with a causal language model that transformers does not have."""
    source = CAUSAL.read_text()
    text = text.replace(" LlamaForCausalLM,", " GenerationMixin,", 1)
    imported = "from transformers.modeling_outputs import CausalLMOutputWithPast\n"
    before, rest = text.split("\n\nclass PrunedLlamaConfig", 1)
    head, rest_of_head = before.split("from transformers import", 1)  # raises if the template has changed
    before = f"{head}{imported}from transformers import{rest_of_head}"
    return f"{before}\n\n{source[source.index('Base: Any') :]}\n\nclass PrunedLlamaConfig{rest}"


def render(family: str) -> str:
    """Return the source of the Python module that an export of a family contains."""
    text, stock = TEMPLATE.read_text(), stock_names(family)
    for families, *spans in reversed(PARTS):  # a part may follow one of a later entry
        for start, end in spans if family not in families else ():
            text = text[: text.index(start)] + text[text.index(end) :]
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        text = _with_causal_class(text)
    if CLASSIFIER not in stock:
        text = text[: text.index("\n\nAutoModel.register")]
    for auto, name in stock_names("llama").items():
        text = re.sub(rf"{name}\b", f"<{stock.get(auto)}>", text)
    prefix = re.sub(r"(ForCausalLM|LMHeadModel)$", "", stock["AutoModelForCausalLM"])
    text = text.replace("Llama", prefix).replace("llama", family)
    return re.sub(r"<(\w+)>", r"\1", text)


@cache
def pruned_classes(family: str) -> dict[str, Any]:
    """Return the config and model classes of a family's pruned models, by the Auto class that finds them.

    Their `save_pretrained` writes the Python module beside the weights.
    """
    module = import_module(family, render(family))
    classes = {auto: getattr(module, f"Pruned{stock}") for auto, stock in stock_names(family).items()}
    for auto, cls in classes.items():
        cls.register_for_auto_class(auto)
    return classes


def import_module(family: str, source: str) -> ModuleType:
    """Import the source of a module of an export; it is a real file, which transformers reads and copies."""
    path = _module_directory() / f"{module_name(family)}.py"
    path.write_text(source)
    name = f"{__name__}.{module_name(family)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _module_directory() -> Path:
    until_the_end = ExitStack()
    atexit.register(until_the_end.close)
    return until_the_end.enter_context(scratch_directory("code"))


@cache
def register(family: str) -> None:
    """Register a family's pruned classes with the Auto classes of this process. Further calls do nothing."""
    register_classes(pruned_classes(family))


def register_classes(classes: Mapping[str, Any]) -> None:
    config = classes["AutoConfig"]
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification):
        if auto.__name__ in classes:
            auto.register(config, classes[auto.__name__], exist_ok=True)


def remaining_blocks(sizes: Sequence[BlockSizes], config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the blocks of which anything remains. The others compute nothing and are left out of a checkpoint.

    The first blocks stay whatever is left of them if another model adds something of its own behind each, and all do
    that compute something beside their units.

    Args:
        config: of the model, before or after pruning.
    """
    kept = len(sizes) if family_of(config) in STAYING else getattr(config, FIRST_KEPT, 0)
    return tuple(i for i, block in enumerate(sizes) if not block.empty or i < kept)


def renumber_blocks(state: Mapping[str, Tensor], remaining: Sequence[int], blocks: str) -> dict[str, Tensor]:
    """Return a state dict with only the blocks `remaining`, numbered from 0, and all that is outside of blocks.

    Args:
        blocks: the path of the list of blocks.
    """
    number = {str(old): str(new) for new, old in enumerate(remaining)}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(rf"({re.escape(blocks)}\.)(\d+)(\..*)", name)
        if match is None:
            result[name] = tensor
        elif match[2] in number:
            result[f"{match[1]}{number[match[2]]}{match[3]}"] = tensor
    return result


def pruned_config(config: PreTrainedConfig, sizes: Sequence[BlockSizes]) -> PreTrainedConfig:
    """Return the config of a pruned model.

    The stock class of transformers is used where all remaining blocks have the same sizes and it can express them, or
    else the pruned class. Blocks that have lost everything are not in it.

    Args:
        config: describes the model before pruning.
        sizes: what pruning has left of each block of that model.

    Raises:
        UsageError: if the family cannot be exported, or if the first attention is removed, from which caches take their
            length.
    """
    family = family_of(config)
    if len(sizes) != config.num_hidden_layers:
        raise UsageError(
            f"expected sizes for {config.num_hidden_layers} blocks, found {len(sizes)}; use the sizes of this model"
        )
    remaining = remaining_blocks(sizes, config)
    blocks = [sizes[i] for i in remaining]
    fields, described = _shared_fields(config), describe_layers(config)
    mixers = "mixer" in described["layer_parts"]["stubs"]
    if not blocks or not (blocks[0].query_heads or (mixers and any(block.query_heads for block in blocks))):
        raise UsageError(
            "expected attention in the first block that remains, on which every cache relies, found none; "
            "choose a model that keeps it"
        )
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(blocks)
    for name, value in fields.items():
        if name in INDICES and value:
            fields[name] = [new for new, old in enumerate(remaining) if old in value]
        elif "layer" in name and isinstance(value, list) and len(value) == len(sizes):
            fields[name] = [value[i] for i in remaining]
    if fields.get("layer_types"):
        fields["layer_types"] = layer_types(fields["layer_types"], blocks, hasattr(config, "kv_sharing_modes"))
    classes = pruned_classes(family)
    pruned = classes["AutoConfig"](
        **fields | described,
        architectures=[classes["AutoModelForCausalLM"].__name__],
        auto_map=auto_map(family),
        allow_global_per_layer_attribute_access=True,
        per_layer_config={
            str(new): head_width(config, old) | layer_fields(sizes[old], mixers) for new, old in enumerate(remaining)
        },
    )
    check_sharing(config, pruned)
    alike = _alike(blocks, pruned, by_layer=bool(head_width(config, 0)))
    if alike is not None:
        native = _native_config(family, fields | alike)
        if native is not None and _same_tensors(native, pruned):
            return native
    return pruned


def _alike(blocks: Sequence[BlockSizes], pruned: PreTrainedConfig, by_layer: bool) -> dict[str, Any] | None:
    """The fields of a config by which all blocks have their sizes, None if they have different ones.

    Args:
        by_layer: whether the family's own config has numbers of KV heads by layer.
    """
    queries, keys = ({getattr(b, name) for b in blocks} - {0} for name in ("query_heads", "key_value_heads"))
    dense = [dense_sizes(pruned, index)[2] for index in range(len(blocks))]
    widths = {block.intermediate * dense[0] // own for block, own in zip(blocks, dense, strict=True)}
    if len(queries) != 1 or len(widths) != 1 or not min(widths):
        return None
    if not all(block.query_heads for block in blocks) if by_layer else len(keys) != 1:
        return None
    fields = layer_fields(BlockSizes(queries.pop(), max(keys), widths.pop()), mixers=False)
    layers = {str(i): head_width(pruned, i) | {"num_key_value_heads": b.key_value_heads} for i, b in enumerate(blocks)}
    return fields | ({"per_layer_config": layers} if by_layer else {})


def describe_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what the config of an export says of the layers of the model before pruning, whose config this is.

    Raises:
        UsageError: if a module fits no role.
    """
    known = ("layer_parts", "num_key_value_heads", "intermediate_size")
    if hasattr(config, known[0]):
        return {name: getattr(config, name) for name in (*known, DENSE_SIZES) if hasattr(config, name)}
    stock = CONFIG_MAPPING[family_of(config)]
    dense = config if type(config) is stock else stock(**_shared_fields(config))
    model = plain_linears(_empty(dense))
    family = find_family(model)
    parts = layer_parts(family, model.base_model_prefix)
    layers = range(dense.num_hidden_layers)
    sizes = [[*head_counts(layer_config(dense, i)), mlp_width(model, family, i)] for i in layers]
    differ = {DENSE_SIZES: sizes} if any(each != sizes[0] for each in sizes) else {}
    return dict(zip(known, (parts, *sizes[0][1:]), strict=True)) | differ


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device."""
    with torch.device("meta"):
        return _model_class(config)(copy.deepcopy(config))


def _model_class(config: PreTrainedConfig) -> Any:
    pruned = pruned_classes(family_of(config))
    own = isinstance(config, pruned["AutoConfig"])
    return pruned["AutoModelForCausalLM"] if own else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _same_tensors(native: PreTrainedConfig, pruned: PreTrainedConfig) -> bool:
    """Whether the stock class has the tensors of the pruned class; it may refuse sizes, or derive some from others."""
    try:
        stock = _empty(native).state_dict()
    except (ValueError, RuntimeError):
        return False
    return {name: each.shape for name, each in stock.items()} == {
        name: each.shape for name, each in _empty(pruned).state_dict().items()
    }


def _shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that a pruned model's config takes over from the config of the model before pruning."""
    replaced = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
    per_layer = ("per_layer_config", "allow_global_per_layer_attribute_access")
    fields = {key: value for key, value in config.to_dict().items() if key not in replaced + per_layer}
    computed = isinstance(getattr(type(config), "head_dim", None), property)
    return fields if computed else fields | {"head_dim": head_dim(config, 0)}


def _native_config(family: str, fields: dict[str, Any]) -> PreTrainedConfig | None:
    """Return the family's stock config with these fields, or None if it cannot express them."""
    stock = CONFIG_MAPPING[family]
    hidden = fields[stock.attribute_map.get("hidden_size", "hidden_size")]
    implied = hidden == fields["num_attention_heads"] * fields.get("head_dim", 0)
    # Where the config class does not declare `head_dim`, not all programs read it: for Qwen2, vLLM computes it.
    if not implied and not (hasattr(stock, "head_dim") or hasattr(stock(), "head_dim")):
        return None
    try:
        config = stock(**fields)
    except StrictDataclassError:  # Llama requires a number of heads that divides the hidden size
        return None
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[stock].__name__]
    return config


def pruned_model(
    model: PreTrainedModel, sizes: Sequence[BlockSizes], weights: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Return a stitched model as an instance of the class that its checkpoint loads into, with shared weights.

    Args:
        sizes: the sizes of each block of `model`.
        weights: a state dict to use instead of that of `model`.

    Raises:
        UsageError: as `pruned_config` does.
        DarwinError: if the weights do not have these sizes.
    """
    config = pruned_config(model.config, sizes)
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights():
        result = _model_class(config)(config)
    given = model.state_dict() if weights is None else weights
    state = renumber_blocks(given, remaining_blocks(sizes, model.config), find_frame(model).blocks)
    try:
        result.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise DarwinError(
            f"expected weights of the sizes that the genome gives, found others ({reason}); "
            "export the model together with its own genome"
        ) from None
    result.tie_weights()
    result.generation_config = model.generation_config
    return result.train(model.training)
