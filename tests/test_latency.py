"""The latency table: what it measures, whose it is, and a search within it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flops
import runs
from darwinlm.commands import compress
from darwinlm.config.run import DatabaseConfig, LatencyConfig
from darwinlm.genome import Grid, level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_units
from darwinlm.runtime import timing
from darwinlm.runtime.files import read_json, write_record
from darwinlm.search import latency
from darwinlm.search.latency import latency_costs
from darwinlm.types import Structure, UsageError
from pruned import CPU

QUICK = LatencyConfig(context=16, repeats=1)


def opened(path: Path, structure: Structure = "kv_group") -> tuple[Checkpoint, Grid]:
    checkpoint = Checkpoint(path)
    return checkpoint, level_grid(find_units(checkpoint.skeleton(), checkpoint.config, structure), 4, 8)


@pytest.mark.parametrize("structure", ["kv_group", "head", "balanced"])
@pytest.mark.parametrize("config", [QUICK, LatencyConfig(batch=2, tokens=8, context=0, repeats=1)])
def test_costs_fall_from_level_to_level_and_are_kept(
    structure: Structure, config: LatencyConfig, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint, grid = opened(checkpoints["llama-gqa"], structure)
    costs = latency_costs(checkpoint, grid, config, CPU, tmp_path / "latency.json")
    for row, removed in zip(costs.units, grid.removed, strict=True):
        assert len(row) == len(removed)
        assert list(row) == sorted(row, reverse=True)
        assert row[-1] == 0
    assert costs.units[::2] == (costs.units[0],) * 3  # blocks of one shape were measured once
    again = latency_costs(checkpoint, grid, config, CPU, tmp_path / "latency.json")
    assert again == costs


def test_it_times_what_is_slow(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts operations the table is that of the operations."""
    from torch.utils.flop_counter import FlopCounterMode

    checkpoint, grid = opened(checkpoints["mistral"])
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(timing, "now", lambda _: counter.get_total_flops() / latency.NANO)
        units, rest, error = latency.measure(checkpoint, grid, LatencyConfig(tokens=4, context=0, repeats=1), CPU)
    structures = [u.parameters(0) - u.fixed_parameters for u in grid.units]
    for row, removed, unit, parameters in zip(units, grid.removed, grid.units, structures, strict=True):
        for cost, gone in zip(row, removed, strict=True):
            weights = parameters * (unit.structures - gone) // unit.structures
            assert 2 * 4 * weights <= cost <= 1.25 * 2 * 4 * weights  # attention scores on top
    rotary = flops.rotary(checkpoint.load(torch.float32, CPU), 4)
    assert rest == 2 * checkpoint.config.hidden_size * checkpoint.config.vocab_size + rotary  # the last token's logits
    assert error == pytest.approx(0, abs=1e-6)


def test_parts_that_do_not_add_up_are_measured_again_and_then_said(capsys: pytest.CaptureFixture[str]) -> None:
    def after(*errors: float) -> tuple[list[list[int]], str]:
        """The table that is taken after measurements with these errors, and what is said."""
        measured = iter([([[number]], 0, error) for number, error in enumerate(errors)])
        units, _ = latency._consistent(lambda: next(measured))
        return units, " ".join(capsys.readouterr().err.split())

    assert after(0.1) == ([[0]], "")
    units, said = after(-0.3, 0.1)
    assert (units, "0.70 times as long as a whole pass; measured again" in said) == ([[1]], True)
    units, said = after(0.3, 0.4)
    assert (units, "1.40 times as long as a whole pass; other work keeps" in said) == ([[1]], True)


def test_a_table_of_something_else_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, grid = opened(checkpoints["llama-gqa"])
    path = tmp_path / "latency.json"
    latency_costs(checkpoint, grid, QUICK, CPU, path)
    given = replace(QUICK, table=str(path))
    assert latency_costs(checkpoint, grid, replace(given, repeats=5), CPU, tmp_path / "other.json").units
    assert not (tmp_path / "other.json").exists()
    with pytest.raises(
        UsageError, match=r"of another pass: expected .*'context': 8.*, found .*'context': 16.*measured"
    ):
        latency_costs(checkpoint, grid, replace(given, context=8), CPU, path)
    with pytest.raises(UsageError, match=r"of another model: expected .*mistral"):
        latency_costs(*opened(checkpoints["mistral"]), given, CPU, path)
    with pytest.raises(UsageError, match=r"of another level grid"):
        latency_costs(*opened(checkpoints["llama-gqa"], "head"), given, CPU, path)
    table = read_json(path)
    content = {"units": table["units"], "rest": table["rest"]}
    write_record(path, content, table["provenance"] | {"threads": 99})
    latency_costs(checkpoint, grid, QUICK, CPU, path)  # a run's own, resumed with another number of threads
    with pytest.raises(UsageError, match=r"of another threads: expected \d+, found 99"):
        latency_costs(checkpoint, grid, given, CPU, tmp_path / "new.json")
    write_record(path, content, table["provenance"] | {"device": "cuda"})
    with pytest.raises(UsageError, match=r"of another device: expected cpu: .*, found cuda"):
        latency_costs(checkpoint, grid, given, CPU, path)
    with pytest.raises(UsageError, match=r"--latency.table: expected a file .* none at .*nowhere"):
        latency_costs(checkpoint, grid, replace(given, table="nowhere"), CPU, path)


def test_a_search_stays_within_its_latency(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    checkpoint, grid = opened(checkpoints["llama-gqa"])
    costs = latency_costs(checkpoint, grid, QUICK, CPU, tmp_path / "latency.json")
    # Timings of such small modules are noise: whole milliseconds instead.
    whole = [[1_000_000 * (len(row) - 1 - level) for level in range(len(row))] for row in costs.units]
    provenance = read_json(tmp_path / "latency.json")["provenance"]
    write_record(tmp_path / "latency.json", {"units": whole, "rest": 5_000_000}, provenance)
    config = runs.short(
        checkpoints["llama-gqa"], text, tmp_path / "run", target="latency=17.1ms",
        latency=replace(QUICK, table=str(tmp_path / "latency.json")), database=DatabaseConfig(levels=4, granularity=8),
    )  # fmt: skip
    run = compress.run(config, until="search")
    assert sum(4 - level for level in run.genome.levels) == 12
    out = replace(config, out=str(tmp_path / "other"), target="latency=5.9ms")  # the first attention stays
    with pytest.raises(
        UsageError, match=r"--target: expected ns a forward pass from .* found 5\.9M; give another value"
    ):
        compress.run(out)
    assert not (tmp_path / "other").exists()
    compress.run(replace(out, target="latency=6ms"), until="database")
