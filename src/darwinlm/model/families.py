"""Where a model keeps its units, which are built from the roles of its modules.

No other module of the package knows anything of a single family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from darwinlm.config.run import DatabaseConfig
from darwinlm.genome import Grid, level_grid
from darwinlm.model.family import Family, Fused
from darwinlm.model.flow import is_selection
from darwinlm.model.layers import dense_sizes, family_of, head_counts, head_dim, is_pruned, layer_config, shares
from darwinlm.model.roles import find_roles
from darwinlm.model.size import parameter_count
from darwinlm.types import BlockSizes, DarwinError, Genome, Kind, Producer, Structure, Unit, UsageError

# How the rows of fused projections lie, which cannot be derived.
ROWS: dict[str, Fused] = {
    "bloom": "by head",
    "falcon": "by head",
    "glm": "in order",
    "glm4": "in order",
    "gpt2": "in order",
    "gpt_bigcode": "by head",
    "gpt_neox": "by head",
    "granitemoehybrid": "in order",
    "moshi": "in order",
    "mpt": "in order",
    "persimmon": "by head",
    "phi3": "in order",
    "qwen3_5_text": "gated by head",
    "qwen3_next": "gated by head",
}

# Families whose attentions are given something for each head, such as slopes by position (ALiBi), for which the code of
# their exports has lines more.
GIVEN_BY_HEAD = ("bloom", "falcon", "mpt")
# Families whose heads of queries and keys are normed together, by a norm that goes on seeing all heads.
NORMED_OVER_HEADS = ("olmo2", "olmo3")
# Families whose output embedding has another name in older versions of transformers.
RENAMED = ("gpt_neox",)
# Families whose blocks scale the stream, or add to it what they are given, and stay whatever is left of them.
STAYING = ("gemma4_text", "gemma4_unified_text")
HEADS = "bias_heads"  # the module of such an attention that holds which of the heads before pruning it has

_LATENT = "model.layers.0.self_attn.kv_b_proj: expected rows for each KV head, found those of a latent vector"
# Why families are refused that the flow of one block would not tell: the module, what was expected, what was found.
REFUSED = {
    "bitnet": "model.layers.0.self_attn.attn_sub_norm: expected an output projection of heads, found a norm before it",
    "codegen": "transformer.h.0.attn.qkv_proj: expected rows of query, key and value, found four parts of each",
    "cpmant": "cpmant.encoder: expected a state for each token, found some of a prompt before them",
    "deepseek_v3": _LATENT,
    "gemma3n_text": "model.layers.0.altup: expected one stream of hidden states, found several that each block mixes",
    "gpt_neox_japanese": "gpt_neox_japanese.layers.0.attention: expected states and weights, found a bias beside them",
    "hrm_text": "model.L_module: expected one list of blocks, found two that call each other",
    "minicpm3": _LATENT,
    "modernbert-decoder": "lm_head: expected an output embedding that reads the final norm, found a layer between them",
    "openai-gpt": "transformer.h.0.ln_1: expected norms before the units, found the stream itself normed after each",
    "xlm": "transformer.layer_norm1.0: expected norms before the units, found the stream itself normed after each",
    "youtu": _LATENT,
}


def find_family(model: PreTrainedModel) -> Family:
    """Return where a model keeps its units, derived from its modules. The model may be on the meta device.

    A model that darwinlm has pruned has the family that it was pruned from.

    Raises:
        UsageError: if a module fits no role; it names the module.
    """
    name = family_of(model.config)
    if name in REFUSED:
        raise UsageError(f"cannot prune {REFUSED[name]}; convert the model to another family")
    family = find_roles(model, ROWS.get(name))
    if family.biases and name not in GIVEN_BY_HEAD:
        raise UsageError(
            f"cannot prune {family.block(0)}.{family.attention}: expected heads that differ in their weights alone, "
            f"found {family.biases[0]}, which biases each; convert the model to another family"
        )
    if family.query not in family.projections and name not in NORMED_OVER_HEADS:
        raise UsageError(
            f"cannot prune {family.block(0)}.{family.query}: expected a norm of each head, found one over all; "
            "convert the model to another family"
        )
    if family.remains and name not in STAYING:
        raise UsageError(
            f"cannot prune {family.block(0)}: expected a block that gives what it is given once its units are gone, "
            "found more in it; convert the model to another family"
        )
    return family


def modules_around(model: nn.Module, family: Family) -> list[str]:
    """Return the modules with weights that run before the blocks, beside lookups of tokens: learned positions."""
    others = (f"{family.blocks}.", f"{family.final_norm}.", *(f"{path}." for path in lookups(family)))
    return [
        path
        for path, module in model.get_submodule(family.backbone).named_modules(prefix=family.backbone)
        if next(module.parameters(recurse=False), None) is not None and not f"{path}.".startswith(others)
    ]


def lookups(family: Family) -> tuple[str, ...]:
    """The embeddings that are looked up by token."""
    return family.embedding, *family.lookups


def mlp_width(model: nn.Module, family: Family, block: int) -> int:
    """The number of channels of a block's MLP."""
    return linear_at(model, f"{family.block(block)}.{family.mlp_output}").in_features


