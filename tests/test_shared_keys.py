"""Blocks that read the keys and values of earlier ones, are given embeddings of each token, and scale the stream."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4TextConfig, PretrainedConfig

import pruned
import tiny
from darwinlm.config.run import LatencyConfig, SearchConfig
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import repeat_shared
from darwinlm.export.vllm import check_vllm, zero_stubs
from darwinlm.model.families import STAYING, block_sizes, block_sizes_of, find_family
from darwinlm.model.layers import head_dim, shares
from darwinlm.model.pruned import pruned_config
from darwinlm.model.reading import load
from darwinlm.runtime.files import read_json
from darwinlm.search.costs import cache_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.latency import latency_costs
from darwinlm.types import BlockSizes, Genome, SelectionStage, UsageError

NAME = "gemma4-shared-mqa"
STORES, READERS = (2, 3), (4, 5)


@pytest.fixture(scope="module")
def case(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> pruned.Pruned:
    return pruned.prune(checkpoints[NAME], tmp_path_factory.mktemp("shared"), "head")


@pytest.fixture(scope="module")
def exported(case: pruned.Pruned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the attention of a reader and the MLP of another."""
    return pruned.write_export(
        case, without(case, (4, "attention"), (5, "mlp")), tmp_path_factory.mktemp("export") / "x"
    )


def without(case: pruned.Pruned, *gone: tuple[int, str]) -> Genome:
    grid = case.database.grid
    levels = [grid.highest(i) if (unit.block, unit.kind) in gone else 1 for i, unit in enumerate(grid.units)]
    return Genome(tuple(levels))


def test_attentions_that_share_keep_their_kv_heads(case: pruned.Pruned) -> None:
    units = {(unit.block, unit.kind): unit for unit in case.database.grid.units}
    assert not [block for block in STORES if (block, "attention") in units]
    for block in READERS:
        unit = units[block, "attention"]
        path = f"{case.checkpoint.family.block(block)}.self_attn.q_proj"
        assert [producer.module for producer in unit.producers] == [path]
        assert unit.in_turns
        assert unit.shared_parameters == 0
    for genome in case.genomes():
        sizes = block_sizes(case.database.grid, genome, case.dense.config)
        assert [sizes[block].query_heads for block in STORES] == [8, 8]
        assert {sizes[block].key_value_heads for block in (*STORES, *READERS)} <= {0, 1}


def test_readers_of_several_kv_heads_lose_a_query_head_of_each() -> None:
    config: Any = copy.deepcopy(tiny.CONFIGS[NAME])
    config.num_key_value_heads = 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    units = pruned.find_units(model, config)
    grid = pruned.level_grid(units, 4, 8)
    for index in [i for i in grid.kinds()["attention"] if units[i].block in READERS]:
        assert (units[index].structures, units[index].groups) == (8, 4)
        assert grid.removed[index] == (0, 4, 8)


def test_what_blocks_hand_on_may_lie_in_a_file(case: pruned.Pruned) -> None:
    held, spilled = (
        list(calibrate(case.checkpoint, pruned.token_ids(), batch_size=4, device=pruned.CPU, spill_bytes=size))
        for size in (1 << 30, 0)
    )
    assert all(torch.equal(one.hessian, other.hessian) for one, other in zip(held, spilled, strict=True))


@pytest.mark.parametrize("keeps_states", [True, False])
def test_a_population_in_lockstep_has_the_divergences_of_zero_masked_models(
    case: pruned.Pruned, keeps_states: bool
) -> None:
    """Mutants of a parent begin behind, at and before the blocks whose keys and values others read."""
    stage, text, dense = SelectionStage(1, 64), pruned.token_ids(3, 2), case.database.grid.dense()
    config = SearchConfig(stages=(stage,), scrambled=0.0)
    fitness = Fitness(case.stitcher, text, text, config, keeps_states=keeps_states)
    mutants = [dense.replace({index: 1}) for index in range(len(dense.levels))]
    log_p = case.dense(text).logits.double().log_softmax(-1)
    for genome, score in zip(mutants, fitness.scores(mutants, stage, dense), strict=True):
        log_q = pruned.zero_masked(case.dense, case.database, genome)(text).logits.double().log_softmax(-1)
        assert score == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), abs=1e-4)


def test_the_cache_is_as_large_as_the_costs_say(case: pruned.Pruned, exported: Path) -> None:
    """Within the window, where no layer has forgotten anything: readers add nothing to it."""
    genome, tokens = without(case, (4, "attention"), (5, "mlp")), 6
    cache = load(exported, torch.float32)(pruned.token_ids(1)[:1, :tokens], use_cache=True).past_key_values
    held = [each for layer in cache.layers for each in (layer.keys, layer.values) if each is not None]
    costs = cache_costs(case.database.grid, case.dense.config, 4)
    assert sum(each.numel() * each.element_size() for each in held) == tokens * costs.of(genome)


def test_a_block_that_has_lost_everything_stays_and_scales_the_stream(case: pruned.Pruned, tmp_path: Path) -> None:
    genome, ids = without(case, (1, "attention"), (1, "mlp")), pruned.token_ids(1)
    out = pruned.write_export(case, genome, tmp_path / "export")
    model: Any = load(out, torch.float32)
    assert block_sizes_of(model)[1].empty
    twin: Any = pruned.zero_masked(case.dense, case.database, genome)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=2e-4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))


