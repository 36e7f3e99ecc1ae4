"""GGUF files of few bits: llama.cpp runs them as their dequantised weights say, and importance weighs their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Precision
from transformers import LlamaConfig, LlamaForCausalLM

import llama_cpp
import runs
import tiny
from darwinlm.config.run import CalibrationConfig
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import repeat_shared
from darwinlm.export.gguf import export_gguf
from darwinlm.export.gguf_precision import MIXES, QUANTISED, fitting
from darwinlm.export.gguf_twin import twin
from darwinlm.export.hf import export_hf
from darwinlm.export.importance import mean_squares
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.families import block_sizes
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count
from darwinlm.search.costs import weight_costs
from darwinlm.types import FileType
from llama_cpp import difference, needs_llama_cpp
from pruned import prune
from refusals import told
from test_export_gguf import CASES, PROMPT, exports  # noqa: F401
from vocabularies import byte_pair_tokenizer

pytest.importorskip("libgguf")
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)
BITS = {"q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9, "q4_0": 4.6}
"""The most bits that a weight takes in a model whose rows all fit, small as it is."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose rows are multiples of 256, with channels of very different size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    for norm in (module for name, module in model.named_modules() if name.endswith("layernorm")):
        norm.weight.data = torch.exp(0.5 * torch.randn(256))
    path = tmp_path_factory.mktemp("wide")
    model.save_pretrained(path)
    byte_pair_tokenizer("qwen2").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bits")
    importance = mean_squares(load(wide), token_ids())
    kinds: tuple[Any, ...] = QUANTISED
    return {kind: export_gguf(wide, root / f"{kind}.gguf", kind, importance=importance) for kind in kinds}


def token_ids() -> torch.Tensor:
    return torch.randint(10, tiny.VOCAB, (8, 64), generator=torch.Generator().manual_seed(1))


@needs_llama_cpp
def test_llama_cpp_runs_the_weights_that_the_file_holds(files: dict[str, Path], wide: Path, tmp_path: Path) -> None:
    """It rounds activations as well, so it comes closer to the dequantised model than to the model itself."""
    answers = llama_cpp.answers(files, PROMPT, tmp_path, tiny.VOCAB, 8)
    for kind, file in files.items():
        dequantised = find_checkpoint(str(file), tmp_path / kind).load(torch.float32, torch.device("cpu"))
        held = difference(dequantised, PROMPT, answers[kind])[1]
        meant = difference(load(wide), PROMPT, answers[kind])[1]
        assert held < min(0.1, 0.7 * meant), kind


