"""What the config of a model says of each decoder block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers import PretrainedConfig

from darwinlm.types import BlockSizes, UsageError

PRUNED = "pruned_"  # prefix of the model type of an export
DENSE_SIZES = "layer_sizes"  # the field of an export's config with what `dense_sizes` returns, where blocks differed


def is_pruned(config: PretrainedConfig) -> bool:
    """Whether a config is that of a model that darwinlm has pruned, so that it states sizes before pruning too."""
    return config.model_type.startswith(PRUNED)


def family_of(config: PretrainedConfig) -> str:
    """Return the name of the family of a model, pruned or dense."""
    return config.model_type.removeprefix(PRUNED)


def head_dim(config: PretrainedConfig, block: int = 0) -> int:
    """The width of a head of a block: `head_dim` of its config, or if it has none, hidden size over query heads.

    Only where a family gives its blocks heads of different widths is it the block's own config that says it: others may
    compute the width from the number of heads, of which pruning leaves a block fewer.
    """
    owner = layer_config(config, block) if "head_dim" in (config.per_layer_attributes or ()) else config
    return getattr(owner, "head_dim", None) or owner.hidden_size // owner.num_attention_heads


def head_counts(config: PretrainedConfig) -> tuple[int, int]:
    """The numbers of query heads and of KV heads; without grouped queries a config may name only one.

    Args:
        config: of a block (`layer_config`), if blocks may differ in it.
    """
    queries = config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return queries, 1
    names = ("num_key_value_heads", "num_kv_heads")
    return queries, next((count for name in names if (count := getattr(config, name, None))), queries)


def layer_config(config: PretrainedConfig, block: int) -> PretrainedConfig:
    """Return the config that a decoder block is built from.

    In a pruned model each block has a config with its own sizes, while the model's config has those of the dense model.
    """
    return config.layer(block) if hasattr(config, "layer") else config.per_layer_config[block]


def dense_sizes(config: PretrainedConfig, block: int) -> tuple[int, int, int]:
    """The query heads, KV heads and MLP channels that a block of a pruned model had before pruning."""
    if hasattr(config, DENSE_SIZES):  # blocks differed in them
        queries, keys, channels = getattr(config, DENSE_SIZES)[block]
        return queries, keys, channels
    return *head_counts(config), config.intermediate_size


def shares(config: PretrainedConfig, block: int, mode: str) -> bool:
    """Whether a block's keys and values are what other blocks read (`store`), or are those of another (`reuse`).

    Raises:
        UsageError: if blocks share them, and this version of transformers does not say which.
    """
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None and getattr(config, "num_kv_shared_layers", None):
        raise UsageError(
            "expected a transformers that names the blocks whose keys and values are shared, as 5.23 does, found "
            f"{transformers.__version__}; upgrade it"
        )
    return modes is not None and modes[block] == mode


def head_width(config: PretrainedConfig, block: int) -> dict[str, int]:
    """The width of a head of a block, where the family itself gives blocks different ones."""
    return {"head_dim": head_dim(config, block)} if "head_dim" in (config.per_layer_attributes or ()) else {}


def check_sharing(config: PretrainedConfig, pruned: PretrainedConfig) -> None:
    """Raise `UsageError` if a pruned model's blocks would read the keys and values of others than before."""
    before, after = (getattr(each, "kv_sharing_modes", None) for each in (config, pruned))
    if before != after:
        raise UsageError(
            "expected attention of every type before the blocks whose keys and values are shared, found none of one; "
            "choose a model that keeps it"
        )


def layer_fields(block: BlockSizes, mixers: bool) -> dict[str, Any]:
    """What the config of a layer says.

    Args:
        mixers: whether the family has any.
    """
    fields: dict[str, Any] = {}
    if block.query_heads:
        fields |= {"num_attention_heads": block.query_heads, "num_key_value_heads": block.key_value_heads}
    if block.intermediate:
        fields |= {"intermediate_size": block.intermediate}
    missing = {"attention": block.query_heads, "mlp": block.intermediate} | ({"mixer": block.mixer} if mixers else {})
    skip = [part for part, size in missing.items() if not size]
    return fields | ({"skip": skip} if skip else {})


def layer_types(types: list[str], blocks: Sequence[BlockSizes], as_they_are: bool) -> list[str]:
    """Return the layer type of each block; one without attention or mixer takes that of the attention before it.

    The masks of a type take their length from the first cache layer of that type, which must therefore be in use.

    Args:
        as_they_are: whether a type means more than masks, so that it changes only where it must; the last one's is
            prescribed.
    """
    result: list[str] = []
    attentions: list[str] = []
    for index, (kind, block) in enumerate(zip(types, blocks, strict=True)):
        attentions += [kind] if block.query_heads else []
        fixed = as_they_are and (kind in attentions or index == len(types) - 1)
        stays = block.query_heads or block.mixer or not attentions or fixed
        result.append(kind if stays else attentions[-1])
    return result
