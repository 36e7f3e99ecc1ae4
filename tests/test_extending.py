"""What docs/extending.md says of a family that needs a row, followed for a family that nobody has heard of."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import pruned
import tiny
from darwinlm.model import families
from darwinlm.model.reading import load
from darwinlm.types import UsageError

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


class InventedConfig(Phi3Config):
    model_type = "mymodel"


class InventedModel(Phi3Model):
    config_class = InventedConfig


class InventedForCausalLM(Phi3ForCausalLM):
    config_class = InventedConfig


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model of the family, which is made known to transformers and to nothing else."""
    for names, cls in (
        (CONFIG_MAPPING_NAMES, InventedConfig),
        (MODEL_MAPPING_NAMES, InventedModel),
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, InventedForCausalLM),
    ):
        monkeypatch.setitem(names, "mymodel", cls.__name__)
        monkeypatch.setattr(sys.modules["transformers"], cls.__name__, cls, raising=False)
    AutoConfig.register("mymodel", InventedConfig, exist_ok=True)
    AutoModel.register(InventedConfig, InventedModel, exist_ok=True)
    AutoModelForCausalLM.register(InventedConfig, InventedForCausalLM, exist_ok=True)
    fields: dict[str, Any] = tiny.CONFIGS["phi3"].to_diff_dict() | {"model_type": "mymodel"}
    monkeypatch.setitem(tiny.CONFIGS, "mymodel", InventedConfig(**fields))
    return tiny.write_checkpoint(tmp_path / "dense", "mymodel")


def test_a_row_is_all_that_a_family_needs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "ROWS", dict(families.ROWS))
    with pytest.raises(UsageError, match=r"qkv_proj: expected .*found a fused one|qkv_proj: expected 8 heads"):
        pruned.Checkpoint(checkpoint).units  # noqa: B018
    (row,) = re.findall(r"```python\n(from darwinlm.model.families import ROWS\n.*?)```", PAGE.read_text(), re.DOTALL)
    exec(row)
    case = pruned.prune(checkpoint, tmp_path / "database")
    genome, ids = case.genomes()[-2], pruned.token_ids(1)
    expected = pruned.zero_masked(case.dense, case.database, genome)(ids).logits
    torch.testing.assert_close(case.stitcher.stitch(genome)(ids).logits, expected, rtol=1e-4, atol=2e-4)
    exported = load(pruned.write_export(case, genome, tmp_path / "export"))
    assert exported.config.model_type == "pruned_mymodel"
    torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=2e-4)