def find_units(model: PreTrainedModel, config: PretrainedConfig, structure: Structure = "kv_group") -> tuple[Unit, ...]:
    """Return every attention, MLP and mixer of the model, block by block. The model may be on the meta device.

    A unit of a pruned model has the structures that are left in it, and its field `lost` counts those already removed.
    An attention whose keys and values other blocks read is no unit and stays. One that reads those of another block
    keeps all KV heads, and loses a query head of each group at a time, or everything.

    Args:
        structure: what an attention loses at a time: a KV head with the query heads that read it (`kv_group`); any
            query head, while its KV head stays as long as another query head reads it (`head`, as in the paper); or a
            query head of each KV group in turn (`balanced`). Without grouped queries, all three are one head.

    Raises:
        UsageError: as `find_family` does.
        DarwinError: if a block lacks a module of the family, or a module differs from the size in the config.
    """
    family = find_family(model)
    units: list[Unit] = []
    for block in range(config.num_hidden_layers):
        modules, layer = _Block(model, family, block), layer_config(config, block)
        if modules.has(family.attention_output) and not shares(config, block, "store"):
            units.append(_attention(modules, layer, config, structure))
        if modules.has(family.mixer_output):
            units.append(_mixer(modules))
        if modules.has(family.mlp_output):
            units.append(_mlp(modules, config))
    return tuple(units)


def find_grid(model: PreTrainedModel, config: PretrainedConfig, settings: DatabaseConfig) -> Grid:
    """Return the levels of every unit of the model. Raises what `find_units` and `level_grid` raise."""
    units = find_units(model, config, settings.structure)
    return level_grid(units, settings.levels, settings.granularity, settings.divisible_by)


def _attention(block: _Block, layer: PretrainedConfig, config: PretrainedConfig, structure: Structure) -> Unit:
    family, width = block.family, head_dim(config, block.index)
    queries, keys = head_counts(layer)
    reads = shares(config, block.index, "reuse")
    readers = queries // keys
    heads = readers if structure == "kv_group" and not reads else 1  # query heads in one structure
    sharers = readers // heads  # structures that share a KV head
    structures = queries // heads
    if family.by_head and sharers > 1:
        raise UsageError(
            f"cannot prune {family.block(block.index)}.{family.query}: expected KV groups to leave whole, "
            f"for their rows lie together, found the structure {structure}; use --database.structure kv_group"
        )
    lost = 0
    if is_pruned(config):
        dense_queries, dense_keys, _ = dense_sizes(config, block.index)
        lost = (dense_queries if heads == 1 else dense_keys) - structures
    return block.unit(
        "attention",
        inputs=_attention_inputs(block, width, heads, sharers, reads),
        output=family.attention_output,
        members=(family.attention, *family.attention_norms),
        width=heads * width,
        structures=structures,
        lost=lost,
        readers=sharers,
        in_turns=reads or (structure == "balanced" and sharers > 1),
    )


def _attention_inputs(block: _Block, width: int, heads: int, sharers: int, reads: bool) -> list[_Input]:
    """The modules whose rows an attention's structures read.

    Args:
        width: of a head.
        heads: query heads in one structure.
        sharers: structures that share a KV head.
        reads: whether keys and values are those of another block.
    """
    family = block.family
    if family.by_head:
        return [_Input(family.query, (heads + 2) * width)]
    query = _Input(family.query, heads * width * (2 if family.gate == family.query else 1))
    shared = [_Input(family.key, width, sharers), _Input(family.value, width, sharers)]
    return [query, *shared[: 0 if reads else 1 if block.index in family.values_of_keys else 2]]


def _mixer(block: _Block) -> Unit:
    family = block.family
    output = linear_at(block.model, f"{family.block(block.index)}.{family.mixer_output}")
    members = (family.mixer, *family.mixer_norms)
    return block.unit(
        "mixer", inputs=[], output=family.mixer_output, members=members, width=output.in_features, structures=1, lost=0
    )


def _mlp(block: _Block, config: PretrainedConfig) -> Unit:
    family = block.family
    structures = linear_at(block.model, f"{family.block(block.index)}.{family.mlp_output}").in_features
    return block.unit(
        "mlp",
        inputs=[_Input(name, 1) for name in family.mlp_inputs],
        output=family.mlp_output,
        members=(*([family.mlp] if family.mlp else {*family.mlp_inputs, family.mlp_output}), *family.mlp_norms),
        width=1,
        structures=structures,
        lost=dense_sizes(config, block.index)[2] - structures if is_pruned(config) else 0,
    )


