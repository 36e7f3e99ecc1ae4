"""A conformance suite for every family and every attention structure, on tiny random models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import pruned
import tiny
from darwinlm.database.calibrate import calibrate
from darwinlm.database.levels import Level
from darwinlm.database.stitch import NoAttn, repeat_shared
from darwinlm.genome import level_grid, prunable_parameters
from darwinlm.model import families
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import ROWS, block_sizes, find_family, find_units, linear_at
from darwinlm.model.layers import head_dim
from darwinlm.types import DarwinError, Genome, Structure, Unit, UsageError
from pruned import Pruned

STRUCTURES: tuple[Structure, ...] = ("kv_group", "balanced", "head")
CASES = [
    (model, structure)
    for model in tiny.CONFIGS
    for structure in STRUCTURES
    if structure == ("head" if "mqa" in model else "kv_group")
    or not model.endswith(("mha", "mqa", "fused-gqa", "hybrid"))
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


def test_every_kind_of_row_has_a_tiny_model() -> None:
    rows = {ROWS.get(config.model_type) for config in tiny.CONFIGS.values()}
    assert rows == {None, *ROWS.values()}


def test_hessians_equal_those_of_the_whole_model(case: Pruned) -> None:
    """Block by block gives what hooks on the dense model's own forward give, in float64."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.update({name: args[0].flatten(0, -2).double()})

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
        sizes_of = block_sizes(case.database.grid, genome, config)
        for index in case.database.grid.kinds()["attention"]:
            unit = case.database.grid.units[index]
            sizes = sizes_of[unit.block]
            family = case.checkpoint.family
            attention = model.get_submodule(f"{family.block(unit.block)}.{family.attention}")
            if isinstance(attention, NoAttn):
                assert sizes.query_heads == sizes.key_value_heads == 0
                continue
            width = head_dim(config, unit.block)
            assert linear_at(model, unit.consumer).in_features == sizes.query_heads * width
            readers = int(getattr(attention, "num_key_value_groups", sizes.query_heads // sizes.key_value_heads))
            assert sizes.query_heads == sizes.key_value_heads * readers
            value = unit.producers[-1].module
            if len({producer.module for producer in unit.producers}) == 3:
                assert linear_at(model, value).out_features == sizes.key_value_heads * width


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


class Gated(nn.Module):
    """A projection with a gate, or whatever else stands before it."""

    def __init__(self, linear: nn.Linear, before: nn.Module):
        super().__init__()
        self.linear, self.before = linear, before

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states * self.before(states).sigmoid())


def replace_module(path: str, make: Callable[[Any], nn.Module]) -> Callable[[PreTrainedModel], None]:
    return lambda model: model.set_submodule(path, make(model.get_submodule(path)))


def add_sinks(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.0.self_attn").register_parameter("sinks", nn.Parameter(torch.zeros(8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_sinks, r"model\.layers\.0\.self_attn\.sinks: expected a projection or a norm"),
        (
            replace_module("model.layers.0.self_attn.o_proj", lambda linear: Gated(linear, nn.Linear(64, 64))),
            r"self_attn\.o_proj\.before: expected one projection in self_attn that reads attention alone",
        ),
        (
            replace_module("model.layers.0.mlp.down_proj", lambda linear: nn.Sequential(nn.LayerNorm(64), linear)),
            r"mlp\.down_proj\.0: expected an MLP whose inputs meet in mlp\.down_proj\.1",
        ),
        (
            replace_module("model.layers.2.mlp.act_fn", lambda _: nn.LayerNorm(64)),
            r"model\.layers\.2\.mlp\.act_fn: expected an MLP whose inputs meet in mlp\.down_proj",
        ),
        (
            replace_module("model.layers.2.mlp.up_proj", nn.Sequential),
            r"model\.layers\.2: expected as mlp_inputs .*, as in other blocks, found .*up_proj\.0",
        ),
        (lambda model: model.model.layers.__setitem__(2, model.model.layers[0]), r"model\.layers\.2: .* its own"),
        (lambda model: setattr(model.model, "layers", model.model.layers[:2]), "a list of 3 blocks, found none"),
    ],
)  # fmt: skip
def test_a_module_without_a_role_is_named(change: Callable[[PreTrainedModel], None], message: str) -> None:
    model = tiny.build("llama-gqa")
    change(model)
    with pytest.raises(UsageError, match=message):
        find_family(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.REFUSED)
def test_a_family_that_is_refused_has_the_module_that_is_named(name: str) -> None:
    config_class: Any = CONFIG_MAPPING[name]
    unshared = {"num_kv_shared_layers": 0} if name == "gemma3n_text" else {}  # with two layers there are none to share
    config = config_class(num_hidden_layers=2, **unshared)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    path = families.REFUSED[name].partition(":")[0]
    assert model.get_submodule(path)
    with pytest.raises(UsageError, match=rf"^cannot prune {re.escape(path)}: expected .*, found "):
        find_family(model)


def test_what_each_head_is_given_is_refused_where_exports_cannot_pick_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "GIVEN_BY_HEAD", ())
    with pytest.raises(UsageError, match=r"transformer\.h\.0\.self_attention: .* found alibi, which biases each"):
        find_family(tiny.build("bloom-mha"))


def test_a_norm_over_all_heads_is_refused_where_exports_cannot_select_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "NORMED_OVER_HEADS", ())
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_norm: .* found one over all"):
        find_family(tiny.build("olmo2"))


@pytest.mark.parametrize("structure", ["head", "balanced"])
def test_groups_whose_rows_lie_together_leave_whole(structure: Structure) -> None:
    with pytest.raises(UsageError, match=rf"self_attention\.query_key_value: .* found the structure {structure}"):
        units_of("falcon-fused-gqa", structure)


def test_roles_do_not_depend_on_names() -> None:
    """A module in another module, under another name, has the same role."""
    model, before = tiny.build("gemma3"), tiny.build("gemma3")
    for block in range(3):
        for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "post_feedforward_layernorm"):
            replace_module(f"model.layers.{block}.{name}", nn.Sequential)(model)
    found, expected = find_family(model), find_family(before)
    assert found.value == f"{expected.value}.0" == "self_attn.v_proj.0"
    assert found.attention_output == "self_attn.o_proj.0"
    assert found.mlp_inputs == ("mlp.gate_proj", "mlp.up_proj.0")
    assert found.mlp_norms == ("pre_feedforward_layernorm", "post_feedforward_layernorm.0")
    assert found.attention_norms == expected.attention_norms == ("input_layernorm", "post_attention_layernorm")


def test_a_config_of_other_sizes_than_the_model_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS["qwen2"])
    other = copy.copy(tiny.CONFIGS["qwen2"])
    other.num_key_value_heads = 2
    with pytest.raises(DarwinError, match=r"k_proj: expected a width of 8 from the config, found 16"):
        find_units(model, other)
