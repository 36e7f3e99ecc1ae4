"""llama.cpp itself runs the files, and must give the log-probabilities of the Hugging Face exports they come from."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import llama_cpp
import tiny
from darwinlm.export.gguf import export_gguf
from darwinlm.export.hf import export_hf
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.reading import load
from darwinlm.types import DarwinError, FileType, UsageError
from exports import LLAMA_3_ROPE, Case, dense_model, stitched_model
from llama_cpp import Answer, difference, needs_llama_cpp
from vocabularies import TEMPLATE, byte_pair_tokenizer

CHANNELS, GROUPS, NEW_TOKENS = 96, 4, 32
SOME = tuple(range(40)) + tuple(range(70, 94))
ALL = tuple(range(CHANNELS))
UNEVEN = (((0, 1, 3), SOME), ((), SOME[:32]), ((2,), ()), ((0, 1, 2, 3), ALL))
EVEN = (((0, 2), SOME),) * 4
PROMPT = list(range(20, 32))


@dataclass(frozen=True)
class Kept:
    """A model, the structures that it keeps, and the architecture that its file should have."""

    family: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    kept: tuple[Any, ...] = UNEVEN


CASES = {
    "llama-untied": Kept("llama", "deci"),
    "llama-tied-biases": Kept("llama", "deci", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": Kept("llama", "deci", {"rope_parameters": LLAMA_3_ROPE}),
    "llama-linear-rope": Kept(
        "llama", "deci", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
    ),
    "llama-even": Kept("llama", "llama", {"rope_parameters": LLAMA_3_ROPE, "attention_bias": True}, EVEN),
    "mistral-head-width": Kept("mistral", "deci", {"head_dim": 24, "sliding_window": None}),
    "mistral-even": Kept("mistral", "llama", {"head_dim": 24, "sliding_window": None}, EVEN),
    "qwen2-tied": Kept("qwen2", "deci", {"tie_word_embeddings": True}),
    "qwen2-untied": Kept("qwen2", "deci"),
    "qwen2-narrow-attention": Kept("qwen2", "deci", kept=EVEN),
    "qwen2-even": Kept("qwen2", "qwen2", kept=(((0, 1, 2, 3), SOME),) * 4),
    "qwen3-tied": Kept("qwen3", "openelm", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-even": Kept("qwen3", "qwen3", {"head_dim": 24}, EVEN),
}


def write_export(name: str, out: Path) -> Path:
    kept = CASES[name]
    model = Case(kept.family, kept.options | {"vocab_size": tiny.VOCAB}, heads=8, groups=GROUPS, kept=kept.kept)
    stitched, sizes = stitched_model(dense_model(model), model)
    return export_hf(stitched, sizes, byte_pair_tokenizer("qwen2"), out, "card")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gguf")
    return {name: write_export(name, root / name) for name in CASES}


@pytest.fixture(scope="module")
def answers(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    root = tmp_path_factory.mktemp("answers")
    files = {name: export_gguf(directory, root / f"{name}.gguf", "f32") for name, directory in exports.items()}
    return llama_cpp.answers(files, PROMPT, root, tiny.VOCAB, NEW_TOKENS)


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_what_the_export_gives(exports: dict[str, Path], answers: dict[str, Answer], name: str) -> None:
    agreed, largest = difference(load(exports[name]), PROMPT, answers[name])
    print(f"{name}: {agreed} of {NEW_TOKENS} tokens, largest difference of a log-probability {largest:.1e}")
    assert len(answers[name].tokens) == agreed == NEW_TOKENS
    assert len(answers[name].log_probs[0]) == tiny.VOCAB
    assert largest < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_file_says_what_llama_cpp_needs(exports: dict[str, Path], tmp_path: Path, name: str) -> None:
    kept = CASES[name]
    reader = gguf.GGUFReader(export_gguf(exports[name], tmp_path / "model.gguf", "bf16"))
    settings = {key: value.contents() for key, value in reader.fields.items()}
    architecture = settings["general.architecture"]
    assert architecture == kept.architecture
    heads = settings[f"{architecture}.attention.head_count"]
    if architecture == "deci" and kept.kept is UNEVEN:
        assert heads == [6, 0, 2, 8]
        assert settings["deci.attention.head_count_kv"] == [3, 0, 1, 4]
        assert settings["deci.feed_forward_length"] == [64, 32, 32, 96]
    if architecture == "openelm":
        assert (heads, settings["openelm.attention.head_count_kv"]) == ([6, 1, 2, 8], [3, 1, 1, 4])
    assert settings["general.name"] == "model"
    assert settings["tokenizer.chat_template"] == TEMPLATE
    assert len(settings["tokenizer.ggml.tokens"]) == tiny.VOCAB
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for tensor, kind in kinds.items() if ".bias" in tensor or "norm" in tensor} == {"F32"}
    assert kinds["blk.0.attn_output.weight"] == "BF16"
    assert ("output.weight" in kinds) != kept.options.get("tie_word_embeddings", False)


@needs_llama_cpp
def test_coarser_files_come_close(exports: dict[str, Path], tmp_path: Path) -> None:
    directory = exports["qwen2-untied"]
    kinds: tuple[FileType, ...] = ("f16", "bf16", "q8_0")
    files = {kind: export_gguf(directory, tmp_path / f"{kind}.gguf", kind) for kind in kinds}
    model, answers = load(directory), llama_cpp.answers(files, PROMPT, tmp_path, tiny.VOCAB, 4)
    differences = {kind: difference(model, PROMPT, answer)[1] for kind, answer in answers.items()}
    assert 0 < differences["f16"] < 0.05, differences
    assert differences["f16"] < differences["bf16"] < 0.5, differences
    assert differences["f16"] < differences["q8_0"] < 0.5, differences
    sizes = {kind: file.stat().st_size for kind, file in files.items()}
    assert sizes["q8_0"] < sizes["f16"]


def test_rows_that_q8_0_cannot_hold_become_float16(exports: dict[str, Path], tmp_path: Path) -> None:
    reader = gguf.GGUFReader(export_gguf(exports["mistral-head-width"], tmp_path / "model.gguf", "q8_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.0.attn_output.weight"] == "F16"  # 6 heads of 24


def rewrite_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mistral-head-width", {"sliding_window": 7}, "found a sliding window of 7"),
        ("llama-untied", {"hidden_act": "gelu"}, "expected the activation silu"),
        ("llama-3-rope", {"rope_parameters": LLAMA_3_ROPE | {"rope_type": "dynamic"}}, "found rope_type dynamic"),
        ("llama-untied", {"model_type": "gptj", "auto_map": {}}, "one of the families .*llama, .*found gptj"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    exports: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    directory = tmp_path / name
    shutil.copytree(exports[name], directory)
    rewrite_config(directory, **changes)
    with pytest.raises(UsageError, match=reason):
        export_gguf(directory, tmp_path / "model.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_window_as_long_as_the_context_is_none(exports: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(exports["mistral-head-width"], directory)
    rewrite_config(directory, sliding_window=128)
    assert export_gguf(directory, tmp_path / "model.gguf", "f32").exists()


def test_a_file_that_reads_otherwise_than_it_was_written_gets_no_name(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of the last tensor changes on disk between writing and reading."""
    close = gguf.GGUFWriter.close

    def close_and_damage(writer: gguf.GGUFWriter) -> None:
        close(writer)
        (path,) = tmp_path.glob("*.partial")
        with path.open("r+b") as file:
            file.seek(-16, 2)
            byte = file.read(1)[0]
            file.seek(-16, 2)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(gguf.GGUFWriter, "close", close_and_damage)
    with pytest.raises(DarwinError, match="1 tensors that are not what was written"):
        export_gguf(exports["llama-even"], tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    assert export_gguf(exports["llama-even"], tmp_path / "model.gguf", verify=False).exists()


def test_file_appears_whole_or_not_at_all(exports: dict[str, Path], tmp_path: Path) -> None:
    out = export_gguf(exports["llama-untied"], tmp_path / "small")
    assert out == tmp_path / "small" / "small-F16.gguf"
    with pytest.raises(UsageError, match=r"expected .* to be new"):
        export_gguf(exports["llama-untied"], tmp_path / "small")
    with pytest.raises(UsageError, match=r"no model in .*expected config.json"):
        export_gguf(tmp_path, tmp_path / "other.gguf")
    directory = tmp_path / "damaged"
    shutil.copytree(exports["llama-untied"], directory)
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(DarwinError, match=r"expected a tensor model.layers.3.mlp.up_proj.weight, found none"):
        export_gguf(directory, tmp_path / "other.gguf")
    weights["model.layers.3.mlp.up_proj.weight"] = torch.full((CHANNELS, 64), 1e5)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(DarwinError, match=r"at most 65504 in blk.3.ffn_up.weight"):
        export_gguf(directory, tmp_path / "other.gguf", "f16")
    (directory / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DarwinError, match="cannot be read"):
        export_gguf(directory, tmp_path / "other.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "small"]


def random_case(blocks: int, seed: int = 0) -> Case:
    """SmolLM2-135M keeps random structures, and has lost one attention and one MLP whole."""
    draw = random.Random(seed)
    kept = []
    for index in range(blocks):
        groups = tuple(sorted(draw.sample(range(3), draw.randint(1, 3))))
        channels = tuple(sorted(draw.sample(range(1536), 32 * draw.randint(8, 48))))
        kept.append((() if index == 9 else groups, () if index == 17 else channels))
    return Case("llama", heads=9, groups=3, kept=tuple(kept))


@needs_llama_cpp
@pytest.mark.slow
def test_pruned_smollm2_in_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(smollm2), tmp_path)
    dense = checkpoint.load(torch.float32, torch.device("cpu"))
    case = random_case(dense.config.num_hidden_layers)
    stitched, sizes = stitched_model(dense, case)
    directory = export_hf(stitched, sizes, checkpoint.tokenizer, tmp_path / "model", "card")
    file = export_gguf(directory, tmp_path / "model.gguf", "f32")
    small = export_gguf(directory, tmp_path / "small.gguf", "q8_0")
    text = "Dr. Müller's 2024 report — 12,500 words — said: “naïve café”, 東京.\n\n    def f(x):\n\treturn x ** 2  # ok"
    prompt = checkpoint.tokenizer(text)["input_ids"]
    model, ends = load(directory), (0, 1, 2)
    by_text = llama_cpp.answers({"f32": file, "q8_0": small}, text, tmp_path, 100, NEW_TOKENS)
    by_ids = llama_cpp.answers({"f32": file}, prompt, tmp_path, 100, NEW_TOKENS)["f32"]
    agreed, largest = difference(model, prompt, by_ids, ends)
    print(f"SmolLM2: {agreed} of {NEW_TOKENS} tokens, largest difference of a log-probability {largest:.1e}")
    assert len(by_ids.tokens) == agreed == NEW_TOKENS
    assert largest < 1e-3
    assert (by_text["f32"].prompt_tokens, by_text["f32"].tokens) == (len(prompt), by_ids.tokens)
    assert difference(model, prompt, by_text["q8_0"], ends)[0] > NEW_TOKENS - 6
