"""`darwinlm export` writes a run's model, or any export, in another form."""

from __future__ import annotations

import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from darwinlm.export.hf import export_hf
from darwinlm.export.vllm import check_vllm
from darwinlm.model.reading import load
from darwinlm.types import DarwinError
from exports import CARD, Case, dense_model, stitched_model
from refusals import only_sentence
from vocabularies import byte_pair_tokenizer

PYTORCH = {"format": "pt"}  # without this transformers asks what wrote the file


def export(*arguments: Path | str) -> int:
    return runs.call("export", *map(str, arguments))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in which one block has no attention, and another no MLP."""
    case = Case("llama", {"vocab_size": 320})
    stitched, sizes = stitched_model(dense_model(case), case)
    return export_hf(stitched, sizes, byte_pair_tokenizer("qwen2"), tmp_path_factory.mktemp("source") / "model", CARD)


@pytest.mark.slow
def test_a_directory_for_vllm(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "for-vllm"
    assert export(source, "--compat", "vllm", "--out", out) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out)
    assert "loads without darwinlm" in said.err
    assert "can be split in no way among several devices" in " ".join(said.err.split())
    assert "vLLM would refuse" not in said.err
    assert check_vllm(out) == []
    card = (out / "README.md").read_text()
    assert card.startswith(CARD)
    assert f"{sum(tensor.numel() for tensor in load(out).parameters()):,} parameters with these" in card
    token_ids = torch.arange(20, 32)[None]
    torch.testing.assert_close(load(out)(token_ids).logits, load(source)(token_ids).logits, atol=1e-5, rtol=0)


def test_a_plain_copy_says_what_vllm_would_refuse(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(source, "--no-verify", "--out", tmp_path / "copy") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no attention in block 1: export with --compat vllm" in said
    assert "loads without darwinlm" not in said


def test_a_run_as_a_gguf_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run / "model")
    (run / "run.yaml").touch()
    out = tmp_path / "small.gguf"
    assert export(run, "--format", "gguf", "--type", "q8_0", "--out", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_bytes()[:4] == b"GGUF"


def test_what_cannot_be_exported_is_said_in_one_sentence(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").touch()
    for arguments, sentence in (
        ((tmp_path, "--out", tmp_path / "out"), "its run has not come to its export yet"),
        ((tmp_path / "none", "--out", tmp_path / "out"), "no model in"),
        ((source, "--out", source), "to be new or empty"),
        ((source, "--format", "gguf", "--compat", "vllm", "--out", tmp_path / "out"), "--compat: expected none for a"),
        ((source, "--type", "q8_0", "--out", tmp_path / "out"), "--type: expected none for a directory"),
        ((source, "--format", "onnx", "--out", tmp_path / "out"), "--format"),
    ):
        assert export(*arguments) == 2
        said = only_sentence(capsys.readouterr().err)
        assert sentence in said


@pytest.mark.parametrize("flags", [("--no-verify",), ("--format", "gguf"), ("--compat", "vllm")])
def test_full_disk(source: Path, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Limit the size of files to some kilobytes, enough for the settings of a model but not for its weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = export(source, *flags, "--out", tmp_path / "out.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence = only_sentence(capsys.readouterr().err)
    assert code == 1
    assert "File too large" in sentence or "found that blk.0" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_files_are_as_readable_as_any_that_the_user_makes(source: Path, form: str, tmp_path: Path) -> None:
    before = os.umask(0o026)
    try:
        assert export(source, "--format", form, "--no-verify", "--out", tmp_path / "out.gguf") == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_damaged_sources_are_refused_and_never_filled_up(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would fill missing weights with random numbers."""

    def refused(code: int, words: str) -> None:
        assert export(tmp_path / "model", "--no-verify", "--out", tmp_path / "out") == code
        said = only_sentence(capsys.readouterr().err)
        assert words in said
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    model = shutil.copytree(source, tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(model / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != name}, model / "model.safetensors", PYTORCH)
    refused(1, f"lacks {name} in the shape that config.json says")
    with pytest.raises(DarwinError, match=f"lacks {name}"):
        load(model)
    save_file(weights | {name: torch.zeros(63, 64)}, model / "model.safetensors", PYTORCH)
    refused(1, f"lacks {name} in the shape that config.json says")
    (model / "model.safetensors").write_bytes(b"no tensors")
    refused(1, "cannot be read")
    save_file(weights, model / "model.safetensors", PYTORCH)
    for tokenizer in ("tokenizer.json", "tokenizer_config.json"):
        (model / tokenizer).unlink()
    refused(2, "no tokenizer in")
