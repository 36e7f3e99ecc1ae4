"""The published implementation's figures on the real SmolLM2, beside ours on the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from darwinlm.database import eliminate
from darwinlm.database.calibrate import calibrate
from darwinlm.model.checkpoint import find_checkpoint

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCE.exists(), reason=f"{REFERENCE} is not on this machine"),
    pytest.mark.timeout(600),
]


def test_same_structures_are_removed_as_by_the_published_implementation(smollm2: Path) -> None:
    """The same heads and channels at every level of all 20 blocks, and cumulative errors within 0.1 %."""
    published = json.loads((REFERENCE / "smollm2_elimination.json").read_text())
    tokens = torch.from_numpy(np.load(REFERENCE / "smollm2_calibration_tokens.npz")["tokens"]).long()
    checkpoint = find_checkpoint(str(smollm2), smollm2.parent)
    later = {unit.name for unit in checkpoint.units if unit.consumer not in published["errors"]}
    compared = 0
    for statistics in calibrate(checkpoint, tokens, batch_size=8, device=torch.device("cpu"), finished=later):
        unit = statistics.unit
        if unit.kind == "attention":  # the published structures are single query heads
            unit = replace(unit, structures=9, structure_width=64)
        # Published Hessians are sums over 64 sequences, ours means over tokens; published errors are halved.
        hessian = eliminate.dampen(statistics.hessian * statistics.tokens / len(tokens), 0.01)
        found = eliminate.eliminate(unit, statistics.weight, hessian)
        for removed in published["removed"][unit.consumer]:
            assert sorted(found.order[: len(removed)].tolist()) == removed, f"{unit.name} at {len(removed)} removed"
        for count, error in published["errors"][unit.consumer][1:]:
            assert float(found.errors[count - 1]) / 2 == pytest.approx(error, rel=1e-3), unit.name
        compared += 1
    assert compared == len(published["errors"]) == 40
