"""An exported directory equals the zero-masked dense model, in a process where darwinlm cannot be imported."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from darwinlm.export.hf import export_hf
from darwinlm.export.verify import Expected, float32_logits, verify_export
from darwinlm.model.pruned import pruned_config, register, remaining_blocks, render, renumber_blocks
from darwinlm.model.reading import load
from darwinlm.runtime.files import new_directory
from darwinlm.types import BlockSizes, DarwinError, UsageError
from exports import (
    BLOCKS,
    CARD,
    CASES,
    FRESH_PROCESS,
    NATIVE,
    VOCAB,
    Outcome,
    dense_model,
    make_tokenizer,
    masked_model,
    native_config,
    observe,
    stitched_model,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("export")
    token_ids = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    save_file({"token_ids": token_ids}, root / "token_ids.safetensors")
    (root / "exports").mkdir()
    result = Outcome(root, {}, {}, {}, token_ids)
    for name, case in CASES.items():
        dense = dense_model(case)
        result.stitched[name], result.sizes[name] = stitched_model(dense, case)
        export_hf(result.stitched[name], result.sizes[name], make_tokenizer(), result.directory(name), CARD)
    return result


@pytest.fixture(scope="module")
def reloaded(outcome: Outcome) -> Outcome:
    """The same, with what a process without darwinlm has made of the exports."""
    script = inspect.getsource(observe) + FRESH_PROCESS
    environment = os.environ | {
        "HF_MODULES_CACHE": str(outcome.root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-W", "error", "-c", script, str(outcome.root)]
    # Both processes run at once, with one thread each, so that they do not compete for the cores.
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for name, case in CASES.items():
            masked = masked_model(dense_model(case), case)
            outcome.expected[name] = observe(masked, outcome.token_ids, masked.model)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "global config value" not in errors, errors
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_fresh_process_gives_what_the_masked_dense_model_gives(reloaded: Outcome, name: str) -> None:
    expected, outputs = reloaded.expected[name], reloaded.found(name)
    expected["logits-saved-again"] = expected["logits-sdpa"]
    assert outputs.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.is_floating_point():
            scale = max(1.0, tensor.abs().max().item()) if key.startswith("gradient") else 1.0
            torch.testing.assert_close(
                outputs[key], tensor, atol=1e-4 * scale, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
            )
        else:
            assert outputs[key].tolist() == tensor.tolist(), key


@pytest.mark.parametrize("name", CASES)
def test_directory_is_complete(outcome: Outcome, name: str) -> None:
    directory, case = outcome.directory(name), CASES[name]
    config = json.loads((directory / "config.json").read_text())
    code = directory / f"modeling_pruned_{case.family}.py"
    files = {path.name for path in directory.iterdir()}
    required = {"config.json", "generation_config.json", "README.md", "model.safetensors", "tokenizer.json"}
    assert required | {"tokenizer_config.json", "chat_template.jinja"} <= files
    assert (directory / "README.md").read_text() == CARD
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert ("rope_scaling" in config) == (name == "llama-3-native")
    assert config["dtype"] == "float32"
    if name in NATIVE:
        assert config["model_type"] == case.family
        assert not code.exists()
        assert not {"auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"} & config.keys()
    else:
        assert config["model_type"] == f"pruned_{case.family}"
        assert set(config["auto_map"]) == {
            "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
        }  # fmt: skip
        assert config["allow_global_per_layer_attribute_access"] is True
        assert config["head_dim"] == outcome.stitched[name].model.layers[0].self_attn.head_dim
        assert code.read_text() == render(case.family)
        assert len(code.read_text().splitlines()) < 150
    with safe_open(directory / "model.safetensors", "pt") as weights:
        assert ("lm_head.weight" in weights.keys()) != config["tie_word_embeddings"]  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w7 w9"}], tokenize=False)
    assert tokenizer(text)["input_ids"] == [7, 9]


def test_config_keeps_the_dense_sizes_and_lists_each_layers(outcome: Outcome) -> None:
    config = json.loads((outcome.directory("llama-gqa-tied") / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (4, 2, 96)
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64},
        "1": {"skip": ["attention"], "intermediate_size": 32},
        "2": {"num_attention_heads": 2, "num_key_value_heads": 1, "skip": ["mlp"]},
    }
    assert json.loads((outcome.directory("llama-block-gone") / "config.json").read_text())["num_hidden_layers"] == 3


def test_block_without_attention_takes_the_kind_of_the_one_before(outcome: Outcome) -> None:
    """Otherwise the mask of sliding layers would take its length from a cache layer that is never filled."""
    config = json.loads((outcome.directory("qwen2-windows") / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2


@pytest.mark.slow
def test_saved_again_carries_its_code(reloaded: Outcome) -> None:
    saved = reloaded.root / "saved" / "qwen2"
    assert (saved / "modeling_pruned_qwen2.py").read_text() == render("qwen2")


@pytest.mark.parametrize("name", CASES)
def test_loads_in_this_process_without_trust(outcome: Outcome, name: str, tmp_path: Path) -> None:
    model = load(outcome.directory(name)).eval()
    assert not type(model).__module__.startswith("transformers_modules")
    logits = model(outcome.token_ids).logits
    expected = masked_model(dense_model(CASES[name]), CASES[name])(outcome.token_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / f"modeling_pruned_{CASES[name].family}.py").exists() == (name not in NATIVE)
    torch.testing.assert_close(load(tmp_path)(outcome.token_ids).logits, logits, atol=1e-6, rtol=0)


def test_registered_classes_need_no_argument(outcome: Outcome) -> None:
    register("mistral")
    register("mistral")
    config = AutoConfig.from_pretrained(outcome.directory("mistral"))
    model = AutoModelForCausalLM.from_pretrained(outcome.directory("mistral"))
    assert config.model_type == "pruned_mistral"
    assert type(model).__name__ == "PrunedMistralForCausalLM"


def test_loaded_model_is_exported_again(outcome: Outcome, tmp_path: Path) -> None:
    sizes = [outcome.sizes["llama-block-gone"][i] for i in (0, 2, 3)]
    model = load(outcome.directory("llama-block-gone"))
    export_hf(model, sizes, make_tokenizer(), tmp_path / "again", CARD)
    for name in ("config.json", "modeling_pruned_llama.py"):
        first = (outcome.directory("llama-block-gone") / name).read_text()
        assert (tmp_path / "again" / name).read_text() == first


def test_bfloat16_stays_bfloat16(outcome: Outcome, tmp_path: Path) -> None:
    model = copy.deepcopy(outcome.stitched["qwen3"]).bfloat16()
    out = export_hf(model, outcome.sizes["qwen3"], make_tokenizer(), tmp_path / "out", CARD)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert load(out).dtype == torch.bfloat16


def test_export_leaves_the_model_as_it_was(outcome: Outcome, tmp_path: Path) -> None:
    model = outcome.stitched["qwen2"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    export_hf(model, outcome.sizes["qwen2"], make_tokenizer(), tmp_path / "out", CARD)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_bad_export_never_gets_its_name(outcome: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fault is found even in a bfloat16 export, although logits of that precision would not show it."""
    model: Any = load(outcome.directory("mistral"), dtype="bfloat16").eval()
    export = (model, outcome.sizes["mistral"], make_tokenizer())
    expected = Expected.of(model)
    good = export_hf(*export, tmp_path / "good", CARD, expected)
    assert "loads without darwinlm, largest difference" in capsys.readouterr().err
    rounded = model(expected.token_ids).logits
    model.model.layers[3].mlp.up_proj.weight.data[5, :8] += 0.05
    assert (model(expected.token_ids).logits - rounded).abs().max() < 4 * 2**-7 * rounded.abs().max()
    with pytest.raises(DarwinError, match="expected the export to give the model's logits within"):
        export_hf(*export, tmp_path / "bad", CARD, expected)
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.slow
def test_verify_says_why_an_export_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(DarwinError, match="to load in a fresh process, found"):
        verify_export(tmp_path, Expected(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 8)))


