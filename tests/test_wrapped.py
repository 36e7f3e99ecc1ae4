"""The language model in a model of images and text is pruned in place: the rest of it stays, and computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import pruned
import runs
import wrappers
from darwinlm import compress
from darwinlm.database.stitch import repeat_shared
from darwinlm.export.gguf import export_gguf
from darwinlm.export.verify import Expected
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes
from darwinlm.model.reading import load
from darwinlm.model.wrapper_code import foreign_code
from darwinlm.types import Genome


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the code of exports."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", directory)
        yield


MARKS: dict[str, Any] = {"gemma3": (), "gemma4_unified": (pytest.mark.slow, pytest.mark.long)}  # which is like gemma4


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in wrappers.CONFIGS],
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, pruned.Pruned]:
    """A whole model, and the database of the language model in it."""
    root = tmp_path_factory.mktemp(family)
    model = wrappers.write_checkpoint(root / "dense", family)
    return model, pruned.prune(root / "dense", root / "database")


def tops(case: pruned.Pruned) -> list[int]:
    return [case.database.grid.highest(index) for index in range(len(case.database.grid.units))]


def export(case: pruned.Pruned, which: int, out: Path, verify: bool = False) -> Path:
    genome = case.genomes()[which]
    stitched = repeat_shared(case.stitcher.stitch(genome))
    sizes = block_sizes(case.database.grid, genome, case.dense.config)
    expected = Expected.of(stitched, case.checkpoint.whole) if verify else None
    return pruned.export_hf(stitched, sizes, pruned.tiny.tokenizer(), out, "", expected, case.checkpoint.path)


def test_the_language_model_computes_what_the_whole_computes_of_text(whole: tuple[Any, pruned.Pruned]) -> None:
    model, case = whole
    ids = pruned.token_ids(1) % (wrappers.IMAGE - 1)
    torch.testing.assert_close(case.dense(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


# A genome at random, one in which an attention and an MLP vanish, and one whose blocks are alike, for stock classes.
@pytest.mark.parametrize(
    "which", [pytest.param(0, marks=pytest.mark.long), -2, pytest.param(-1, marks=pytest.mark.long)]
)
def test_with_images_it_equals_its_zero_masked_twin(
    whole: tuple[Any, pruned.Pruned], family: str, which: int, tmp_path: Path
) -> None:
    model, case = whole
    out = export(case, which, tmp_path / "out", verify=which == -2)
    assert foreign_code(out) is None
    assert (out / "preprocessor_config.json").read_bytes() == (
        case.checkpoint.path / "preprocessor_config.json"
    ).read_bytes()
    masked = pruned.zero_masked(case.dense, case.database, case.genomes()[which])
    twin: Any = wrappers.masked_wrapper(model, masked.state_dict(), case.checkpoint.family.backbone)
    inputs = wrappers.image_inputs(family)
    expected = twin(**inputs).logits
    assert not torch.allclose(expected, twin(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits)
    found: Any = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(found(**inputs).logits, expected, rtol=1e-4, atol=2e-4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(found.generate(**inputs, **options), twin.generate(**inputs, **options))


def test_what_lies_beside_the_language_model_is_carried_over(whole: tuple[Any, pruned.Pruned], tmp_path: Path) -> None:
    model, case = whole
    out = export(case, 0, tmp_path / "out")
    stored: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        stored |= load_file(file)
    decoder = next(path for path, module in model.named_modules() if module is model.get_decoder())
    beside = {name: each for name, each in model.state_dict().items() if not name.startswith((decoder, "lm_head"))}
    assert beside
    assert all(torch.equal(stored[name], tensor) for name, tensor in beside.items())
    configs = [json.loads((each / "config.json").read_text()) for each in (out, case.checkpoint.path)]
    assert configs[0]["vision_config"] == configs[1]["vision_config"]


def test_an_export_is_read_again_as_a_language_model(whole: tuple[Any, pruned.Pruned], tmp_path: Path) -> None:
    _, case = whole
    out, ids = export(case, -2, tmp_path / "out"), pruned.token_ids(1)
    expected = pruned.zero_masked(case.dense, case.database, case.genomes()[-2])(ids).logits
    torch.testing.assert_close(load(out, torch.float32)(ids).logits, expected, rtol=1e-4, atol=2e-4)
    again = pruned.prune(out, tmp_path / "database")
    gone = sum(level == top for level, top in zip(case.genomes()[-2].levels, tops(case), strict=True))
    assert len(again.checkpoint.units) == len(case.checkpoint.units) - gone < len(case.checkpoint.units)
    twice = export(again, -1, tmp_path / "twice", verify=True)
    assert Checkpoint(twice).beside.keys() == case.checkpoint.beside.keys()


@pytest.mark.slow
def test_a_block_stays_behind_which_the_vision_tower_adds_something(tmp_path: Path) -> None:
    model = wrappers.write_checkpoint(tmp_path / "dense", "qwen3_vl")
    case = pruned.prune(tmp_path / "dense", tmp_path / "database")
    genome = Genome(tuple(top if index in (2, 3) else 0 for index, top in enumerate(tops(case))))
    stitched = repeat_shared(case.stitcher.stitch(genome))
    sizes = block_sizes(case.database.grid, genome, case.dense.config)
    assert sizes[1].empty
    out = pruned.export_hf(stitched, sizes, pruned.tiny.tokenizer(), tmp_path / "out", "", None, case.checkpoint.path)
    found: Any = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    masked = pruned.zero_masked(case.dense, case.database, genome)
    twin: Any = wrappers.masked_wrapper(model, masked.state_dict(), case.checkpoint.family.backbone)
    inputs = wrappers.image_inputs("qwen3_vl")
    torch.testing.assert_close(found(**inputs).logits, twin(**inputs).logits, rtol=1e-4, atol=2e-4)
    assert len(Checkpoint(out).units) == len(case.checkpoint.units) - 2


@pytest.mark.slow
def test_a_whole_model_in_memory_is_compressed(tmp_path: Path) -> None:
    model = wrappers.build("gemma3")
    settings = asdict(runs.short(tmp_path, tmp_path, tmp_path / "run"))
    for name in ("model", "data", "out"):
        del settings[name]
    texts = pruned.tiny.documents()
    run = compress(model, texts, out=tmp_path / "run", tokenizer=pruned.tiny.tokenizer(), **settings)
    assert run.exported is not None
    found: Any = AutoModelForImageTextToText.from_pretrained(run.exported, trust_remote_code=True)
    assert found(**wrappers.image_inputs("gemma3")).logits.isfinite().all()
    assert export_gguf(run.exported, tmp_path / "model.gguf", "f32").exists()
