"""Which groups of 4-bit weights fit: what is said agrees with the widths themselves, and the settings named cure it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from darwinlm.config.run import DatabaseConfig
from darwinlm.export.groups import GROUPS, group_note, group_row
from darwinlm.genome import Grid
from darwinlm.model.families import find_grid
from darwinlm.model.reading import skeleton

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
ROUND = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}


def config(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)


def grid(shape: dict[str, int], **settings: Any) -> Grid:
    return find_grid(skeleton(config(**shape)), config(**shape), DatabaseConfig(levels=9, **settings))


def fits(this: Grid, hidden: int, group: int) -> bool:
    """Whether every width of every level is a multiple, counted one by one."""
    kept = [
        (unit.structures - removed) * unit.structure_width
        for unit, counts in zip(this.units, this.removed, strict=True)
        for removed in counts
    ]
    return all(width % group == 0 for width in [hidden, *kept])


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (SMOLLM2, "--database.granularity 64 makes groups of 64 fit"),
        (ROUND, "--database.granularity 128 --database.divisible-by 2 makes groups of 128 fit"),
        (WIDE, "--database.granularity 128 makes groups of 128 fit"),
    ],
)
def test_the_settings_of_a_plan_make_groups_fit(shape: dict[str, int], settings: str) -> None:
    row, hidden = group_row(grid(shape), shape["hidden_size"]), shape["hidden_size"]
    assert row == f"groups of 32 fit every level; {settings}"
    assert next(group for group in GROUPS if fits(grid(shape), hidden, group)) == 32
    named = {name.replace("-", "_"): int(value) for name, value in re.findall(r"database\.([\w-]+) (\d+)", settings)}
    group = int(settings.split()[-2])
    assert fits(grid(shape, **named), hidden, group)
    assert group_row(grid(shape, **named), hidden) == f"groups of {group} fit every level"


def test_an_export_says_what_its_matrices_allow() -> None:
    assert group_note(LlamaForCausalLM(config(**ROUND))).endswith("groups of 128 divide the rows of all matrices")
    model = LlamaForCausalLM(config(**ROUND))
    mlp: Any = model.model.layers[1].mlp
    mlp.down_proj = torch.nn.Linear(1536 - 32, 512, bias=False)
    down = mlp.down_proj.weight.numel()
    share = down / sum(layer.weight.numel() for layer in model.model.modules() if isinstance(layer, torch.nn.Linear))
    assert f"do not divide the rows of {share:.0%} of the weights, groups of 32 do;" in group_note(model)