def test_files_have_the_bits_of_their_name_and_llama_cpps_mix(files: dict[str, Path]) -> None:
    for kind, file in files.items():
        reader = gguf.GGUFReader(file)
        matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
        bits = 8 * sum(tensor.n_bytes for tensor in matrices) / sum(tensor.n_elements for tensor in matrices)
        assert bits < BITS[kind], kind
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert kinds["output.weight"] == "Q6_K"
        assert kinds["output_norm.weight"] == "F32"
    settings = gguf.GGUFReader(files["q4_k_m"]).fields
    assert settings["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_a_target_counts_the_bytes_of_the_file(wide: Path, tmp_path: Path) -> None:
    """Also where rows are too narrow for the type, and take another."""
    case = prune(wide, tmp_path / "database")
    config, grid = case.dense.config, case.database.grid
    for genome in (grid.dense(), case.genomes()[0]):
        narrow = repeat_shared(case.stitcher.stitch(genome))
        sizes = block_sizes(grid, genome, config)
        source = export_hf(narrow, sizes, byte_pair_tokenizer("qwen2"), tmp_path / f"{genome.levels}", "card")
        for kind in FILE_TYPES:
            file = export_gguf(source, tmp_path / f"{genome.levels}.{kind}.gguf", kind, verify=False)
            held = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
            counted = weight_costs(grid, config, parameter_count(case.dense), kind).of(genome)
            assert counted == pytest.approx(held, rel=1e-3), kind


def test_the_mix_gives_values_and_down_projections_more_bits_in_some_blocks() -> None:
    """As in the Q4_K_M files of Llama-3.1-8B that llama.cpp makes."""
    mix = MIXES["q4_k_m"]
    more = [block for block in range(32) if mix.of(f"blk.{block}.ffn_down.weight", 32, False) is Precision.Q6_K]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more == [block for block in range(32) if mix.of(f"blk.{block}.attn_v.weight", 32, False) is Precision.Q6_K]
    assert mix.of("blk.0.attn_q.weight", 32, False) is mix.of("token_embd.weight", 32, False) is Precision.Q4_K
    assert mix.of("token_embd.weight", 32, True) is mix.of("output.weight", 32, False) is Precision.Q6_K


@pytest.mark.parametrize(
    ("precision", "width", "found"),
    [
        (Precision.Q4_K, 512, Precision.Q4_K),
        (Precision.Q4_K, 416, Precision.Q5_0),
        (Precision.Q5_K, 416, Precision.Q5_1),
        (Precision.Q6_K, 416, Precision.Q8_0),
        (Precision.Q4_K, 100, Precision.F16),
        (Precision.Q4_0, 96, Precision.Q4_0),
        (Precision.Q4_0, 100, Precision.F16),
    ],
)
def test_narrow_rows_take_more_bits(precision: Precision, width: int, found: Precision) -> None:
    assert fitting(precision, width) is found


def test_narrow_rows_are_told(
    exports: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    file = export_gguf(exports["llama-even"], tmp_path / "model.gguf", "q4_k_m")
    (said,) = told(capsys.readouterr().err)
    assert said == (
        "q4_k_m: 99% of the weights are in rows whose width it cannot hold, and take more bits; --database.granularity "
        "256 makes MLPs that fit"
    )
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {"Q5_0", "Q8_0", "F32"}


@pytest.mark.parametrize("kind", QUANTISED)
def test_importance_lowers_the_error_where_it_matters(kind: FileType, wide: Path, tmp_path: Path) -> None:
    importance = mean_squares(load(wide), token_ids())
    weights = dict(load(wide).named_parameters())
    errors = []
    for number, given in enumerate((importance, None)):
        file = export_gguf(wide, tmp_path / f"{number}.gguf", kind, verify=False, importance=given)
        held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        total = 0.0
        for block in range(3):
            tensor = held[f"blk.{block}.ffn_up.weight"]
            path = f"model.layers.{block}.mlp.up_proj"
            found = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            off = weights[f"{path}.weight"].detach() - found
            total += float((off.square() * importance[path]).sum())
        errors.append(total)
    assert errors[0] < (1.0 if kind == "q6_k" else 0.97) * errors[1], errors


def test_importance_is_the_diagonal_of_the_hessian(checkpoints: dict[str, Path]) -> None:
    """Of the consumers, whose Hessians calibration sums independently."""
    checkpoint = Checkpoint(checkpoints["llama-gqa"])
    ids = torch.randint(1, tiny.VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    found = mean_squares(load(checkpoint.path), ids)
    for unit in calibrate(checkpoint, ids, batch_size=2, device=torch.device("cpu")):
        expected = unit.hessian.diagonal() / unit.hessian.diagonal().sum()
        own = found[unit.unit.consumer]
        torch.testing.assert_close(own / own.sum(), expected.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_importance_follows_the_columns_of_every_layout(
    name: str,
    exports: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Also of uneven models, whose columns are padded or spread: the file is whole, and near the model."""
    model = load(exports[name])
    ids = torch.randint(10, tiny.VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    file = export_gguf(exports[name], tmp_path / "model.gguf", "q4_0", importance=mean_squares(model, ids))
    exact = export_gguf(exports[name], tmp_path / "exact.gguf", "f32", verify=False)
    reference = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(exact).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        held = gguf.dequantize(tensor.data, tensor.tensor_type)
        scale = np.abs(reference[tensor.name]).max() + 1e-6
        assert np.abs(held.reshape(-1) - reference[tensor.name].reshape(-1)).max() < 0.2 * scale, tensor.name


def test_a_runs_own_text_tells_the_importance(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.short(
        checkpoints["llama-gqa"], text, tmp_path / "run", calibration=CalibrationConfig(tokens=512, sequence_length=32)
    )
    assert runs.call(*runs.command(config, name="search")) == 0
    shape = ("--format", "gguf", "--type", "q4_0", "--no-verify", "--tokens", "256")
    capsys.readouterr()
    assert runs.call("export", config.out, "--out", str(tmp_path / "own.gguf"), *shape) == 0
    assert any(line.startswith("importance: ") for line in told(capsys.readouterr().err))
    exported = str(Path(config.out) / "model")
    assert runs.call("export", exported, "--out", str(tmp_path / "flat.gguf"), *shape) == 0
    assert any("all weights count the same" in line for line in told(capsys.readouterr().err))
    with_text = ("--data", str(text))
    assert runs.call("export", exported, "--out", str(tmp_path / "same.gguf"), *shape, *with_text) == 0
    modelfile = (tmp_path / "own.Modelfile").read_text().splitlines()
    assert modelfile[:2] == ["FROM ./own.gguf", "PARAMETER num_ctx 256"]
    own, flat, same = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("own", "flat", "same"))
    assert own[-4096:] == same[-4096:]
    assert own != flat


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_a_twin_computes_what_the_file_says(kind: FileType, wide: Path, tmp_path: Path) -> None:
    importance = mean_squares(load(wide), token_ids()) if kind in QUANTISED else None
    file = export_gguf(wide, tmp_path / f"{kind}.gguf", kind, importance=importance)
    model, size = twin(wide, kind, importance)
    read = find_checkpoint(str(file), tmp_path / "work").load(torch.float32, torch.device("cpu"))
    assert size == sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    for name, weight in read.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m"])
@pytest.mark.parametrize("case", ["llama-untied", "qwen2-narrow-attention", "qwen3-tied"])
def test_a_twin_of_an_uneven_model_has_the_rows_of_the_file(
    kind: FileType,
    case: str,
    exports: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    file = export_gguf(exports[case], tmp_path / f"{case}.gguf", kind)
    model, size = twin(exports[case], kind)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert size == sum(tensor.n_bytes for tensor in held.values())
    modules, compared = dict(model.named_modules()), 0
    for index in range(model.config.num_hidden_layers):
        for name, path in (
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
            ("attn_output", "self_attn.o_proj"),
        ):
            module = modules.get(f"model.layers.{index}.{path}")
            if module is not None:
                tensor = held[f"blk.{index}.{name}.weight"]
                expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                kept = expected[
                    :, np.abs(expected).sum(0) > 0
                ]  # without the heads and channels that are written as zeros
                np.testing.assert_allclose(module.weight.detach().numpy(), kept, atol=1e-7, err_msg=name)
                compared += 1
        if case == "qwen3-tied" and f"blk.{index}.attn_qkv.weight" in held:
            tensor = held[f"blk.{index}.attn_qkv.weight"]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            kept = expected[np.abs(expected).sum(1) > 0]
            parts = [modules.get(f"model.layers.{index}.self_attn.{name}_proj") for name in "qkv"]
            found = [part.weight.detach().numpy() for part in parts if part is not None]
            assert len(found) == 3 or not len(kept)
            if found:
                np.testing.assert_allclose(np.concatenate(found), kept, atol=1e-7)
                compared += 3
    assert compared > (12 if case == "qwen3-tied" else 6)
