"""A conformance suite for every family and every attention structure, on tiny random models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

import pruned
import tiny
from darwinlm.database.calibrate import calibrate
from darwinlm.database.levels import Level
from darwinlm.database.stitch import NoAttn, repeat_shared
from darwinlm.genome import level_grid, prunable_parameters
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import FAMILIES, block_sizes, find_family, find_units, head_dim, linear_at
from darwinlm.types import DarwinError, Genome, Structure, Unit, UsageError
from pruned import Pruned

STRUCTURES: tuple[Structure, ...] = ("kv_group", "balanced", "head")
CASES = [
    (model, structure)
    for model in tiny.CONFIGS
    for structure in STRUCTURES
    if structure == "kv_group" or "mha" not in model
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    """A tiny model of a family, with its database."""
    model, structure = request.param
    return pruned.prune(checkpoints[model], tmp_path_factory.mktemp(f"{model}-{structure}"), structure)


def units_of(model: str, structure: Structure = "kv_group") -> tuple[Unit, ...]:
    config = tiny.CONFIGS[model]
    with torch.device("meta"):
        return find_units(AutoModelForCausalLM.from_config(config), config, structure)


def test_every_row_of_the_table_has_a_tiny_model() -> None:
    assert {config.model_type for config in tiny.CONFIGS.values()} == set(FAMILIES)


def test_hessians_equal_those_of_the_whole_model(case: Pruned) -> None:
    """Block by block gives what hooks on the dense model's own forward give, in float64."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.update({name: args[0].flatten(0, 1).double()})

    hooks = [
        case.dense.get_submodule(unit.consumer).register_forward_pre_hook(keep(unit.name))
        for unit in case.checkpoint.units
    ]
    case.dense(pruned.token_ids())
    for hook in hooks:
        hook.remove()
    # 6 sequences: a smaller last batch
    statistics = list(calibrate(case.checkpoint, pruned.token_ids(), batch_size=4, device=pruned.CPU))
    assert [s.unit for s in statistics] == list(case.checkpoint.units)
    for calibrated in statistics:
        x = inputs[calibrated.unit.name]
        torch.testing.assert_close(calibrated.hessian.double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)
        assert calibrated.tokens == len(x) == 192


def test_stitched_logits_equal_the_zero_masked_models(case: Pruned) -> None:
    ids = pruned.token_ids(1)
    for genome in case.genomes():
        expected = pruned.zero_masked(case.dense, case.database, genome)(ids).logits
        torch.testing.assert_close(case.stitcher.stitch(genome)(ids).logits, expected, rtol=1e-4, atol=2e-4)


