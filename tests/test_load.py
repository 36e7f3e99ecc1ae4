"""`darwinlm.load` takes what a user has: a run, an export, a dense directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import darwinlm
import tiny
from darwinlm.export.card import model_card
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


@pytest.mark.slow
def test_the_lines_of_the_card_load_it_without_a_question(tmp_path: Path) -> None:
    case = Case("llama", {"vocab_size": tiny.VOCAB})
    card = model_card("me/dense", {}, {"Seed": "0"}, 100, 50)
    export = export_hf(*stitched_model(dense_model(case), case), tiny.tokenizer(), tmp_path / "model", card)
    lines = card.partition("```python\n")[2].partition("```")[0].replace("PATH", str(export))
    lines += 'model(**tokenizer("It loads.", return_tensors="pt"))\n'
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-W", "error", "-c", "import sys\nsys.modules['darwinlm'] = None\n" + lines]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" not in done.stdout
    assert "[transformers]" not in done.stderr


def test_a_dense_directory(checkpoints: dict[str, Path]) -> None:
    expected = tiny.build("qwen2")(TOKEN_IDS).logits
    torch.testing.assert_close(darwinlm.load(checkpoints["qwen2"])(TOKEN_IDS).logits, expected, atol=1e-4, rtol=0)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(darwinlm.UsageError, match=r"expected config\.json in .*, found none"):
        darwinlm.load(tmp_path)
    for name in (tmp_path / "nowhere", "me/nowhere"):
        with pytest.raises(darwinlm.UsageError, match=f"no model {name}: expected a run, a model directory or a hub"):
            darwinlm.load(name)


@pytest.mark.parametrize(("model", "parent"), [("me/dense", "me/dense"), ("./runs/mine", None), ("smollm2-135m", None)])
def test_a_hub_lists_an_export_below_its_parent(model: str, parent: str | None) -> None:
    assert ModelCard(model_card(model, {}, {}, 100, 50)).data.base_model == parent
