"""Where each model family keeps its units: a row each. Nothing else in the package knows a family's module names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from darwinlm.config.run import DatabaseConfig
from darwinlm.genome import Grid, level_grid
from darwinlm.types import BlockSizes, DarwinError, Genome, Kind, Producer, Structure, Unit, UsageError

PRUNED = "pruned_"  # before the model type of an export


@dataclass(frozen=True)
class Family:
    """Module paths of a family; those of a unit are relative to its decoder block.

    A module that is named twice in a row is fused: it holds the rows of the one, then those of the other. A `query` or
    `key` that is a norm is taken over all heads at once, so it must see them all: its projection stays whole, and only
    the outputs of the norm are selected.

    Attributes:
        attention_norms, mlp_norms: norms before and after the unit, which leave the model with it.
        query_count, key_value_count: what the attention's forward reads its numbers of heads from, where it does:
            an attribute of the module, or of its config (`config.NAME`).
    """

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
    query_count: str | None = None
    key_value_count: str | None = None
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    def block(self, index: int) -> str:
        """Path of a decoder block."""
        return f"{self.blocks}.{index}"


# Norms before and after both units.
_SANDWICH = Family(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "granite": Family(),
    "smollm3": Family(),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "phi3": Family(
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        query_count="config.num_attention_heads",
        key_value_count="num_key_value_heads",
        mlp_inputs=("mlp.gate_up_proj", "mlp.gate_up_proj"),
    ),
    # Q and K are normed over the width of all heads together.
    "olmo2": Family(
        query="self_attn.q_norm",
        key="self_attn.k_norm",
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
    ),
    "starcoder2": Family(mlp_inputs=("mlp.c_fc",), mlp_output="mlp.c_proj"),
}


def find_family(config: PretrainedConfig) -> Family:
    """The row of a model's family. What darwinlm has pruned is still of its family.

    Raises:
        UsageError: if the family has no row.
    """
    name = config.model_type.removeprefix(PRUNED)
    if name not in FAMILIES:
        raise UsageError(
            f"unsupported model family {name!r}: darwinlm prunes {', '.join(sorted(FAMILIES))}; "
            "convert the model to one of these, or add a row to families.py"
        )
    return FAMILIES[name]


def head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head: the config's own figure where it has one."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def find_units(model: nn.Module, config: PretrainedConfig, structure: Structure = "kv_group") -> tuple[Unit, ...]:
    """Every attention and MLP of the model, block by block; a model on the meta device will do.

    Those of a pruned model are as small as they are, and know what they have lost.

    Args:
        structure: what an attention loses at a time: a KV head with the query heads that read it (`kv_group`), any
            query head, its KV head staying while another reads it (`head`, the paper's), or a query head of every KV
            group in turn (`balanced`). Without grouped queries all three are the paper's single head.

    Raises:
        UsageError: if the family has no row.
        DarwinError: if a module of the family's row is not in the model, or has not the size that the config says.
    """
    family = find_family(config)
    units: list[Unit] = []
    for block in range(config.num_hidden_layers):
        found, layer = _Block(model, family, block), layer_config(config, block)
        lost = getattr(layer, "skip", ())
        units += [_attention(found, layer, config, structure)] if "attention" not in lost else []
        units += [_mlp(found, layer, config)] if "mlp" not in lost else []
    return tuple(units)


def layer_config(config: PretrainedConfig, block: int) -> PretrainedConfig:
    """What a decoder block is built from: in a pruned model each has sizes of its own, the whole has the dense ones."""
    return config.layer(block) if hasattr(config, "layer") else config


def find_grid(model: nn.Module, config: PretrainedConfig, settings: DatabaseConfig) -> Grid:
    """The levels of every unit of the model. Raises as `find_units` and `level_grid`."""
    units = find_units(model, config, settings.structure)
    return level_grid(units, settings.levels, settings.granularity)


def _attention(block: _Block, layer: PretrainedConfig, dense: PretrainedConfig, structure: Structure) -> Unit:
    family, head = block.family, head_dim(layer)
    readers = layer.num_attention_heads // layer.num_key_value_heads
    together = readers if structure == "kv_group" else 1  # query heads in one structure
    sharers = readers // together
    structures = layer.num_attention_heads // together
    return block.unit(
        "attention",
        inputs=[(family.query, together * head, 1), (family.key, head, sharers), (family.value, head, sharers)],
        output=family.attention_output,
        members=(family.attention, *family.attention_norms),
        width=together * head,
        structures=structures,
        lost=(dense.num_attention_heads if together == 1 else dense.num_key_value_heads) - structures,
        readers=sharers,
        in_turns=structure == "balanced" and sharers > 1,
    )


def _mlp(block: _Block, layer: PretrainedConfig, dense: PretrainedConfig) -> Unit:
    family = block.family
    return block.unit(
        "mlp",
        inputs=[(name, 1, 1) for name in family.mlp_inputs],
        output=family.mlp_output,
        members=(family.mlp, *family.mlp_norms),
        width=1,
        structures=layer.intermediate_size,
        lost=dense.intermediate_size - layer.intermediate_size,
    )


@dataclass(frozen=True)
class _Block:
    """One decoder block, in which units are found."""

    model: nn.Module
    family: Family
    index: int

    def unit(
        self,
        kind: Kind,
        *,
        inputs: Sequence[tuple[str, int, int]],
        output: str,
        members: Sequence[str],
        width: int,
        structures: int,
        lost: int,
        readers: int = 1,
        in_turns: bool = False,
    ) -> Unit:
        """The unit that `inputs` feed, as (module, rows of a structure, structures that share them)."""
        path = self.family.block(self.index)
        producers: list[Producer] = []
        ends: dict[str, int] = {}
        own, shared = width * linear_at(self.model, f"{path}.{output}").out_features, 0
        for name, rows, sharers in inputs:
            producer = Producer(f"{path}.{name}", ends.get(name, 0), rows, sharers)
            ends[name] = producer.start + rows * structures // sharers
            producers.append(producer)
            parameters = rows * _row_parameters(self.model, producer.module)
            own, shared = (own + parameters, shared) if sharers == 1 else (own, shared + parameters)
        for name, end in ends.items():
            self._check(f"{path}.{name}", _rows(_module(self.model, f"{path}.{name}")), end)
        self._check(f"{path}.{output}", linear_at(self.model, f"{path}.{output}").in_features, width * structures)
        whole = sum(_count(_module(self.model, f"{path}.{name}")) for name in members)
        return Unit(
            name=f"block-{self.index:02d}-{kind}",
            block=self.index,
            kind=kind,
            consumer=f"{path}.{output}",
            producers=tuple(producers),
            structure_width=width,
            structures=structures,
            structure_parameters=own,
            fixed_parameters=whole - structures * own - structures // readers * shared,
            readers=readers,
            shared_parameters=shared,
            in_turns=in_turns,
            lost=lost,
        )

    def _check(self, path: str, found: int, expected: int) -> None:
        if found != expected:
            raise DarwinError(
                f"cannot prune {path}: expected a width of {expected} from the config, found {found}; "
                "its family's row in families.py does not fit it"
            )


def block_sizes(grid: Grid, genome: Genome, config: PretrainedConfig) -> tuple[BlockSizes, ...]:
    """What the genome leaves of each decoder block, as an export writes it.

    An export cannot say which KV head a query head reads. Where groups may have become uneven (`head`), every query
    head gets a KV head of its own.
    """
    left = {
        (unit.block, unit.kind): (unit, unit.structures - removed[level])
        for unit, removed, level in zip(grid.units, grid.removed, genome.levels, strict=True)
    }
    sizes = []
    for block in range(config.num_hidden_layers):
        heads, intermediate = (0, 0), 0
        if (block, "attention") in left:  # an earlier pruning may have removed it
            unit, remaining = left[block, "attention"]
            queries = remaining * unit.structure_width // head_dim(config)
            heads = queries, key_value_heads(unit, remaining, queries)
        if (block, "mlp") in left:
            intermediate = left[block, "mlp"][1]
        sizes.append(BlockSizes(*heads, intermediate))
    return tuple(sizes)


def key_value_heads(unit: Unit, remaining: int, queries: int) -> int:
    """KV heads that an attention with `remaining` structures, of `queries` query heads in all, works with."""
    if unit.uneven and remaining < unit.structures:
        return queries
    return min(unit.groups, remaining)


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


def _rows(module: nn.Module) -> int:
    """Width of a module's output."""
    return next(module.parameters()).shape[0]


def _row_parameters(model: nn.Module, path: str) -> int:
    """Parameters that leave with one output row: none where the module stays whole."""
    module = _module(model, path)
    return _count(module) // module.out_features if isinstance(module, nn.Linear) else 0


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
