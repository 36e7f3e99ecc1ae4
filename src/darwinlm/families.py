"""Where each model family keeps its units: one row a family. Nothing else in the package knows a family's names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from darwinlm.genome import Grid
from darwinlm.types import BlockSizes, DarwinError, Genome, Producer, Unit, UsageError


@dataclass(frozen=True)
class Family:
    """Module paths of a family; those of a unit are relative to its decoder block."""

    backbone: str = "model"
    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    def block(self, index: int) -> str:
        """Path of a decoder block."""
        return f"{self.blocks}.{index}"


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


def find_family(config: PretrainedConfig) -> Family:
    """The row of a model's family.

    Raises:
        UsageError: if the family has no row.
    """
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"unsupported model family {config.model_type!r}: darwinlm prunes {', '.join(sorted(FAMILIES))}; "
            "convert the model to one of these, or add a row to families.py"
        )
    return FAMILIES[config.model_type]


def head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head: the config's own figure where it has one."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def find_units(model: nn.Module, config: PretrainedConfig) -> tuple[Unit, ...]:
    """Every attention and MLP of the model, block by block; a model on the meta device will do.

    An attention's structure is a KV group: a KV head with the query heads that read it. Without grouped queries that
    is the paper's single head.

    Raises:
        UsageError: if the family has no row.
        DarwinError: if a module of the family's row is not in the model.
    """
    family = find_family(config)
    units: list[Unit] = []
    for block in range(config.num_hidden_layers):
        units += [_attention(model, config, family, block), _mlp(model, config, family, block)]
    return tuple(units)


def _attention(model: nn.Module, config: PretrainedConfig, family: Family, block: int) -> Unit:
    groups = config.num_key_value_heads
    head = head_dim(config)
    group = head * (config.num_attention_heads // groups)
    path = family.block(block)
    query, key, value, output = (
        linear_at(model, f"{path}.{name}") for name in (family.query, family.key, family.value, family.attention_output)
    )
    producers = (
        Producer(f"{path}.{family.query}", 0, group),
        Producer(f"{path}.{family.key}", 0, head),
        Producer(f"{path}.{family.value}", 0, head),
    )
    per_group = sum(_count(module) for module in (query, key, value)) // groups + output.weight.numel() // groups
    rest = _bias(output) + sum(_count(_module(model, f"{path}.{norm}")) for norm in family.attention_norms)
    rest += _count(_module(model, f"{path}.{family.attention}")) - per_group * groups - _bias(output)
    return Unit(
        name=f"block-{block:02d}-attention",
        block=block,
        kind="attention",
        consumer=f"{path}.{family.attention_output}",
        producers=producers,
        structure_width=group,
        structures=groups,
        structure_parameters=per_group,
        fixed_parameters=rest,
    )


def _mlp(model: nn.Module, config: PretrainedConfig, family: Family, block: int) -> Unit:
    channels = config.intermediate_size
    path = family.block(block)
    inputs = [linear_at(model, f"{path}.{name}") for name in family.mlp_inputs]
    output = linear_at(model, f"{path}.{family.mlp_output}")
    return Unit(
        name=f"block-{block:02d}-mlp",
        block=block,
        kind="mlp",
        consumer=f"{path}.{family.mlp_output}",
        producers=tuple(Producer(f"{path}.{name}", 0, 1) for name in family.mlp_inputs),
        structure_width=1,
        structures=channels,
        structure_parameters=(sum(_count(module) for module in inputs) + output.weight.numel()) // channels,
        fixed_parameters=_bias(output) + sum(_count(_module(model, f"{path}.{norm}")) for norm in family.mlp_norms),
    )


def block_sizes(grid: Grid, genome: Genome, config: PretrainedConfig) -> tuple[BlockSizes, ...]:
    """What the genome leaves of each decoder block."""
    group = config.num_attention_heads // config.num_key_value_heads
    left = {
        (unit.block, unit.kind): unit.structures - removed[level]
        for unit, removed, level in zip(grid.units, grid.removed, genome.levels, strict=True)
    }
    return tuple(
        BlockSizes(
            query_heads=left[block, "attention"] * group,
            key_value_heads=left[block, "attention"],
            intermediate=left[block, "mlp"],
        )
        for block in range(config.num_hidden_layers)
    )


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear module at a path. Raises `DarwinError` if there is none."""
    module = _module(model, path)
    if not isinstance(module, nn.Linear):
        raise DarwinError(f"cannot prune {path}: expected a linear module, found {type(module).__name__}")
    return module


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise DarwinError(
            f"cannot prune {type(model).__name__}: expected a module {path}, found none; "
            "its family's row in families.py does not fit it"
        ) from None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bias(linear: nn.Linear) -> int:
    return 0 if linear.bias is None else linear.bias.numel()
