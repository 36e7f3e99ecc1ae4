"""What a user can get wrong: one sentence, exit code 1 or 2, and nothing half-written left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

from darwinlm import pipeline
from darwinlm.artifact import locked_directory
from darwinlm.config import CalibrationConfig, DatabaseConfig, EvaluationConfig, RunConfig, SearchConfig
from darwinlm.families import FAMILIES
from darwinlm.modeling import EXPORTABLE
from darwinlm.types import SelectionStage

PROGRESS = ("reading ", "database: ", "search: ", "generation ")


@pytest.fixture
def config(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> RunConfig:
    """A run that would work."""
    return runs.short(checkpoints["qwen2"], text, tmp_path / "run")


def _sentence(stderr: str) -> str:
    """The one line on stderr that is no progress."""
    lines = [line for line in stderr.splitlines() if not line.startswith(PROGRESS)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("darwinlm: ")
    return lines[0]


def _refused(
    config: RunConfig, capsys: pytest.CaptureFixture[str], code: int, *words: str, flags: tuple[str, ...] = ()
) -> str:
    """The sentence that a command ends with, in which all `words` must be."""
    capsys.readouterr()
    assert runs.call(*runs.command(config, *flags)) == code
    sentence = _sentence(capsys.readouterr().err)
    for word in words:
        assert word in sentence
    return sentence


def _as_if_nothing_had_happened(config: RunConfig) -> None:
    assert not Path(config.out).exists()


def _copy(config: RunConfig, tmp_path: Path) -> Path:
    model = tmp_path / "copy"
    shutil.copytree(config.model, model)
    return model


def _change_config(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# The model.


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "/nowhere/at/all", "nowhere.gguf", "some/hub-id"])
def test_model_that_does_not_exist(model: str, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    _refused(replace(config, model=model), capsys, 2, model, "check")
    _as_if_nothing_had_happened(config)


@pytest.mark.parametrize("family", ["gpt2", "no_such_family"])
def test_unsupported_family(family: str, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = _copy(config, tmp_path)
    _change_config(model, model_type=family)
    _refused(replace(config, model=str(model)), capsys, 2, family, *FAMILIES)
    _as_if_nothing_had_happened(config)


def test_directory_that_is_no_model(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _refused(replace(config, model=str(tmp_path)), capsys, 2, "config.json", "expected")
    (tmp_path / "x.gguf").write_bytes(b"no gguf")
    _refused(replace(config, model=str(tmp_path / "x.gguf")), capsys, 2, "x.gguf", "check the file")
    _as_if_nothing_had_happened(config)


def test_model_without_tokenizer(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = _copy(config, tmp_path)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    _refused(replace(config, model=str(model)), capsys, 2, "no tokenizer")
    _as_if_nothing_had_happened(config)


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights(
    tensor: str, value: float, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = _copy(config, tmp_path)
    weights = load_file(model / "model.safetensors")
    weights[tensor].view(-1)[-1] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    _refused(replace(config, model=str(model)), capsys, 1, tensor, "NaN or infinity", "must have finite weights")
    _as_if_nothing_had_happened(config)


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_incomplete_or_wrong_weights(
    tensor: str, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = _copy(config, tmp_path)
    weights = load_file(model / "model.safetensors")
    tensors = {"missing": {k: v for k, v in weights.items() if k != tensor}}
    tensors["shape"] = weights | {tensor: weights[tensor][:-1].clone()}
    for name, changed in tensors.items():
        save_file(changed, model / "model.safetensors", {"format": "pt"})
        out = f"{config.out}-{name}"
        _refused(replace(config, model=str(model), out=out), capsys, 1, tensor)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    _refused(replace(config, model=str(model)), capsys, 1, "cannot be read", "fetch the checkpoint again")


def test_family_that_cannot_be_exported(
    checkpoints: dict[str, Path], config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    """Found before the database is built, not after hours."""
    others = [name for name in checkpoints if name.partition("-")[0] not in EXPORTABLE]
    if not others:
        pytest.skip("all families can be exported")
    _refused(replace(config, model=str(checkpoints[others[0]])), capsys, 2, "to export")
    _as_if_nothing_had_happened(config)


# The text.


@pytest.mark.parametrize("data", ["nowhere.txt", "nowhere.jsonl", "nowhere.parquet", "some/hub-id", "wikitext2"])
def test_corpus_missing(data: str, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    _refused(replace(config, data=data), capsys, 2, data, "check")
    _as_if_nothing_had_happened(config)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", ["empty", "expected"]),
        ("blank.jsonl", "\n\n", ["empty", "expected"]),
        ("short.txt", "Three words only.", ["too little text", "expected", "found", "give more text"]),
        ("broken.jsonl", '{"text": ', ["cannot be read"]),
        ("column.jsonl", '{"words": "a"}\n', ["no text", "expected a column text", "rename"]),
        ("list.jsonl", "[1]\n", ["no text", "expected a column text"]),
        ("broken.parquet", "PAR1 not", ["cannot be read"]),
        ("binary.txt", b"\xff\xfe\x00\x81", ["cannot be read"]),
    ],
)
def test_corpus_of_no_use(
    name: str,
    content: str | bytes,
    words: list[str],
    config: RunConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    data = tmp_path / name
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    _refused(replace(config, data=str(data)), capsys, 2, name, *words)
    _as_if_nothing_had_happened(config)


@pytest.mark.parametrize("weight", ["x", "-1", "0", ""])
def test_weight_that_is_none(weight: str, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    _refused(replace(config, data=f"{config.data}={weight}"), capsys, 2, "--data", "expected a number above 0")


def test_sequences_longer_than_the_model_has_positions(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    long = replace(config, calibration=CalibrationConfig(sequence_length=257))
    _refused(long, capsys, 2, "--calibration.sequence-length", "256 positions", "found 257")
    _as_if_nothing_had_happened(config)


# Settings.


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--target-level", value) for value in ("-1", "0", "4", "11")),
        *((f"--calibration.{name}", "0") for name in ("tokens", "sequence-length", "batch-size")),
        ("--calibration.batch-size", "-3"),
        *((f"--database.{name}", "0") for name in ("levels", "granularity", "damping")),
        ("--search.generations", "-1"),
        *((f"--search.{name}", "0") for name in ("offspring", "max-switches", "learning-rate")),
        ("--search.stages", "[]"),
        ("--search.stages", "[{survivors: 0, fitness_tokens: 8}]"),
        ("--search.stages", "[{survivors: 1, fitness_tokens: 0}]"),
        ("--search.stages", "[{survivors: 1, fitness_tokens: 8, training_tokens: -1}]"),
        ("--search.stages", "[{survivors: 1, fitness_tokens: 8}, {survivors: 2, fitness_tokens: 8}]"),
        *((f"--evaluation.{name}", "0") for name in ("tokens", "speed-tokens", "decode-tokens", "repeats")),
        ("--evaluation.prompts", "['']"),
    ],
)
def test_value_that_makes_no_sense(flag: str, value: str, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    _refused(config, capsys, 2, f"{flag}: expected ", ", found ", "give another value", flags=(flag, value))
    _as_if_nothing_had_happened(config)


def test_values_are_checked_in_python_too():
    with pytest.raises(ValueError, match="offspring"):
        SearchConfig(offspring=0)
    with pytest.raises(ValueError, match="survivors than in the stage before"):
        SearchConfig(stages=(SelectionStage(1, 8), SelectionStage(2, 8)))
    with pytest.raises(ValueError, match="damping"):
        DatabaseConfig(damping=float("nan"))
    with pytest.raises(ValueError, match="target-level"):
        replace(runs.SHORT, target_level=float("nan"))
    with pytest.raises(ValueError, match="repeats"):
        EvaluationConfig(repeats=0)
    with pytest.raises(ValueError, match="target-level"):
        replace(runs.SHORT, database=DatabaseConfig(levels=2))


def test_granularity_that_does_not_divide(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    _refused(config, capsys, 2, "granularity", "64 channels", "found 48", flags=("--database.granularity", "48"))
    _as_if_nothing_had_happened(config)


def test_device_that_is_not_there(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    for device in ("cuda:77", "meta", "nonsense"):
        _refused(config, capsys, 2, f"no device '{device}'", "expected", flags=("--device", device))
    _as_if_nothing_had_happened(config)


# A genome for another model.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no genome in"]),
        ("no json", ["no genome in"]),
        ('{"fitness": 1}', ["expected a JSON list of whole numbers"]),
        ("[1, 1.5]", ["expected a JSON list of whole numbers"]),
        ("[1, 1, 1, 1]", ["another model", "4 levels", "6 units"]),
        ("[1, 1, 1, 1, 1, 9]", ["level out of range", "block-02-mlp", "9"]),
        ("[1, 1, 1, 1, 1, -1]", ["level out of range", "-1"]),
        ("[4, 1, 1, 1, 1, 1]", ["attention in the first block"]),
        ('{"levels": [1, 1, 1, 1, 1, 1], "made_from": {"model": "abc"}}', ["another model", "abc"]),
    ],
)
def test_genome_for_another_model(
    content: str | None, words: list[str], config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    genome = tmp_path / "genome.json"
    if content is not None:
        genome.write_text(content)
    _refused(replace(config, genome=str(genome)), capsys, 2, *words)
    _as_if_nothing_had_happened(config)


def test_genome_of_another_run(
    config: RunConfig, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = replace(config, out=str(tmp_path / "found"))
    pipeline.run(found, until="search")
    genome = str(tmp_path / "found" / "search" / "result.json")
    other = replace(config, model=str(checkpoints["mistral"]), genome=genome)
    _refused(other, capsys, 2, "for another model", "search one on this model")
    other = replace(config, database=DatabaseConfig(levels=3, granularity=8), genome=genome)
    _refused(other, capsys, 2, "for another level grid", "'levels': 3", "'levels': 4")
    _as_if_nothing_had_happened(config)


# The run directory.


def test_directory_that_cannot_be_written_to(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("a file")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        _refused(replace(config, out=str(out)), capsys, 2, f"cannot write to {out}", "choose another --out")
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "run"
    _refused(replace(config, out=str(out)), capsys, 2, "cannot write", "Permission denied", "choose another --out")


def test_directory_that_holds_another_run(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipeline.run(config, until="database")
    before = runs.files(tmp_path / "run")
    words = "holds another run", "its seed is 0, not 7", "choose another --out"
    _refused(replace(config, seed=7), capsys, 2, *words)
    other = replace(config.calibration, tokens=512)
    _refused(replace(config, calibration=other), capsys, 2, "its calibration.tokens is 1024, not 512")
    assert runs.files(tmp_path / "run") == before
    (tmp_path / "run" / "run.yaml").write_text("seed: [")
    _refused(config, capsys, 2, "run.yaml", "does not hold the settings of a run")


def test_directory_that_holds_something_else(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.partial").write_text("mine")
    _refused(config, capsys, 2, "not empty and holds no run", "letters.partial", "choose another --out")
    assert runs.files(tmp_path / "run") == {"letters.partial": b"mine"}


def test_two_runs_in_one_directory(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    with locked_directory(Path(config.out)):
        arguments, environment = runs.process(*runs.command(config))
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another process is working in" in _sentence(done.stderr)
    _as_if_nothing_had_happened(config)


def test_a_corrected_command_may_use_the_same_directory(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    _refused(replace(config, data="nowhere.txt"), capsys, 2)
    assert runs.call(*runs.command(config, name="database")) == 0


def test_a_wrong_command_leaves_an_unfinished_run_alone(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(config.data, tmp_path / "text.jsonl")
    config = replace(config, data=str(tmp_path / "text.jsonl"))
    pipeline.run(config, until="database")
    before = runs.files(tmp_path / "run")
    (tmp_path / "text.jsonl").unlink()
    _refused(config, capsys, 2, "no text at")
    assert runs.files(tmp_path / "run") == before


# The database.


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.fixture
def measured(config: RunConfig, tmp_path: Path) -> Path:
    """The database of a run that has not searched yet."""
    pipeline.run(config, until="database")
    return tmp_path / "run" / "database"


@pytest.mark.parametrize("damage", [_flip, _truncate])
def test_damaged_unit(
    damage: Callable[[Path], None], measured: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    whole = runs.files(measured)
    damage(measured / "block-01-mlp.safetensors")
    words = "block-01-mlp.safetensors", "truncated or altered", "delete that file and run the command again"
    _refused(config, capsys, 1, *words)
    (measured / "block-01-mlp.safetensors").unlink()  # as it was told
    assert runs.call(*runs.command(config, name="database")) == 0
    assert runs.files(measured) == whole


def test_damaged_manifest(measured: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    manifest = measured / "database.json"
    whole = manifest.read_text()
    _truncate(manifest)
    _refused(config, capsys, 1, "database.json", "is damaged", "delete it and run the command again")
    changed = json.loads(whole)
    changed["made_from"]["model"] = "another"
    manifest.write_text(json.dumps(changed))
    _refused(config, capsys, 2, "made from another model", "choose another --out")
    for nonsense in ("[]", "{}"):
        manifest.write_text(nonsense)
        _refused(config, capsys, 1, "database.json", "is damaged", "lacks made_from")


def test_damaged_record_of_a_unit(measured: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    record = measured / "block-01-mlp.json"
    record.write_text(json.dumps({"sha256": "0" * 64}))
    _refused(config, capsys, 1, "block-01-mlp.safetensors", "altered")
    record.write_text("{}")
    _refused(config, capsys, 1, "block-01-mlp.json", "is damaged", "delete it")


def test_damaged_search(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipeline.run(config, until="search")
    state = tmp_path / "run" / "search" / "state.json"
    for damaged in (state.read_text()[:-9], "{}"):
        state.write_text(damaged)
        _refused(config, capsys, 1, "state.json", "is damaged", "delete it")


# The machine.


def test_full_disk(config: RunConfig, tmp_path: Path):
    """No file may grow beyond a few kilobytes, as on a full disk; the same command then goes on."""
    arguments, environment = runs.process(*runs.command(config))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    sentence = _sentence(done.stderr)
    assert "File too large" in sentence
    assert "run the same command again" in sentence
    assert (tmp_path / "run" / "run.yaml").exists()
    assert not list((tmp_path / "run" / "database").glob("*.safetensors"))
    assert runs.call(*runs.command(config, name="database")) == 0


def test_a_failure_is_one_sentence_in_a_real_process_too(config: RunConfig):
    arguments, environment = runs.process(*runs.command(replace(config, data="nowhere.txt")))
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert _sentence(done.stderr) == "darwinlm: no text at nowhere.txt: expected a file; check --data"
    assert done.stdout == ""


def test_overflow_in_the_activations(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = _copy(config, tmp_path)
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if "up_proj" in name or "gate_proj" in name:
            weights[name] = torch.full_like(weights[name], 1e30)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    _refused(replace(config, model=str(model)), capsys, 1, "NaN or infinity", "overflow")
