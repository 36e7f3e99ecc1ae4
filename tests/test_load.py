"""`darwinlm.load` takes what a user has: a run, an export, a dense directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import darwinlm
import tiny
from darwinlm.export.hf import export_hf
from exports import CARD, Case, dense_model, stitched_model

TOKEN_IDS = torch.arange(20, 32)[None]


def test_a_run_and_its_export_are_the_same_model(tmp_path: Path) -> None:
    case = Case("llama", {"vocab_size": tiny.VOCAB})
    stitched, sizes = stitched_model(dense_model(case), case)
    export = export_hf(stitched, sizes, tiny.tokenizer(), tmp_path / "run" / "model", CARD)
    expected = stitched(TOKEN_IDS).logits
    torch.testing.assert_close(darwinlm.load(export)(TOKEN_IDS).logits, expected, atol=1e-4, rtol=0)
    (tmp_path / "run" / "run.yaml").touch()
    torch.testing.assert_close(darwinlm.load(str(tmp_path / "run"))(TOKEN_IDS).logits, expected, atol=1e-4, rtol=0)
    assert darwinlm.load(export, dtype="bfloat16").dtype == torch.bfloat16
    shutil.rmtree(export)
    with pytest.raises(darwinlm.UsageError, match="its run has not come to its export yet"):
        darwinlm.load(tmp_path / "run")


def test_a_dense_directory(checkpoints: dict[str, Path]) -> None:
    expected = tiny.build("qwen2")(TOKEN_IDS).logits
    torch.testing.assert_close(darwinlm.load(checkpoints["qwen2"])(TOKEN_IDS).logits, expected, atol=1e-4, rtol=0)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(darwinlm.UsageError, match=r"expected config\.json in .*, found none"):
        darwinlm.load(tmp_path)
    for name in (tmp_path / "nowhere", "me/nowhere"):
        with pytest.raises(darwinlm.UsageError, match=f"no model {name}: expected a run, a model directory or a hub"):
            darwinlm.load(name)
