"""Small exports of every shape of block for vLLM, whose CPU kernels want heads of 32, and their greedy tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import pruned
from darwinlm.commands.export import convert
from darwinlm.config.run import ExportConfig
from darwinlm.model.reading import load
from darwinlm.types import Genome

KINDS = ("even", "uneven", "stubs")
SHAPES = tuple(shape for shape in pruned.tiny.CONFIGS if "hybrid" not in shape)
HEAD, CHANNELS = 32, 256
PROMPTS = ([20, 21, 22, 23], list(range(30, 60)), [100, 50, 7, 9, 200, 11])
NEW_TOKENS = 24
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def widen(config: Any) -> Any:
    """The config of the same shape with heads of 32 and MLPs of 256."""
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    hidden = HEAD * config.num_attention_heads
    named = {
        "hidden_size": hidden, "n_embd": hidden, "d_model": hidden, "word_embed_proj_dim": hidden, "head_dim": HEAD,
        "query_pre_attn_scalar": HEAD, "initializer_range": 0.1, **dict.fromkeys(WIDTHS, CHANNELS),
    }  # fmt: skip
    if config.model_type in ("bloom", "mpt"):
        named["intermediate_size"] = 4 * hidden
    fields |= {name: value for name, value in named.items() if fields.get(name)}
    return type(config)(**fields)


def prepare(shape: str, root: Path) -> Path:
    """Write a directory for each kind of export: all layers alike, sizes of their own, and stubs for what is gone."""
    directory = root / shape
    structure = "head" if "mqa" in shape else "kv_group"
    with patch.dict(pruned.tiny.CONFIGS, {shape: widen(pruned.tiny.CONFIGS[shape])}):
        pruned.tiny.write_checkpoint(directory / "dense", shape)
    with patch.object(pruned, "CONFIG", replace(pruned.CONFIG, granularity=32)):
        case = pruned.prune(directory / "dense", directory / "database", structure)
    for name, genome in genomes(case.database.grid).items():
        pruned.write_export(case, genome, directory / name)
    convert(directory / "gone", directory / "stubs", ExportConfig(compat="vllm"))
    return directory


def genomes(grid: Any) -> dict[str, Genome]:
    """A genome for each kind of export; in the third, the second attention and the last MLP are gone."""
    places = {kind: list(members) for kind, members in grid.kinds().items()}
    levels = {
        "even": {"attention": (2, 2, 2), "mlp": (2, 2, 2)},
        "uneven": {"attention": (1, 0, 2), "mlp": (2, 3, 1)},
        "gone": {"attention": (1, None, 1), "mlp": (1, 1, None)},
    }
    found = {}
    for name, chosen in levels.items():
        genome = [0] * len(grid.units)
        for kind, members in places.items():
            for index, level in zip(members, cycle(chosen[kind]), strict=False):
                genome[index] = grid.highest(index) if level is None else level
        found[name] = Genome(tuple(genome))
    return found


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers makes of a prompt; no token ends the text."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    options = {"do_sample": False, "max_new_tokens": count, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


def expected(directory: Path, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = NEW_TOKENS) -> list[list[int]]:
    """The greedy tokens of an export in transformers, in float32."""
    model = load(directory, torch.float32)
    return [greedy(model, prompt, count) for prompt in prompts]


def agreed(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> str:
    """How many tokens are the same, place by place."""
    pairs = [pair for ours, theirs in zip(found, wanted, strict=True) for pair in zip(ours, theirs, strict=True)]
    return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}"
