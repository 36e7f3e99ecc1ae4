"""Pruned models: classes whose layers each have sizes of their own, and how a stitched model becomes one of them.

`modeling_pruned_llama.py` is the only source of these classes. Other families differ from it only in names, so their
source is the same text with the names replaced. An export contains this text and therefore does not need darwinlm; a
program that has called `register` loads exports without `trust_remote_code`.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from darwinlm.model.families import EXPORTABLE, PRUNED, head_counts, head_dim
from darwinlm.runtime.scratch import scratch_directory
from darwinlm.types import KINDS, BlockSizes, DarwinError, UsageError

TEMPLATE = Path(__file__).with_name("modeling_pruned_llama.py")


def family_of(config: PreTrainedConfig) -> str:
    """Return the name of the family of a model, pruned or dense.

    Raises:
        UsageError: if a pruned model of this family cannot be exported.
    """
    family = config.model_type.removeprefix(PRUNED)
    if family not in EXPORTABLE:
        raise UsageError(
            f"expected a model of one of the {len(EXPORTABLE)} families that can be exported (supported models, in the "
            f"README), found {family!r}; darwinlm search takes it, and stops before the export"
        )
    return family


def module_name(family: str) -> str:
    """Return the name of the Python module that an export of a family contains."""
    return f"modeling_pruned_{family}"


def auto_map(family: str) -> dict[str, str]:
    """Return where the Auto classes of transformers find the pruned classes of a family. vLLM needs `AutoModel` too."""
    auto_classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    return {
        auto: f"{module_name(family)}.{name}" for auto, name in zip(auto_classes, _class_names(family), strict=True)
    }


def _class_names(family: str) -> tuple[str, str, str]:
    config, model, causal_lm = _stock_names(family)
    return f"Pruned{config}", f"Pruned{model}", f"Pruned{causal_lm}"


def _stock_names(family: str) -> tuple[str, str, str]:
    """Return the names of a family's config, model and causal language model classes in transformers."""
    return CONFIG_MAPPING_NAMES[family], MODEL_MAPPING_NAMES[family], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]


def render(family: str) -> str:
    """Return the source of the Python module that an export of a family contains."""
    text, module = TEMPLATE.read_text(), model_type_to_module_name(family)
    norms = f"NORMS = {json.dumps(dict(zip(KINDS, EXPORTABLE[family], strict=True)))}"
    text = re.sub(r"^NORMS = {.*}", norms, text, flags=re.MULTILINE)
    config, model, causal_lm = _stock_names(family)
    prefix = causal_lm.removesuffix("ForCausalLM")
    text = text.replace("models.llama.modeling_llama", f"models.{module}.modeling_{module}")
    for name, stock in (("Config", config), ("Model", model), ("ForCausalLM", causal_lm)):
        text = re.sub(rf"Llama{name}\b", f"<{stock}>", text)
    text = text.replace("Llama", prefix).replace("llama", family)
    return re.sub(r"<(\w+)>", r"\1", text)


def foreign_code(directory: Path) -> str | None:
    """Return a file in an export that has or names Python code that is not this package's, or None if there is none.

    Whoever trusts the code of the export runs only what was compared here.
    """
    ours = {f"{module_name(family)}.py": render(family) for family in EXPORTABLE}
    for file in sorted(directory.rglob("*.py")):
        if file.read_text(errors="replace") != ours.get(file.name):
            return file.name
    known = [auto_map(family) for family in EXPORTABLE]
    for file in sorted(directory.glob("*.json")):
        named = _find_auto_map(file)
        if named is not None and named not in known:
            return file.name
    return None