@dataclass(frozen=True)
class _Input:
    """A module whose output rows feed the structures of a unit.

    Attributes:
        module: its path, relative to the decoder block.
        rows: how many of its output rows a structure reads.
        readers: how many structures read the same rows.
    """

    module: str
    rows: int
    readers: int = 1


@dataclass(frozen=True)
class _Block:
    """One decoder block of a model, from whose modules units are built."""

    model: nn.Module
    family: Family
    index: int

    def has(self, path: str) -> bool:
        """Whether the block has a linear module at a path that is not empty; pruning may have removed it."""
        modules = dict(self.model.get_submodule(self.family.block(self.index)).named_modules())
        return isinstance(modules.get(path), nn.Linear)

    def unit(
        self,
        kind: Kind,
        *,
        inputs: Sequence[_Input],
        output: str,
        members: Sequence[str],
        width: int,
        structures: int,
        lost: int,
        readers: int = 1,
        in_turns: bool = False,
    ) -> Unit:
        """Return the unit whose structures read the rows of `inputs`, and are read by the linear module `output`.

        Raises:
            DarwinError: if one of these modules is missing, or its width is not that of `structures` structures.
        """
        path = self.family.block(self.index)
        producers: list[Producer] = []
        ends: dict[str, int] = {}
        own, shared = width * linear_at(self.model, f"{path}.{output}").out_features, 0
        for source in inputs:
            start = ends.get(source.module, 0)  # where the rows of the input before it end, in a fused projection
            producer = Producer(f"{path}.{source.module}", start, source.rows, source.readers)
            ends[source.module] = start + source.rows * structures // source.readers
            producers.append(producer)
            parameters = source.rows * _row_parameters(self.model, producer.module)
            own, shared = (own + parameters, shared) if source.readers == 1 else (own, shared + parameters)
        for name, end in ends.items():
            self._check(f"{path}.{name}", _rows(_module(self.model, f"{path}.{name}")), end)
        self._check(f"{path}.{output}", linear_at(self.model, f"{path}.{output}").in_features, width * structures)
        whole = sum(parameter_count(_module(self.model, f"{path}.{name}")) for name in members)
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

    def _check(self, path: str, width: int, expected: int) -> None:
        if width != expected:
            raise DarwinError(
                f"cannot prune {path}: expected a width of {expected} from the config, found {width}; "
                "convert the model to another family"
            )


def block_sizes(grid: Grid, genome: Genome, config: PretrainedConfig) -> tuple[BlockSizes, ...]:
    """Return what the genome leaves of each decoder block, in the form in which an export writes it.

    An export cannot say which KV head a query head reads. So where KV groups may have come to differ in size (the
    structure `head`), every query head gets a KV head of its own.
    """
    remainders = {
        (unit.block, unit.kind): (unit, unit.structures - removed[level])
        for unit, removed, level in zip(grid.units, grid.removed, genome.levels, strict=True)
    }
    sizes = []
    for block in range(config.num_hidden_layers):
        heads, intermediate, mixer = (0, 0), 0, False
        if shares(config, block, "store"):
            heads = head_counts(layer_config(config, block))
        if (block, "attention") in remainders:  # an earlier pruning may have removed it
            unit, remaining = remainders[block, "attention"]
            queries = remaining * unit.structure_width // head_dim(config, block)
            heads = queries, key_value_heads(unit, remaining, queries)
        if (block, "mlp") in remainders:
            intermediate = remainders[block, "mlp"][1]
        if (block, "mixer") in remainders:
            mixer = bool(remainders[block, "mixer"][1])
        sizes.append(BlockSizes(*heads, intermediate, mixer))
    return tuple(sizes)


def block_sizes_of(model: PreTrainedModel) -> tuple[BlockSizes, ...]:
    """Return the sizes of each block of a model, pruned or dense, which may be on the meta device."""
    units = find_units(model, model.config)
    grid = Grid(units, ((0,),) * len(units))
    return block_sizes(grid, grid.dense(), model.config)


def key_value_heads(unit: Unit, remaining: int, queries: int) -> int:
    """How many KV heads an export gives an attention of which `remaining` structures, with `queries` heads, remain."""
    if unit.uneven and remaining < unit.structures:
        return queries
    return min(unit.groups, remaining)


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """Return the linear module at a path. Raises `DarwinError` if there is none."""
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
            "convert the model to another family"
        ) from None


def _rows(module: nn.Module) -> int:
    """How many output rows a module has: its output's width."""
    return len(module.index) if is_selection(module) else next(module.parameters()).shape[0]


def _row_parameters(model: nn.Module, path: str) -> int:
    """How many parameters are removed with one output row: none where the module is no linear one and stays whole."""
    module = _module(model, path)
    return parameter_count(module) // module.out_features if isinstance(module, nn.Linear) else 0
