"""Stored tensors that are not those of the config's model: refused, or named where they change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.types import DarwinError, UsageError

READERS = {"compress": lambda model: Checkpoint(model).fingerprint, "load": load}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    """What reads a model: a run or a training by its fingerprint, everything else by loading it."""
    return READERS[request.param]


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A model with biases and tied embeddings."""
    return shutil.copytree(checkpoints["llama-gqa"], tmp_path / "model")


def _store(model: Path, **tensors: Tensor) -> None:
    file = model / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def _configure(model: Path, **fields: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_biases_that_the_config_denies(model: Path, read: Callable[[Path], object]) -> None:
    _configure(model, attention_bias=False)
    with pytest.raises(UsageError, match=r"holds model\.layers\.0\.self_attn\.\w+\.bias, for which .* has no place"):
        read(model)


def test_blocks_beyond_the_number_of_the_config(model: Path, read: Callable[[Path], object]) -> None:
    _configure(model, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"holds model\.layers\.2\..* has no place"):
        read(model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.masked_bias",
        "mtp.layers.0.norm.weight",
    ],
)
def test_what_changes_nothing_is_named(
    name: str, model: Path, read: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    _store(model, **{name: torch.zeros(4)})
    read(model)
    if read is not load or "inv_freq" not in name:  # which transformers leaves out without a word
        assert f"{name} are not read: the model computes without them" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_floats(dtype: torch.dtype, model: Path, read: Callable[[Path], object]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _store(model, **{name: torch.ones(64, 32).to(dtype)})
    with pytest.raises(UsageError, match=rf"holds {name} as \w+: expected weights as F64, F32, BF16, F16"):
        read(model)


def test_a_shape_that_the_config_does_not_have(model: Path, read: Callable[[Path], object]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _store(model, **{name: torch.ones(64, 16)})
    with pytest.raises(DarwinError, match=name):
        read(model)


def test_a_tensor_in_two_files_or_in_another_than_the_index_says(model: Path, read: Callable[[Path], object]) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "one.safetensors")
    names = list(weights)
    index = dict.fromkeys(names, "one.safetensors") | {names[0]: "two.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({names[0]: weights[names[0]] + 1}, model / "two.safetensors", {"format": "pt"})
    with pytest.raises(DarwinError, match="expected it once"):
        read(model)
    save_file({"other": weights[names[0]]}, model / "two.safetensors", {"format": "pt"})
    with pytest.raises(DarwinError, match="found none; fetch the checkpoint again"):
        read(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("num_labels", 10**9),
        ("vocab_size", 10**12),
        ("hidden_size", -32),
        ("head_dim", 0),
        ("intermediate_size", 10**30),
        ("num_attention_heads", 2.5),
        ("num_key_value_heads", "many"),
        ("rope_parameters", []),
        ("layer_types", ["full_attention"]),
        ("hidden_act", "nothing"),
        ("pad_token_id", 10**6),
        ("dtype", "float31"),
    ],
)
def test_a_config_with_an_absurd_field_is_refused_at_once(
    field: str, value: object, model: Path, read: Callable[[Path], object]
) -> None:
    _configure(model, **{field: value})
    with pytest.raises(UsageError, match="fetch the model again"):
        read(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": "1.0", "model": {"type": "BPE"}}', '{"a": '])
def test_a_damaged_tokenizer_is_refused(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content)
    if (
        name == "tokenizer_config.json" and content.startswith("{") and content.endswith("}")
    ):  # no setting that it knows
        assert Checkpoint(model).tokenizer("Hello") == tiny.tokenizer()("Hello")
        return
    with pytest.raises(UsageError, match="no tokenizer in"):
        _ = Checkpoint(model).tokenizer


def test_an_auto_map_of_the_tokenizer_is_not_carried_on(model: Path, tmp_path: Path) -> None:
    """It names code that an export does not have, and that nobody should run."""
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    Checkpoint(model).tokenizer.save_pretrained(tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
