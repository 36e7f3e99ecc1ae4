"""Arguments that a user can get wrong: one sentence, exit code 1 or 2, and nothing half-written left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import runs
from darwinlm.commands import compress
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, EvaluationConfig, RunConfig, SearchConfig
from darwinlm.types import SelectionStage
from refusals import as_if_nothing_had_happened, change_config, copied_model, refused


@pytest.fixture
def config(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> RunConfig:
    """A run that would work."""
    return runs.short(checkpoints["qwen2"], text, tmp_path / "run")


# The model.


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "/nowhere/at/all", "nowhere.gguf", "some/hub-id"])
def test_model_that_does_not_exist(model: str, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    refused(replace(config, model=model), capsys, 2, model, "check")
    as_if_nothing_had_happened(config)


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("deepseek_v3", "cannot prune model.layers.0.self_attn.kv_b_proj"),
        ("no_such_family", "unsupported model family 'no_such_family'"),
    ],
)
def test_unsupported_family(
    family: str, found: str, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = copied_model(config, tmp_path)
    change_config(model, model_type=family)
    refused(replace(config, model=str(model)), capsys, 2, found)
    as_if_nothing_had_happened(config)


def test_directory_that_is_no_model(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    refused(replace(config, model=str(tmp_path)), capsys, 2, "config.json", "expected")
    (tmp_path / "x.gguf").write_bytes(b"no gguf")
    refused(replace(config, model=str(tmp_path / "x.gguf")), capsys, 2, "x.gguf", "check the file")
    as_if_nothing_had_happened(config)


def test_model_without_tokenizer(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = copied_model(config, tmp_path)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    refused(replace(config, model=str(model)), capsys, 2, "no tokenizer")
    as_if_nothing_had_happened(config)


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights(
    tensor: str, value: float, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = copied_model(config, tmp_path)
    weights = load_file(model / "model.safetensors")
    weights[tensor].view(-1)[-1] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    refused(replace(config, model=str(model)), capsys, 1, tensor, "NaN or infinity", "must have finite weights")
    as_if_nothing_had_happened(config)


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_incomplete_or_wrong_weights(
    tensor: str, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = copied_model(config, tmp_path)
    weights = load_file(model / "model.safetensors")
    tensors = {"missing": {k: v for k, v in weights.items() if k != tensor}}
    tensors["shape"] = weights | {tensor: weights[tensor][:-1].clone()}
    for name, changed in tensors.items():
        save_file(changed, model / "model.safetensors", {"format": "pt"})
        out = f"{config.out}-{name}"
        refused(replace(config, model=str(model), out=out), capsys, 1, tensor)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    refused(replace(config, model=str(model)), capsys, 1, "cannot be read", "fetch the checkpoint again")


# The text.


@pytest.mark.parametrize("data", ["nowhere.txt", "nowhere.jsonl", "nowhere.parquet", "some/hub-id", "wikitext2"])
def test_corpus_missing(data: str, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    refused(replace(config, data=data), capsys, 2, data, "check")
    as_if_nothing_had_happened(config)


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
    refused(replace(config, data=str(data)), capsys, 2, name, *words)
    as_if_nothing_had_happened(config)


@pytest.mark.parametrize("weight", ["x", "-1", "0", ""])
def test_weight_that_is_none(weight: str, config: RunConfig, capsys: pytest.CaptureFixture[str]):
    refused(replace(config, data=f"{config.data}={weight}"), capsys, 2, "--data", "expected a number above 0")


def test_sequences_longer_than_the_model_has_positions(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    long = replace(config, calibration=CalibrationConfig(sequence_length=257))
    refused(long, capsys, 2, "--calibration.sequence-length", "256 positions", "found 257")
    as_if_nothing_had_happened(config)


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
        ("--target", "size=0.5"),
        ("--target", "params=0"),
        ("--target", "params=0.001"),
        ("--target", "params=9T"),
        ("--search.top-k", "0"),
        (
            "--search.stages",
            "[{survivors: 2, fitness_tokens: 8, training_tokens: 8}, {survivors: 1, fitness_tokens: 8}]",
        ),
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
    config = replace(config, target_level=None) if flag == "--target" else config
    refused(config, capsys, 2, f"{flag}: expected ", ", found ", "give another value", flags=(flag, value))
    as_if_nothing_had_happened(config)


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


def test_start_that_is_no_genome(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    refused(config, capsys, 2, "--search.start", "no genome in", flags=("--search.start", str(tmp_path / "nowhere")))
    (tmp_path / "short.json").write_text("[1, 1, 1]")
    refused(config, capsys, 2, "another model", "3 levels", flags=("--search.start", str(tmp_path / "short.json")))
    as_if_nothing_had_happened(config)


def test_granularity_that_does_not_divide(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    refused(config, capsys, 2, "granularity", "64 channels", "found 48", flags=("--database.granularity", "48"))
    as_if_nothing_had_happened(config)


def test_device_that_is_not_there(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    for device in ("cuda:77", "meta", "nonsense"):
        refused(config, capsys, 2, f"no device '{device}'", "expected", flags=("--device", device))
    as_if_nothing_had_happened(config)


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
        ('{"levels": [1, 1, 1, 1, 1, 1], "provenance": {}}', ["--genome", "format 1, expected 2", "as a JSON list"]),
    ],
)
def test_genome_for_another_model(
    content: str | None, words: list[str], config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    genome = tmp_path / "genome.json"
    if content is not None:
        genome.write_text(content)
    refused(replace(config, genome=str(genome)), capsys, 2, *words)
    as_if_nothing_had_happened(config)


def test_genome_of_another_run(
    config: RunConfig, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = replace(config, out=str(tmp_path / "found"))
    compress.run(found, until="search")
    genome = str(tmp_path / "found" / "search" / "result.json")
    other = replace(config, model=str(checkpoints["mistral"]), genome=genome)
    refused(other, capsys, 2, "for another model", "search one on this model")
    other = replace(config, database=DatabaseConfig(levels=3, granularity=8), genome=genome)
    refused(other, capsys, 2, "for another level grid", "'levels': 3", "'levels': 4")
    as_if_nothing_had_happened(config)
