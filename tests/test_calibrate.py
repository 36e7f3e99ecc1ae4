"""Calibration takes models as they are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import tiny
from darwinlm.database.calibrate import calibrate
from darwinlm.model.checkpoint import Checkpoint


def test_a_padding_index_beyond_the_rows_that_are_looked_up(tmp_path: Path) -> None:
    """Phi-3, OLMo 2 and many Llamas pad with their last token; only rows of tokens in the text are loaded."""
    path = tiny.write_checkpoint(tmp_path / "model", "llama-gqa")
    token_ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(0))

    def hessians() -> list[torch.Tensor]:
        statistics = calibrate(Checkpoint(path), token_ids, batch_size=2, device=torch.device("cpu"))
        return [unit.hessian for unit in statistics]

    without = hessians()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"pad_token_id": tiny.VOCAB - 1}))
    assert all(torch.equal(one, other) for one, other in zip(without, hessians(), strict=True))