def test_weights_of_16_bits_are_run_in_float32_and_left_as_they_were(outcome: Outcome) -> None:
    for name in ("llama-gqa-tied", "qwen2"):
        model = copy.deepcopy(outcome.stitched[name]).bfloat16()
        before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        logits = float32_logits(model, outcome.token_ids)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
        assert model.dtype == torch.bfloat16
        rounded = model(outcome.token_ids).logits
        exact = model.float()(outcome.token_ids).logits
        torch.testing.assert_close(logits, exact, atol=1e-5, rtol=0)
        assert (rounded - exact).abs().max() > 1e-2


def test_alike_blocks_need_no_code_where_every_runtime_heeds_the_head_size(outcome: Outcome) -> None:
    for family, options, heads, expected in (
        ("llama", {}, 2, "llama"),
        ("llama", {}, 3, "pruned_llama"),  # refused: 64 is no multiple of 3
        ("mistral", {}, 3, "mistral"),
        ("qwen3", {"head_dim": 24}, 3, "qwen3"),
        ("qwen2", {}, 4, "qwen2"),
        ("qwen2", {}, 2, "pruned_qwen2"),  # vLLM would take 32 for the head size
    ):
        dense = native_config(
            family, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=3, **options
        )
        config = pruned_config(dense, [BlockSizes(heads, heads, 32)] * 2 + [BlockSizes(0, 0, 0)])
        assert config.model_type == expected
        assert config.num_hidden_layers == 2