def _find_auto_map(file: Path) -> Any:
    """Return where a file of JSON says that code is, None if it does not."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return None
    return content.get("auto_map") if isinstance(content, dict) else None


@cache
def pruned_classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """Return the config, model and causal language model classes of a family's pruned models.

    Their `save_pretrained` writes the Python module beside the weights.
    """
    # The module is a real file, because transformers reads its source and `save_pretrained` copies it.
    path = _module_directory() / f"{module_name(family)}.py"
    path.write_text(render(family))
    name = f"{__name__}.{module_name(family)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, model, causal_lm = (getattr(module, name) for name in _class_names(family))
    for auto, cls in zip(auto_map(family), (config, model, causal_lm), strict=True):
        cls.register_for_auto_class(auto)
    return config, model, causal_lm


@cache
def _module_directory() -> Path:
    until_the_end = ExitStack()
    atexit.register(until_the_end.close)
    return until_the_end.enter_context(scratch_directory("code"))


@cache
def register(family: str) -> None:
    """Register a family's pruned classes with the Auto classes of this process. Further calls do nothing.

    A family that cannot be exported has none.
    """
    if family in EXPORTABLE:
        config, model, causal_lm = pruned_classes(family)
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
        AutoModelForCausalLM.register(config, causal_lm)


def remaining_blocks(sizes: Sequence[BlockSizes]) -> tuple[int, ...]:
    """Return the blocks of which anything remains. The others compute nothing and are left out of a checkpoint."""
    return tuple(i for i, block in enumerate(sizes) if block.query_heads or block.intermediate)


def renumber_blocks(state: Mapping[str, Tensor], remaining: Sequence[int]) -> dict[str, Tensor]:
    """Return a state dict with only the blocks `remaining`, numbered from 0, and all that is outside of blocks."""
    number = {str(old): str(new) for new, old in enumerate(remaining)}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\blayers\.)(\d+)(\..*)", name)
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
        UsageError: if the family cannot be exported, or if the first remaining block has no attention, from which
            caches take their length.
    """
    family = family_of(config)
    if len(sizes) != config.num_hidden_layers:
        raise UsageError(
            f"expected sizes for {config.num_hidden_layers} blocks, found {len(sizes)}; use the sizes of this model"
        )
    remaining = remaining_blocks(sizes)
    blocks = [sizes[i] for i in remaining]
    if not blocks or not blocks[0].query_heads:
        raise UsageError(
            "expected attention in the first block that remains, on which every cache relies, found none; "
            "choose a model that keeps it"
        )
    fields = _shared_fields(config)
    fields["num_hidden_layers"] = len(blocks)
    for name, value in fields.items():
        if "layer" in name and isinstance(value, list) and len(value) == len(sizes):
            fields[name] = [value[i] for i in remaining]
    if fields.get("layer_types"):
        fields["layer_types"] = _layer_types(fields["layer_types"], blocks)
    if len(set(blocks)) == 1 and blocks[0].intermediate:
        native = _native_config(family, fields | _layer_fields(blocks[0]))
        if native is not None:
            return native
    config_class: Any = pruned_classes(family)[0]
    return config_class(
        **fields,
        architectures=[_class_names(family)[2]],
        auto_map=auto_map(family),
        allow_global_per_layer_attribute_access=True,
        per_layer_config={str(i): _layer_fields(block) for i, block in enumerate(blocks)},
    )


def block_sizes_of(config: PreTrainedConfig) -> tuple[BlockSizes, ...]:
    """Return the sizes of each block of a model, pruned or dense, from its config."""
    layer_of = getattr(config, "layer", lambda _: config)
    return tuple(_block_sizes(layer_of(index)) for index in range(config.num_hidden_layers))


def _block_sizes(layer: PreTrainedConfig) -> BlockSizes:
    skipped = getattr(layer, "skip", ())
    heads = (0, 0) if "attention" in skipped else head_counts(layer)
    return BlockSizes(*heads, 0 if "mlp" in skipped else layer.intermediate_size)


def _shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that a pruned model's config takes over from the config of the model before pruning."""
    replaced = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
    per_layer = ("per_layer_config", "allow_global_per_layer_attribute_access")
    fields = {key: value for key, value in config.to_dict().items() if key not in replaced + per_layer}
    return fields | {"head_dim": head_dim(config)}


def _layer_fields(block: BlockSizes) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if block.query_heads:
        fields |= {"num_attention_heads": block.query_heads, "num_key_value_heads": block.key_value_heads}
    if block.intermediate:
        fields |= {"intermediate_size": block.intermediate}
    missing = {"attention": block.query_heads, "mlp": block.intermediate}
    skip = [part for part, size in missing.items() if not size]
    return fields | ({"skip": skip} if skip else {})


def _layer_types(types: list[str], blocks: Sequence[BlockSizes]) -> list[str]:
    """Return the layer type of each block; a block without attention takes that of the block before it.

    The masks of a type take their length from the first cache layer of that type, which must therefore be in use.
    """
    result: list[str] = []
    for kind, block in zip(types, blocks, strict=True):
        result.append(kind if block.query_heads else result[-1])
    return result


def _native_config(family: str, fields: dict[str, Any]) -> PreTrainedConfig | None:
    """Return the family's stock config with these fields, or None if it cannot express them."""
    stock = CONFIG_MAPPING[family]
    implied = fields["hidden_size"] == fields["num_attention_heads"] * fields["head_dim"]
    # Where the config class does not declare `head_dim`, not all programs read it: for Qwen2, vLLM computes it.
    if not implied and not hasattr(stock(), "head_dim"):
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
    config_class, _, causal_lm = pruned_classes(family_of(config))
    model_class: Any = causal_lm if isinstance(config, config_class) else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights():
        result = model_class(config)
    state = renumber_blocks(model.state_dict() if weights is None else weights, remaining_blocks(sizes))
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
