"""What a genome costs: in parameters, operations, cache, or levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from transformers import PretrainedConfig

from darwinlm.config.run import ServingConfig
from darwinlm.evaluation.memory import FLOAT
from darwinlm.export.gguf_precision import EMBEDDING, MIXES, OUTPUT, Mix, bytes_of
from darwinlm.genome import Grid
from darwinlm.model.families import key_value_heads
from darwinlm.model.layers import head_counts, head_dim, layer_config, shares
from darwinlm.types import Genome, Kind, Unit


@dataclass(frozen=True)
class Costs:
    """The cost, in one measure, of each unit at each level and of the rest of the model.

    Costs are whole numbers, so that sums are exact and do not depend on their order.

    Attributes:
        measure: name and unit of the measure, as messages show it.
        units: the cost of unit `u` at a level is `units[u][level]`.
        fixed: the cost of what no genome removes, such as embeddings and the final norm.
        rate: whether costs are picoseconds a token, which messages show as tokens a second.
    """

    measure: str
    units: tuple[tuple[int, ...], ...]
    fixed: int
    rate: bool = False

    def of(self, genome: Genome) -> int:
        """Return the cost of the whole model that a genome describes."""
        return self.fixed + sum(costs[level] for costs, level in zip(self.units, genome.levels, strict=True))

    def times(self, factor: int) -> Costs:
        """Return the costs where one of them costs `factor`."""
        units = tuple(tuple(factor * cost for cost in levels) for levels in self.units)
        return Costs(self.measure, units, factor * self.fixed)

    def shown(self, cost: float | int) -> str:
        """A cost as messages show it, without the measure: 4.7B, or for a rate the tokens a second that it means."""
        return f"{PICO / max(cost, 1):.4g}" if self.rate else amount_of(cost)


PICO = 1e12


def amount_of(cost: float | int) -> str:
    """Return an amount as `--target` reads it, for example 4.7B, without a unit."""
    for prefix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if cost >= scale:
            return f"{cost / scale:.4g}{prefix}"
    return f"{cost:.4g}"


def parameter_costs(grid: Grid, dense_parameters: int) -> Costs:
    """Return the costs in parameters of an export.

    Where KV groups differ in size, an export gives every query head a KV head of its own, which these costs include.

    Args:
        dense_parameters: parameters of the whole dense model.
    """
    units = _tabulate(grid, _exported_parameters)
    return Costs("parameters", units, dense_parameters - sum(costs[0] for costs in units))


def shared_parameter_costs(grid: Grid, dense_parameters: int) -> Costs:
    """Return the costs in parameters where query heads that are left share K and V, as the paper counts them.

    They are those of `parameter_costs` unless KV groups can differ in size.
    """
    units = _tabulate(grid, Unit.parameters)
    return Costs("parameters", units, dense_parameters - sum(costs[0] for costs in units))


def level_costs(grid: Grid, kind: Kind) -> Costs:
    """Return the costs in levels of a kind of unit: as many as a unit has not lost yet."""
    units = tuple(
        tuple(grid.highest(i) - level if unit.kind == kind else 0 for level in range(grid.highest(i) + 1))
        for i, unit in enumerate(grid.units)
    )
    names: dict[Kind, str] = {"attention": "attentions", "mlp": "MLPs", "mixer": "mixers"}
    return Costs(f"levels of {names[kind]}", units, 0)


def flop_costs(grid: Grid, config: PretrainedConfig, context: int) -> Costs:
    """Return the costs in floating-point operations for one token of a sequence of `context` tokens.

    They are two for each weight, and those of causal attention, in which a token sees half the sequence on average.
    """

    def flops(unit: Unit, removed: int) -> int:
        weights = max(0, _exported_parameters(unit, removed) - unit.fixed_parameters)
        columns = (unit.structures - removed) * unit.structure_width if unit.kind == "attention" else 0
        return 2 * weights + 2 * columns * context

    return Costs("FLOPs a token", _tabulate(grid, flops), 2 * config.vocab_size * config.hidden_size)


def cache_costs(grid: Grid, config: PretrainedConfig, bytes_each: int) -> Costs:
    """Return the costs in bytes of keys and values that each token adds to the cache.

    Args:
        bytes_each: bytes of one number in the cache.
    """

    def cached(unit: Unit, removed: int) -> int:
        remaining = unit.structures - removed
        if unit.kind != "attention" or not remaining or shares(config, unit.block, "reuse"):
            return 0
        width = head_dim(config, unit.block)
        queries = remaining * unit.structure_width // width
        return 2 * key_value_heads(unit, remaining, queries) * width * bytes_each

    shared = [block for block in range(config.num_hidden_layers) if shares(config, block, "store")]
    keys = (head_counts(layer_config(config, block))[1] * head_dim(config, block) for block in shared)
    fixed = sum(2 * each * bytes_each for each in keys)
    return Costs("bytes of cache a token", _tabulate(grid, cached), fixed)


def memory_costs(weights: Costs, cache: Costs, tokens: int) -> Costs:
    """Return the costs in bytes of weights and of the keys and values of all sequences that are served together.

    Args:
        weights: in bytes.
        cache: in bytes for each token.
        tokens: in the caches of all sequences.
    """
    units = tuple(
        tuple(weight + tokens * cached for weight, cached in zip(*unit, strict=True))
        for unit in zip(weights.units, cache.units, strict=True)
    )
    return Costs("bytes of weights and cache", units, weights.fixed + tokens * cache.fixed)


def weight_costs(grid: Grid, config: PretrainedConfig, dense_parameters: int, form: str) -> Costs:
    """Return the costs in bytes of the weights in a GGUF file, whose type for each matrix depends on its width.

    Args:
        dense_parameters: parameters of the whole dense model.
        form: the type of the file, a key of `MIXES`.
    """
    mix, hidden, blocks = MIXES[form], config.hidden_size, 1 + max(unit.block for unit in grid.units)

    def held(unit: Unit, removed: int) -> int:
        return _bytes_held(unit, removed, mix, hidden, blocks)

    tied, embedding = config.tie_word_embeddings, config.vocab_size * hidden
    names = [EMBEDDING] if tied else [EMBEDDING, OUTPUT]
    ends = sum(embedding * bytes_of(mix.of(name, blocks, tied), hidden) for name in names)
    others = parameter_costs(grid, dense_parameters).fixed - len(names) * embedding
    return Costs("bytes of weights", _tabulate(grid, held), ceil(ends) + FLOAT * max(0, others))


def _bytes_held(unit: Unit, removed: int, mix: Mix, hidden: int, blocks: int) -> int:
    """Bytes of a unit in a GGUF file: of the consumer, whose rows narrow, of values, other producers, and norms."""
    inputs = (unit.structures - removed) * unit.structure_width
    if not inputs:
        return 0
    consumer, values = inputs * hidden, 0
    if unit.kind == "attention":  # what a structure, or its group, has beside a query and a consumer's column
        own = unit.shared_parameters or unit.structure_parameters - 2 * unit.structure_width * hidden
        values = inputs // unit.structure_width // (unit.readers if unit.shared_parameters else 1) * max(0, own) // 2
    producers = max(0, _exported_parameters(unit, removed) - unit.fixed_parameters - consumer - values)
    read = "ffn_down" if unit.kind == "mlp" else "attn_output"
    parts = ((read, consumer, inputs), ("attn_v", values, hidden), ("attn_q", producers, hidden))
    matrices = sum(
        count * bytes_of(mix.of(f"blk.{unit.block}.{name}.weight", blocks, tied=False), width)
        for name, count, width in parts
    )
    return ceil(matrices) + FLOAT * unit.fixed_parameters


def a_token(costs: Costs, what: str, tokens: int) -> Costs:
    """Return nanoseconds of a pass over some tokens as picoseconds a token, of which a rate is made.

    Args:
        what: the pass is, for messages.
    """
    units = tuple(tuple(round(1000 * cost / tokens) for cost in levels) for levels in costs.units)
    return Costs(f"tokens a second of {what}", units, round(1000 * costs.fixed / tokens), rate=True)


def _tabulate(grid: Grid, cost: Callable[[Unit, int], int]) -> tuple[tuple[int, ...], ...]:
    rows = zip(grid.units, grid.removed, strict=True)
    return tuple(tuple(cost(unit, removed) for removed in levels) for unit, levels in rows)


def _exported_parameters(unit: Unit, removed: int) -> int:
    remaining = unit.structures - removed
    if unit.uneven and removed and remaining:
        return remaining * (unit.structure_parameters + unit.shared_parameters) + unit.fixed_parameters
    return unit.parameters(removed)


def counted_costs(
    measure: str,
    grid: Grid,
    config: PretrainedConfig,
    dense_parameters: int,
    context: int,
    bytes_each: int,
    serving: ServingConfig,
) -> Costs:
    """Return the costs in a measure that can be counted: params, flops, kv-cache or memory.

    Args:
        dense_parameters: parameters of the whole dense model.
        context: tokens of a sequence, of which causal attention sees half on average.
        bytes_each: bytes of one number in the cache, and of a weight, in the checkpoint's precision.
        serving: the form of the weights, and the sequences in the cache, of which memory is counted.
    """
    if measure == "flops":
        return flop_costs(grid, config, context)
    if measure == "kv-cache":
        return cache_costs(grid, config, bytes_each)
    if measure == "memory":
        tokens = serving.batch * serving.context
        if serving.format == "auto":
            weights = parameter_costs(grid, dense_parameters).times(bytes_each)
            return memory_costs(weights, cache_costs(grid, config, bytes_each), tokens)
        cache = cache_costs(grid, config, FLOAT if serving.format == "f32" else 2)  # llama.cpp's is float16
        return memory_costs(weight_costs(grid, config, dense_parameters, serving.format), cache, tokens)
    assert measure == "params"
    return parameter_costs(grid, dense_parameters)