def test_first_block_has_to_keep_its_attention() -> None:
    config = native_config("llama", num_hidden_layers=2)
    for sizes in ([BlockSizes(0, 0, 32), BlockSizes(2, 2, 32)], [BlockSizes(0, 0, 0), BlockSizes(0, 0, 32)]):
        with pytest.raises(UsageError, match="expected attention in the first block"):
            pruned_config(config, sizes)


def test_code_refuses_transformers_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of transformers would ignore `rope_parameters`."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"expected transformers 5\.0 or newer, found 4\.57\.1"):
        exec(render("mistral"), {"__name__": "modeling_pruned_mistral"})


def test_a_layer_that_fits_no_role_is_refused(tmp_path: Path) -> None:
    config = native_config("deepseek_v3", num_hidden_layers=1, hidden_size=32, vocab_size=8, num_attention_heads=4)
    with pytest.raises(UsageError, match=r"cannot prune model\.layers\.0\.self_attn"):
        pruned_config(config, [BlockSizes(2, 2, 8)])


def test_existing_files_are_never_overwritten(outcome: Outcome, tmp_path: Path) -> None:
    export = (outcome.stitched["mistral"], outcome.sizes["mistral"], make_tokenizer())
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="found a directory with files"):
        export_hf(*export, full, CARD)
    with pytest.raises(UsageError, match="found a file"):
        export_hf(*export, full / "notes.txt", CARD)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (export_hf(*export, empty, CARD) / "config.json").exists()


def test_nothing_is_left_of_a_failed_export(outcome: Outcome, tmp_path: Path) -> None:
    model, sizes = outcome.stitched["mistral"], outcome.sizes["mistral"]

    class Broken(PreTrainedTokenizerFast):
        def save_pretrained(self, *_: Any, **__: Any) -> Any:
            raise OSError("disk full")

    tokenizer = Broken(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(OSError, match="disk full"):
        export_hf(model, sizes, tokenizer, tmp_path / "out", CARD)
    with pytest.raises(DarwinError, match="expected weights of the sizes"):
        export_hf(model, [sizes[0]] * BLOCKS, make_tokenizer(), tmp_path / "out", CARD)
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_blocks_are_renumbered_and_other_names_kept() -> None:
    sizes = [BlockSizes(1, 1, 1), BlockSizes(0, 0, 0), BlockSizes(0, 0, 1)]
    assert remaining_blocks(sizes, native_config("llama")) == (0, 2)
    names = ("model.embed_tokens.weight", "model.layers.0.a", "model.layers.1.a", "model.layers.2.a", "lm_head.weight")
    state = {name: torch.tensor(i) for i, name in enumerate(names)}
    assert {name: int(value) for name, value in renumber_blocks(state, (0, 2), "model.layers").items()} == {
        "model.embed_tokens.weight": 0,
        "model.layers.0.a": 1,
        "model.layers.1.a": 3,
        "lm_head.weight": 4,
    }