def test_keys_that_a_published_checkpoint_holds_for_readers_are_passed_over(
    case: pruned.Pruned, tmp_path: Path
) -> None:
    """E2B's has projections of keys and values, and a norm, in every block."""
    out, extra = shutil.copytree(case.checkpoint.path, tmp_path / "model"), {}
    for block in READERS:
        own = f"{case.checkpoint.family.block(block)}.self_attn"
        width = head_dim(case.dense.config, block)
        extra |= {f"{own}.{name}_proj.weight": torch.ones(width, 32) for name in "kv"}
        extra |= {f"{own}.k_norm.weight": torch.ones(width)}
    save_file(load_file(out / "model.safetensors") | extra, out / "model.safetensors", {"format": "pt"})
    assert pruned.Checkpoint(out).fingerprint
    ids = pruned.token_ids(1)
    assert torch.equal(load(out, torch.float32)(ids).logits, case.dense(ids).logits)


def test_an_export_is_pruned_again(case: pruned.Pruned, exported: Path, tmp_path: Path) -> None:
    """Units remember how much wider each was before, though the MLPs of readers were twice as wide."""
    again = pruned.prune(exported, tmp_path / "database", "head")
    assert read_json(exported / "config.json")["global_head_dim"] == 8, "for transformers 5.14"
    assert {unit.lost for unit in again.database.grid.units if unit.kind == "mlp"} == {16, 32}
    genome, ids = again.genomes()[-1], pruned.token_ids(1)
    expected = pruned.zero_masked(again.dense, again.database, genome)(ids).logits
    twice = load(pruned.write_export(again, genome, tmp_path / "twice"), torch.float32)
    torch.testing.assert_close(twice(ids).logits, expected, rtol=1e-4, atol=2e-4)
    assert [head_dim(twice.config, block) for block in range(6)] == [4, 8] * 3


def test_an_export_whose_blocks_would_read_other_keys_is_refused() -> None:
    types = ["sliding_attention", *["full_attention"] * 2, "sliding_attention", "full_attention"]
    config = Gemma4TextConfig(
        **tiny.TURNS | {"num_hidden_layers": 5, "num_key_value_heads": 2, "layer_types": types},
        num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=tiny.VOCAB,
    )  # fmt: skip
    sizes = [BlockSizes(8, 2, 64)] * 5
    assert pruned_config(config, sizes).model_type == "gemma4_text"
    sizes[1] = BlockSizes(0, 0, 64)
    with pytest.raises(UsageError, match="attention of every type before the blocks whose keys and values are shared"):
        pruned_config(config, sizes)


def test_every_attention_of_a_type_may_leave(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Where none shares; the last block keeps its type."""
    case, ids = pruned.prune(checkpoints["gemma4"], tmp_path / "database"), pruned.token_ids(1)
    genome = without(case, (1, "attention"), (3, "attention"))
    model: Any = load(pruned.write_export(case, genome, tmp_path / "export"), torch.float32)
    twin: Any = pruned.zero_masked(case.dense, case.database, genome)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=2e-4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))
    assert model.config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]


def test_experts_are_refused_by_name() -> None:
    config = copy.deepcopy(tiny.CONFIGS["gemma4"])
    for name, value in {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.experts: expected .*, found weights of experts"):
        find_family(model)


def test_a_family_whose_blocks_do_more_is_refused_unless_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darwinlm.model.families.STAYING", STAYING[1:])
    with pytest.raises(UsageError, match=r"model\.layers\.0: expected a block that gives what it is given"):
        find_family(tiny.build("gemma4"))


def test_what_cannot_run_or_time_such_blocks_says_so(case: pruned.Pruned, exported: Path, tmp_path: Path) -> None:
    assert "found others in some blocks" in check_vllm(exported)[0]
    with pytest.raises(UsageError, match="--compat vllm: expected heads of one width"):
        zero_stubs(load(exported))
    with pytest.raises(UsageError, match="found some that read the keys and values of others"):
        latency_costs(case.checkpoint, case.database.grid, LatencyConfig(), pruned.CPU, tmp_path / "latency.json")


def test_alike_blocks_are_a_stock_model(case: pruned.Pruned, tmp_path: Path) -> None:
    """Where attentions are whole and MLPs have lost equal shares, though those of readers are twice as wide."""
    grid, ids = case.database.grid, pruned.token_ids(1)
    genome = Genome(tuple(2 * (unit.kind == "mlp") for unit in grid.units))
    out = pruned.write_export(case, genome, tmp_path / "export")
    config, found = read_json(out / "config.json"), load(out, torch.float32)
    assert found.config.model_type == "gemma4_text"
    assert "per_layer_config" not in config, "transformers 5.14 would stop at it"
    assert config["global_head_dim"] == 8
    expected = repeat_shared(case.stitcher.stitch(genome))(ids).logits
    torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=2e-4)


def test_a_transformers_that_does_not_name_the_sharing_blocks_is_refused() -> None:
    before = PretrainedConfig.from_dict({"num_kv_shared_layers": 2})  # as its Gemma 4 was before 5.2x
    with pytest.raises(UsageError, match=r"expected a transformers that names the blocks .* upgrade it"):
        shares(before, 0, "reuse")
    assert not shares(PretrainedConfig.from_dict({"num_kv_shared_layers": 0}), 0, "reuse")
