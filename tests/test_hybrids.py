"""Blocks that mix tokens otherwise than by attention: such a mixer is a unit that leaves as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pruned
import runs
import tiny
from darwinlm.commands import compress
from darwinlm.config.run import LatencyConfig
from darwinlm.database.stitch import repeat_shared
from darwinlm.export.gguf import export_gguf
from darwinlm.export.vllm import check_vllm, zero_stubs
from darwinlm.genome import prunable_parameters
from darwinlm.model.families import block_sizes_of
from darwinlm.model.reading import load
from darwinlm.report.figures import levels_figure
from darwinlm.runtime.files import read_json
from darwinlm.search.latency import latency_costs
from darwinlm.types import BlockSizes, Genome, UsageError

HYBRIDS = [name for name in tiny.CONFIGS if name.endswith("hybrid")]


@pytest.fixture(scope="module", params=HYBRIDS)
def case(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> pruned.Pruned:
    return pruned.prune(checkpoints[request.param], tmp_path_factory.mktemp(request.param))


def test_every_mixer_is_one_structure_of_all_its_weights(case: pruned.Pruned) -> None:
    """Counted by the names of its module and of the norms that a removal leaves without a reader."""
    family, grid = case.checkpoint.family, case.database.grid
    mixers = [grid.units[index] for index in grid.kinds()["mixer"]]
    blocks = {unit.block for unit in mixers}
    attention = {grid.units[index].block for index in grid.kinds()["attention"]}
    beside = "falcon" in case.dense.config.model_type
    assert blocks == ({0, 1, 2, 3} if beside else {0, 2})
    assert attention == ({0, 1, 2, 3} if beside else {1, 3})
    for unit in mixers:
        inside = [f"{family.block(unit.block)}.{path}." for path in (family.mixer, *family.mixer_norms)]
        weights = dict(case.dense.named_parameters())
        whole = sum(weights[name].numel() for name in weights if name.startswith(tuple(inside)))
        assert (unit.structures, unit.parameters(0), unit.parameters(1)) == (1, whole, 0)
    assert bool(family.mixer_norms) != beside, "a norm that attention reads too stays"


def test_padding_on_the_left_and_beams_give_what_the_zero_masked_twin_gives(
    case: pruned.Pruned, tmp_path: Path
) -> None:
    """The caches of layers without attention hold states that padding must not enter, and that beams reorder."""
    genome, ids = case.genomes()[-2], pruned.token_ids(3, 2)
    exported: Any = load(pruned.write_export(case, genome, tmp_path / "export"), torch.float32)
    twin: Any = pruned.zero_masked(case.dense, case.database, genome)
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 3, 0
    torch.testing.assert_close(
        exported(ids, attention_mask=mask).logits[mask.bool()],
        twin(ids, attention_mask=mask).logits[mask.bool()],
        rtol=1e-4,
        atol=2e-4,
    )
    for options in ({}, {"num_beams": 3}):
        written = [
            model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
            for model in (exported, twin)
        ]
        assert torch.equal(*written)


def test_a_hybrid_of_alike_attentions_is_a_stock_model(case: pruned.Pruned, tmp_path: Path) -> None:
    grid = case.database.grid
    levels = [grid.highest(index) - 1 if unit.kind != "mixer" else 0 for index, unit in enumerate(grid.units)]
    out, ids = pruned.write_export(case, Genome(tuple(levels)), tmp_path / "export"), pruned.token_ids(1)
    config = read_json(out / "config.json")
    expected = pruned.zero_masked(case.dense, case.database, Genome(tuple(levels)))(ids).logits
    found: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=2e-4)
    assert config["model_type"].startswith("pruned_") == (config["model_type"] not in ("qwen3_5_text",))


def test_what_is_left_of_blocks_is_read_from_the_model(case: pruned.Pruned, tmp_path: Path) -> None:
    """Also after a block with a mixer has left, so that the others move up, and when it is pruned again."""
    grid = case.database.grid
    gone = {index for index, unit in enumerate(grid.units) if unit.block == 2}
    genome = Genome(tuple(grid.highest(index) if index in gone else 0 for index in range(len(grid.units))))
    out = pruned.write_export(case, genome, tmp_path / "export")
    model = load(out)
    sizes = block_sizes_of(model)
    assert sizes == tuple(size for index, size in enumerate(block_sizes_of(case.dense)) if index != 2)
    assert isinstance(sizes[0], BlockSizes)
    assert sizes[0].mixer
    again = pruned.prune(out, tmp_path / "again")
    assert len(again.database.grid.units) == len(grid.units) - len(gone)
    size = sum(parameter.numel() for parameter in model.parameters())
    left = prunable_parameters(again.database.grid, again.database.grid.dense())
    assert left == prunable_parameters(grid, genome)
    whole = sum(parameter.numel() for parameter in case.dense.parameters())
    shared = 0 if case.checkpoint.family.mixer_norms else case.dense.config.hidden_size  # of a norm
    assert size - left == whole - prunable_parameters(grid, grid.dense()) - shared


def test_latency_is_measured_of_every_kind(case: pruned.Pruned, tmp_path: Path) -> None:
    grid = case.database.grid
    settings = LatencyConfig(context=16, repeats=1)
    costs = latency_costs(case.checkpoint, grid, settings, pruned.CPU, tmp_path / "latency.json")
    assert [len(row) for row in costs.units] == [len(removed) for removed in grid.removed]
    assert any(costs.units[index][0] > 0 for index in grid.kinds()["mixer"])


def test_other_runtimes_refuse_mixers(case: pruned.Pruned, tmp_path: Path) -> None:
    out = pruned.write_export(case, case.genomes()[-2], tmp_path / "export")
    assert "which vLLM's Transformers backend does not run" in check_vllm(out)[0]
    with pytest.raises(UsageError, match="--compat vllm: expected blocks that mix tokens by attention alone"):
        zero_stubs(load(out))
    with pytest.raises(UsageError, match=r"llama\.cpp cannot run this model"):
        export_gguf(out, tmp_path / "model.gguf")


def test_the_figure_has_a_row_for_mixers(case: pruned.Pruned) -> None:
    grid = case.database.grid
    figure = levels_figure(grid, {"uniform": grid.dense(), "darwinlm": case.genomes()[-2]})
    assert [axis.get_ylabel() for axis in figure.axes][-1] == "mixers left (%)"


@pytest.mark.slow
@pytest.mark.parametrize("moves", ["priced", "within_kinds"])
def test_a_run_removes_mixers_where_the_budget_asks_for_it(
    moves: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """All stages, among them training; within kinds, the uniform start keeps all mixers, and so does the search."""
    changes: dict[str, Any] = {"target": "params=0.45"} if moves == "priced" else {}
    config = runs.short(checkpoints["qwen3_5-hybrid"], text, tmp_path / "run", **changes, verify=True)
    run = compress.run(replace(config, search=replace(config.search, moves=moves)))
    model = load(run.exported)
    mixers = sum(block.mixer for block in block_sizes_of(model))
    assert mixers == 2 if moves == "within_kinds" else mixers < 2
    assert repeat_shared(model)(pruned.token_ids(1)).logits.isfinite().all()
