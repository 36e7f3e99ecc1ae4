"""Pruned models of every family and every attention structure, exported and loaded, equal the zero-masked dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import pruned
import tiny
from darwinlm.database.stitch import repeat_shared
from darwinlm.export.hf import export_hf
from darwinlm.model.families import block_sizes, block_sizes_of, find_family
from darwinlm.model.reading import load
from darwinlm.types import Genome, Structure


@pytest.mark.parametrize("family", ["llama-gqa", "olmo2", "phi3"])  # apart, with norms over all heads, and fused
@pytest.mark.parametrize("structure", ["kv_group", "balanced", "head"])
def test_export_of_every_structure(
    structure: Structure, family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    case = pruned.prune(checkpoints[family], tmp_path / "database", structure)
    grid, config, ids = case.database.grid, case.dense.config, pruned.token_ids(1)
    different = repeated = 0
    for number, genome in enumerate(case.genomes()[3:]):
        sizes = block_sizes(grid, genome, config)
        if not sizes[0].query_heads:  # which no search gives, and no export takes
            continue
        stitched = repeat_shared(case.stitcher.stitch(genome))
        exported = load(export_hf(stitched, sizes, tiny.tokenizer(), tmp_path / str(number), "card")).eval()
        expected = pruned.zero_masked(case.dense, case.database, genome)(ids).logits
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=2e-4)
        left = [block for block in sizes if block.query_heads or block.intermediate]
        assert list(block_sizes_of(exported)) == left
        different += len(set(left)) > 1
        repeated += any(block.key_value_heads > config.num_key_value_heads for block in left)
    assert different > 1
    assert (repeated > 0) == (structure == "head")


FAMILIES = list(tiny.CONFIGS)


def has(layer: nn.Module, path: str) -> bool:
    return path in dict(layer.named_modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_every_family(family: str, checkpoints: dict[str, Path], tmp_path: Path):
    """In the first genome a unit of every kind is missing; in the second, a whole block, so that others move up."""
    case = pruned.prune(checkpoints[family], tmp_path / "database", "head" if "mqa" in family else "kv_group")
    grid, ids = case.database.grid, pruned.token_ids(1)
    block = 2 if "mixer" in grid.kinds() else 1
    tops = [grid.highest(index) for index in range(len(grid.units))]
    gone = [top if unit.block == block else min(1, top - 1) for unit, top in zip(grid.units, tops, strict=True)]
    for number, genome in enumerate((case.genomes()[-2], Genome(tuple(gone)))):
        exported: Any = load(pruned.write_export(case, genome, tmp_path / str(number)))
        expected = pruned.zero_masked(case.dense, case.database, genome)(ids).logits
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=2e-4)
        assert find_family(exported) == case.checkpoint.family, "it can be pruned again"
        options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(exported.generate(ids, **options), exported.generate(ids, use_cache=False, **options))
        exported.set_attn_implementation("eager")
        attentions = [module for module in exported.modules() if getattr(module, "is_causal", False)]
        assert {module.config._attn_implementation for module in attentions} <= {"eager"}
        if "alibi" not in family:  # where Falcon's written-out attention adds the slopes twice, of dense models too
            torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=2e-4)
        attentions = exported(ids[:1], output_attentions=True).attentions
        layers: Any = exported.get_submodule(case.checkpoint.family.blocks)
        mixed = dict(zip(layers, block_sizes_of(exported), strict=True))  # of which some never had an attention
        heads = [size.query_heads for layer, size in mixed.items() if has(layer, case.checkpoint.family.attention)]
        assert [weights.shape[1] for weights in attentions] == heads, "every layer has an entry"
        # What FSDP wraps, and device_map does not split, is there as in the dense model.
        whole, left = ({type(module).__name__ for module in each.modules()} for each in (case.dense, exported))
        assert set(exported._no_split_modules) & whole <= left


@pytest.mark.parametrize("family", ["llama-gqa", "olmo2", "gpt2-mha"])
def test_a_classifier_starts_from_an_export(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    case = pruned.prune(checkpoints[family], tmp_path / "database")
    directory, ids = pruned.write_export(case, case.genomes()[-2], tmp_path / "export"), pruned.token_ids(1)
    exported: Any = load(directory)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3).eval()
    states = exported.base_model(ids).last_hidden_state
    torch.testing.assert_close(classifier(ids).logits, classifier.score(states[:, -1]))
    with pytest.raises(NotImplementedError, match="use generate instead"):
        exported.generate_batch(inputs=ids[:1].tolist())


def test_stock_classes_do_not_read_sizes_of_layers() -> None:
    """Once they do, exports need no code of their own: write stock configs with `per_layer_config` (issue 21)."""
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 8}
    uneven = {"0": {"intermediate_size": 16}, "1": {"num_attention_heads": 2, "num_key_value_heads": 2}}
    switch = {"allow_global_per_layer_attribute_access": True}
    config = LlamaConfig(**fields, intermediate_size=64, per_layer_config=uneven, **switch)  # pyright: ignore[reportCallIssue]
    layers: Any = AutoModelForCausalLM.from_config(config).get_submodule("model.layers")
    assert [layer.mlp.down_proj.in_features for layer in layers] == [64, 64]
    assert [layer.self_attn.o_proj.in_features for layer in layers] == [32, 32]


def test_an_export_that_does_not_describe_its_layers_loads(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Those of earlier versions do not: their code knows the layers."""
    case = pruned.prune(checkpoints["llama-gqa"], tmp_path / "database")
    directory = pruned.write_export(case, case.genomes()[-2], tmp_path / "export")
    expected = load(directory)(pruned.token_ids(1)).logits
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("layer_parts")["rows"]["mlp.gate_proj"] == ["channels"]
    (directory / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(directory)(pruned.token_ids(1)).logits, expected)
