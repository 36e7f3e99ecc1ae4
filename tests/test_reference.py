"""The published implementation's eliminations on the real SmolLM2, beside ours on the same tokens.

`fixtures/` holds the tokens and the figures of blocks 0 and 1; `../shared/reference`, where it exists, those of blocks
0 to 19. `H` of the published figures is a sum over 64 sequences, and their errors are half of ours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from darwinlm.database import eliminate
from darwinlm.database.calibrate import calibrate
from darwinlm.database.cholesky import dampen
from darwinlm.model.checkpoint import find_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_same_structures_leave_two_blocks_as_in_the_published_implementation(smollm2: Path) -> None:
    assert compare_with_published(FIXTURES, smollm2) == 4


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
def test_the_same_structures_leave_all_blocks_as_in_the_published_implementation(smollm2: Path) -> None:
    assert compare_with_published(SHARED, smollm2) == 40


def compare_with_published(reference: Path, smollm2: Path) -> int:
    """Check the structures removed at every level, and cumulative errors within 0.1 %. Returns the number of units."""
    published = json.loads((reference / "smollm2_elimination.json").read_text())
    tokens = torch.from_numpy(np.load(reference / "smollm2_calibration_tokens.npz")["tokens"]).long()
    checkpoint = find_checkpoint(str(smollm2), smollm2.parent)
    unpublished = {unit.name for unit in checkpoint.units if unit.consumer not in published["errors"]}
    compared = 0
    for statistics in calibrate(checkpoint, tokens, batch_size=8, device=torch.device("cpu"), finished=unpublished):
        unit = statistics.unit
        if unit.kind == "attention":  # the published structures are single query heads
            unit = replace(unit, structures=9, structure_width=64)
        hessian = dampen(statistics.hessian * statistics.tokens / len(tokens), 0.01)
        elimination = eliminate.eliminate(unit, statistics.weight, hessian)
        for removed in published["removed"][unit.consumer]:
            ours = sorted(elimination.order[: len(removed)].tolist())
            assert ours == removed, f"{unit.name} at {len(removed)} removed"
        for count, error in published["errors"][unit.consumer][1:]:
            assert float(elimination.errors[count - 1]) / 2 == pytest.approx(error, rel=1e-3), unit.name
        compared += 1
    assert compared == len(published["errors"])
    return compared
