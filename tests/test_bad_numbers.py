"""Models whose numbers misbehave, from checkpoint to database: it is finite, or the run stops and names the unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import pruned
import tiny
from darwinlm.config.run import DatabaseConfig
from darwinlm.database.calibrate import calibrate
from darwinlm.database.store import Database, add_unit
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.types import DarwinError
from refusals import told


def build(path: Path, poison: Callable[[PreTrainedModel], None], tokens: int = 192, damping: float = 0.01) -> Database:
    """The database of a tiny model after `poison` has changed its weights."""
    model = tiny.build("llama-gqa")
    poison(model)
    model.save_pretrained(path / "model")
    checkpoint = Checkpoint(path / "model")
    config = DatabaseConfig(levels=4, granularity=8, damping=damping)
    database = Database(path / "database", level_grid(checkpoint.units, config.levels, config.granularity), {})
    token_ids = pruned.token_ids().flatten()[:tokens].view(-1, min(tokens, 32))
    for statistics in calibrate(checkpoint, token_ids, batch_size=4, device=pruned.CPU):
        add_unit(database, statistics, config, torch.float32)
    return database


def assert_finite(database: Database) -> None:
    for index in range(len(database.grid.units)):
        errors = database.errors(index)
        assert all(0 <= error < float("inf") for error in errors)
        for level in range(1, database.grid.highest(index)):
            assert database.level(index, level).weight.isfinite().all()


def dead_channels(model: PreTrainedModel) -> None:
    """Half of an MLP's channels are always zero."""
    up = model.get_submodule("model.layers.1.mlp.up_proj")
    for parameter in up.parameters():
        parameter[::2] = 0


def dead_unit(model: PreTrainedModel) -> None:
    """An attention whose consumer never sees anything but zeros."""
    for parameter in model.get_submodule("model.layers.1.self_attn.v_proj").parameters():
        parameter.zero_()


def nothing(model: PreTrainedModel) -> None:
    """A model as it is."""


def twins(model: PreTrainedModel) -> None:
    """All channels of an MLP are equal: a Hessian of rank one."""
    for name in ("gate_proj", "up_proj"):
        for parameter in model.get_submodule(f"model.layers.0.mlp.{name}").parameters():
            parameter[1:] = parameter[:1].clone()


def overflowing_mlp(model: PreTrainedModel) -> None:
    """Finite weights, whose product is not."""
    for name in ("gate_proj", "up_proj"):
        model.get_submodule(f"model.layers.1.mlp.{name}").get_parameter("weight").mul_(1e20)


def overflowing_attention(model: PreTrainedModel) -> None:
    """Finite weights, whose sum is not."""
    model.get_submodule("model.layers.1.self_attn.v_proj").get_parameter("weight").mul_(1e38)


def test_dead_channels_leave_first_and_cost_nothing(tmp_path: Path) -> None:
    database = build(tmp_path, dead_channels)
    assert_finite(database)
    assert database.level(3, 2).kept.tolist() == list(range(1, 64, 2))
    assert database.errors(3)[2] < 0.1 * database.errors(3)[3]  # not nothing: damping has its share


def test_a_unit_that_never_fires_is_in_the_database(tmp_path: Path) -> None:
    database = build(tmp_path, dead_unit)
    assert_finite(database)
    assert len(database.level(2, 2).kept) == 2


@pytest.mark.parametrize("poison", [nothing, dead_channels, twins])
@pytest.mark.parametrize("tokens", [4, 32])
@pytest.mark.parametrize("damping", [0.01, 1e-9])
def test_fewer_tokens_than_channels(
    tmp_path: Path,
    poison: Callable[[PreTrainedModel], None],
    tokens: int,
    damping: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where rounding leaves a Hessian indefinite, it is computed on in float64 or damped further, and that is said."""
    capsys.readouterr()
    database = build(tmp_path, poison, tokens, damping)
    said = [line for line in told(capsys.readouterr().err) if "rounding leaves the Hessian indefinite" in line]
    assert all(line.startswith("block-0") for line in said)
    assert said or damping == 0.01
    assert_finite(database)


@pytest.mark.parametrize(
    ("poison", "unit"), [(overflowing_mlp, "block-01-mlp"), (overflowing_attention, "block-01-attention")]
)
def test_activations_that_overflow_stop_the_run_at_their_unit(
    tmp_path: Path, poison: Callable[[PreTrainedModel], None], unit: str
) -> None:
    """What was finished before stays, and nothing that is not finite is ever written."""
    with pytest.raises(DarwinError, match=rf"{unit}: expected finite inputs of .* found NaN or infinity"):
        build(tmp_path, poison)
    finished = {file.stem for file in (tmp_path / "database").glob("*.safetensors")}
    assert unit not in finished
    assert "block-00-attention" in finished