def test_activations_in_a_file_give_the_same_statistics(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint(checkpoints["gemma3"])
    held, spilled = (
        list(calibrate(checkpoint, pruned.token_ids(), batch_size=4, device=pruned.CPU, dtype=dtype, spill_bytes=size))
        for dtype, size in ((torch.bfloat16, 1 << 30), (torch.bfloat16, 0))
    )
    assert all(torch.equal(one.hessian, other.hessian) for one, other in zip(held, spilled, strict=True))


def test_units_already_measured_are_passed_through(checkpoints: dict[str, Path]) -> None:
    checkpoint, ids = Checkpoint(checkpoints["phi3"]), pruned.token_ids()
    everything = {s.unit.name: s.hessian for s in calibrate(checkpoint, ids, batch_size=4, device=pruned.CPU)}
    done = [unit.name for unit in checkpoint.units[:3]]
    rest = list(calibrate(checkpoint, ids, batch_size=4, device=pruned.CPU, finished=done))
    assert [s.unit.name for s in rest] == [unit.name for unit in checkpoint.units[3:]]
    assert all(torch.equal(s.hessian, everything[s.unit.name]) for s in rest)


def test_a_bfloat16_forward_measures_nearly_the_same(checkpoints: dict[str, Path]) -> None:
    checkpoint, ids = Checkpoint(checkpoints["llama-gqa"]), pruned.token_ids()
    exact, rounded = (
        list(calibrate(checkpoint, ids, batch_size=4, device=pruned.CPU, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(exact, rounded, strict=True):
        assert other.hessian.dtype == torch.float32
        assert 0 < float((one.hessian - other.hessian).norm() / one.hessian.norm()) < 0.1


def surplus(level: Level) -> int:
    """Parameters of K and V that a unit's cost counts and that its kept set does not need."""
    unit = level.unit
    read = len({structure // unit.readers for structure in level.kept.tolist()})
    return (min(unit.groups, len(level.kept)) - read) * unit.shared_parameters


def test_stitched_model_is_as_small_as_its_genome_says(case: Pruned) -> None:
    grid, size = case.database.grid, sum(parameter.numel() for parameter in case.dense.parameters())
    for genome in case.genomes():
        left = sum(parameter.numel() for parameter in case.stitcher.stitch(genome).parameters())
        levels = [
            case.database.level(index, level)
            for index, level in enumerate(genome.levels)
            if 0 < level < grid.highest(index)
        ]
        unread = sum(surplus(level) for level in levels)
        assert unread == 0 or any(level.unit.uneven for level in levels)
        assert size - left == prunable_parameters(grid, grid.dense()) - prunable_parameters(grid, genome) + unread


def test_groups_stay_even_unless_any_head_may_go(case: Pruned) -> None:
    grid = case.database.grid
    for index, unit in enumerate(grid.units):
        for level in range(1, grid.highest(index)):
            kept = case.database.level(index, level).kept
            sizes = torch.bincount(kept // unit.readers, minlength=unit.groups)
            assert unit.uneven or set(sizes.tolist()) <= {0, int(sizes.max())}
            assert not unit.in_turns or int(sizes.min()) > 0


def test_the_dense_models_head_counts_are_left_alone(case: Pruned) -> None:
    before = case.dense(pruned.token_ids(3)).logits
    heads = case.dense.config.num_attention_heads
    case.stitcher.stitch(Genome((1,) * len(case.database.grid.units)))
    assert case.dense.config.num_attention_heads == heads
    assert torch.equal(case.dense(pruned.token_ids(3)).logits, before)


def test_written_out_attentions_have_the_sizes_that_an_export_says(case: Pruned) -> None:
    config, ids = case.dense.config, pruned.token_ids(2)
    for genome in case.genomes():
        model = case.stitcher.stitch(genome)
        logits = model(ids).logits
        repeat_shared(model)
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
        for unit, sizes in zip(
            case.database.grid.units[::2], block_sizes(case.database.grid, genome, config), strict=True
        ):
            attention = model.get_submodule(f"{case.checkpoint.family.block(unit.block)}.self_attn")
            if isinstance(attention, NoAttn):
                assert sizes.query_heads == sizes.key_value_heads == 0
                continue
            assert linear_at(model, unit.consumer).in_features == sizes.query_heads * head_dim(config)
            assert sizes.query_heads == sizes.key_value_heads * int(attention.num_key_value_groups)  # pyright: ignore[reportArgumentType]
            value = unit.producers[2].module
            if len({producer.module for producer in unit.producers}) == 3:
                assert linear_at(model, value).out_features == sizes.key_value_heads * head_dim(config)


def test_uneven_groups_were_among_the_cases(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """So that the tests above have seen what they are for."""
    case = pruned.prune(checkpoints["phi3"], tmp_path, "head")
    kept = [case.database.level(index, 1).kept for index in range(0, 6, 2)]
    assert any(len(set(torch.bincount(k // 2, minlength=4).tolist()) - {0}) > 1 for k in kept)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_grouped_queries_every_structure_is_the_head(structure: Structure) -> None:
    assert units_of("llama-mha", structure) == units_of("llama-mha")


def test_fewer_structures_than_levels_are_told() -> None:
    """Where ten levels are asked for, a unit of four groups has four, and one sentence says so."""
    expected: dict[Structure, tuple[int, str]] = {
        "kv_group": (4, "4 structures"),
        "head": (8, "8 structures"),
        "balanced": (2, "8 structures to lose, 4 at a time"),
    }
    for structure, (count, capacity) in expected.items():
        grid = level_grid(units_of("qwen2", structure), 10, 4)
        assert grid.removed[0] == tuple(range(0, grid.units[0].structures + 1, grid.units[0].structures // count))
        (sentence,) = grid.fewer(10)
        assert re.search(f"attention units have {count} levels instead of 10: they have {capacity}", sentence)


def test_norms_over_all_heads_keep_their_projections() -> None:
    """Only V and O of an OLMo 2 attention shrink, because its norms of Q and K must see every head."""
    config = tiny.CONFIGS["olmo2"]
    unit = units_of("olmo2")[0]
    # a group: one V head of 4 rows with biases, and 8 columns of O
    assert unit.structure_parameters == 4 * (config.hidden_size + 1) + 8 * config.hidden_size
    assert unit.parameters(0) - unit.parameters(3) == 3 * unit.structure_parameters


def test_an_unsupported_family_is_told_which_ones_are() -> None:
    with pytest.raises(UsageError, match=r"'gpt2': darwinlm prunes gemma2, .*starcoder2; convert"):
        find_family(GPT2Config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "self_attn.w_v"}, r"expected a module model\.layers\.0\.self_attn\.w_v, found none"),
        ({"mlp_norms": ("ffn_norm",)}, r"expected a module model\.layers\.0\.ffn_norm, found none"),
        ({"mlp_output": "mlp.act_fn"}, r"model\.layers\.0\.mlp\.act_fn: expected a linear module, found SiLU"),
        ({"query": "self_attn.k_proj"}, r"self_attn\.k_proj: expected a width of 96 from the config, found 32"),
    ],
)
def test_a_row_that_does_not_fit_names_the_attribute(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], **change))
    with pytest.raises(DarwinError, match=message):
        units_of("llama-gqa")


def test_a_config_of_other_sizes_than_the_model_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS["qwen2"])
    other = copy.copy(tiny.CONFIGS["qwen2"])
    other.intermediate_size = 96
    with pytest.raises(DarwinError, match=r"gate_proj: expected a width of 96 from the config, found 64"):
        find_units(model, other)
