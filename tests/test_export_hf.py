"""An exported directory equals the zero-masked dense model, in a process where darwinlm cannot be imported."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from darwinlm.export.hf import Expected, export_hf, new_directory, verify_export
from darwinlm.modeling import EXPORTABLE, load, pruned_config, register, remaining_blocks, render, renumber_blocks
from darwinlm.types import BlockSizes, DarwinError, UsageError

BLOCKS, HIDDEN, CHANNELS, VOCAB, EOS = 4, 64, 96, 128, 2
CARD = "---\nlicense: apache-2.0\n---\n# A pruned model\n"
Kept = tuple[tuple[int, ...], tuple[int, ...]]  # KV groups and MLP channels of a block

SOME = tuple(range(40)) + tuple(range(70, 94))
MIXED: tuple[Kept, ...] = (((1,), SOME), ((), SOME[:32]), ((0,), ()), ((0, 1), tuple(range(CHANNELS))))
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    heads: int = 4
    groups: int = 2
    kept: tuple[Kept, ...] = MIXED


CASES = {
    "llama-mha": Case("llama", groups=4, kept=(((0, 2, 3), SOME), *MIXED[1:3], ((1, 3), SOME[10:20]))),
    "llama-gqa-tied": Case("llama", {"tie_word_embeddings": True}),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-block-gone": Case("llama", kept=(MIXED[0], ((), ()), MIXED[1], MIXED[3])),
    "llama-3-rope": Case("llama", {"rope_parameters": LLAMA_3_ROPE}),
    "llama-3-native": Case("llama", {"rope_parameters": LLAMA_3_ROPE}, kept=(((1,), SOME),) * BLOCKS),
    "llama-no-native": Case("llama", heads=8, groups=8, kept=(((0, 2, 5), SOME),) * BLOCKS),
    "qwen2": Case("qwen2", heads=6, options={"hidden_size": 96, "tie_word_embeddings": True}),
    "qwen2-windows": Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "mistral": Case("mistral", {"sliding_window": 7}),
    "qwen3": Case("qwen3", {"head_dim": 24}),
}
NATIVE = {"llama-3-native"}


def native_config(family: str, **options: Any) -> PreTrainedConfig:
    config_class: Any = CONFIG_MAPPING[family]
    return config_class(**options)


def dense_model(case: Case) -> PreTrainedModel:
    torch.manual_seed(7)
    options: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.groups,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    config = native_config(case.family, **(options | case.options))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start all alike, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
    return model


def spread(kept: tuple[int, ...], width: int) -> torch.Tensor:
    return torch.tensor([s * width + i for s in kept for i in range(width)], dtype=torch.long)


def masked_model(dense: PreTrainedModel, case: Case) -> PreTrainedModel:
    """The dense model with zeros where a unit's output enters the stream."""
    model = copy.deepcopy(dense)
    for layer, (groups, channels) in zip(model.model.layers, case.kept, strict=True):
        width = layer.self_attn.o_proj.in_features // case.groups
        for consumer, kept in (
            (layer.self_attn.o_proj, spread(groups, width)),
            (layer.mlp.down_proj, spread(channels, 1)),
        ):
            gone = torch.ones(consumer.in_features, dtype=torch.bool).scatter(0, kept, False)
            consumer.weight.data[:, gone] = 0
            if not len(kept) and consumer.bias is not None:
                consumer.bias.data.zero_()
    return model


class Gone(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return torch.zeros_like(hidden_states)


class GoneMixer(Gone):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return torch.zeros_like(hidden_states), None


def narrow(linear: nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight.data[rows])
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.data[rows])
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight.data[:, columns])


def stitched_model(dense: PreTrainedModel, case: Case) -> tuple[PreTrainedModel, list[BlockSizes]]:
    """The dense model with the lost rows and columns cut out, and what is left of each block."""
    model = copy.deepcopy(dense)
    sizes = []
    for layer, (groups, channels) in zip(model.model.layers, case.kept, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        if groups:
            narrow(attention.q_proj, rows=spread(groups, attention.q_proj.out_features // case.groups))
            for projection in (attention.k_proj, attention.v_proj):
                narrow(projection, rows=spread(groups, attention.head_dim))
            narrow(attention.o_proj, columns=spread(groups, attention.o_proj.in_features // case.groups))
        else:
            layer.self_attn, layer.input_layernorm = GoneMixer(), nn.Identity()
        if channels:
            narrow(mlp.gate_proj, rows=spread(channels, 1))
            narrow(mlp.up_proj, rows=spread(channels, 1))
            narrow(mlp.down_proj, columns=spread(channels, 1))
        else:
            layer.mlp, layer.post_attention_layernorm = Gone(), nn.Identity()
        sizes.append(BlockSizes(len(groups) * case.heads // case.groups, len(groups), len(channels)))
    return model, sizes


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )


def observe(model, token_ids, backbone):
    """All that is compared of a model. Its source also runs in the fresh process, so it uses torch alone."""
    import torch

    def greedy(ids, **options):
        mask = options.pop("attention_mask", torch.ones_like(ids))
        return model.generate(ids, attention_mask=mask, max_new_tokens=32, min_new_tokens=32, **options)

    seen = {}
    with torch.no_grad():
        for kind in ("eager", "sdpa"):
            model.set_attn_implementation(kind)
            out = model(token_ids, output_hidden_states=True)
            seen[f"logits-{kind}"] = out.logits
            seen[f"hidden-{kind}"] = out.hidden_states[-1]
        seen["backbone"] = backbone(token_ids).last_hidden_state
        prompt = token_ids[:1, :6]
        seen["greedy-cache"] = greedy(prompt, do_sample=False)
        seen["greedy-no-cache"] = greedy(prompt, do_sample=False, use_cache=False)
        seen["greedy-static-cache"] = greedy(prompt, do_sample=False, cache_implementation="static")
        seen["beams"] = greedy(prompt, do_sample=False, num_beams=3)
        padded, mask = token_ids[:, :9].clone(), torch.ones(2, 9, dtype=torch.long)
        padded[1, :4], mask[1, :4] = 0, 0
        seen["greedy-left-padded"] = greedy(padded, do_sample=False, attention_mask=mask)
        seen["greedy-left-padded-static-cache"] = greedy(
            padded, do_sample=False, attention_mask=mask, cache_implementation="static"
        )
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            older_name = "gradient_checkpointing_enable"  # deprecated in transformers 5.23
            getattr(model, "activation_checkpointing_enable", getattr(model, older_name))()
        model.zero_grad()
        model(token_ids, labels=token_ids, use_cache=False).loss.backward()
        name = "gradient-checkpointed" if checkpointing else "gradient"
        seen[name] = model.get_input_embeddings().weight.grad.clone()
        model.eval()
    return {name: tensor.detach().contiguous() for name, tensor in seen.items()}


FRESH_PROCESS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "darwinlm":
            raise ImportError("darwinlm is blocked")

sys.meta_path.insert(0, Blocked())
import pathlib
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

root = pathlib.Path(sys.argv[1])
token_ids = load_file(root / "token_ids.safetensors")["token_ids"]
for directory in sorted((root / "exports").iterdir()):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    backbone = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    seen = observe(model, token_ids, backbone)
    saved = root / "saved" / directory.name
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
    seen["logits-saved-again"] = again(token_ids).logits.detach()
    save_file(seen, root / f"{directory.name}.safetensors")
"""


@dataclass(frozen=True)
class Outcome:
    root: Path
    expected: dict[str, dict[str, torch.Tensor]]
    sizes: dict[str, list[BlockSizes]]
    stitched: dict[str, PreTrainedModel]
    token_ids: torch.Tensor

    def directory(self, name: str) -> Path:
        return self.root / "exports" / name

    def found(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / f"{name}.safetensors")


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
    script = inspect.getsource(observe) + FRESH_PROCESS
    # Two processes at once: with a thread each, for they would fight over the cores.
    environment = os.environ | {
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    command = [sys.executable, "-I", "-W", "error", "-c", script, str(root)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for name, case in CASES.items():
            masked = masked_model(dense_model(case), case)
            result.expected[name] = observe(masked, token_ids, masked.model)
        _, errors = process.communicate(timeout=200)
    torch.set_num_threads(threads)
    assert process.returncode == 0, errors
    assert "global config value" not in errors, errors
    return result


@pytest.mark.parametrize("name", CASES)
def test_fresh_process_gives_what_the_masked_dense_model_gives(outcome: Outcome, name: str) -> None:
    expected, found = outcome.expected[name], outcome.found(name)
    expected["logits-saved-again"] = expected["logits-sdpa"]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.is_floating_point():
            scale = max(1.0, tensor.abs().max().item()) if key.startswith("gradient") else 1.0
            torch.testing.assert_close(found[key], tensor, atol=1e-4 * scale, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
        else:
            assert found[key].tolist() == tensor.tolist(), key


@pytest.mark.parametrize("name", CASES)
def test_directory_is_complete(outcome: Outcome, name: str) -> None:
    directory, case = outcome.directory(name), CASES[name]
    config = json.loads((directory / "config.json").read_text())
    code = directory / f"modeling_pruned_{case.family}.py"
    files = {path.name for path in directory.iterdir()}
    wanted = {"config.json", "generation_config.json", "README.md", "model.safetensors", "tokenizer.json"}
    assert wanted | {"tokenizer_config.json", "chat_template.jinja"} <= files
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
        assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        assert config["allow_global_per_layer_attribute_access"] is True
        assert config["head_dim"] == outcome.stitched[name].model.layers[0].self_attn.head_dim
        assert code.read_text() == render(case.family)
        assert len(code.read_text().splitlines()) < 120
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
    """Else the mask of sliding layers would take its length from a cache layer that is never filled."""
    config = json.loads((outcome.directory("qwen2-windows") / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2


def test_saved_again_carries_its_code(outcome: Outcome) -> None:
    saved = outcome.root / "saved" / "qwen2"
    assert (saved / "modeling_pruned_qwen2.py").read_text() == render("qwen2")


@pytest.mark.parametrize("name", CASES)
def test_loads_in_this_process_without_trust(outcome: Outcome, name: str, tmp_path: Path) -> None:
    model = load(outcome.directory(name)).eval()
    assert not type(model).__module__.startswith("transformers_modules")
    logits = model(outcome.token_ids).logits
    torch.testing.assert_close(logits, outcome.expected[name]["logits-sdpa"], atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / f"modeling_pruned_{CASES[name].family}.py").exists() == (name not in NATIVE)
    torch.testing.assert_close(load(tmp_path)(outcome.token_ids).logits, logits, atol=1e-6, rtol=0)


def test_registered_classes_need_no_argument(outcome: Outcome) -> None:
    register()
    register()
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


def test_verify_passes_a_good_export_and_stops_a_bad_one(outcome: Outcome) -> None:
    logits = outcome.expected["llama-mha"]["logits-sdpa"]
    directory = outcome.directory("llama-mha")
    assert verify_export(directory, outcome.token_ids, logits) < 1e-4
    with pytest.raises(DarwinError, match="found a difference"):
        verify_export(directory, outcome.token_ids, logits + 0.01 * logits.abs().max())


def test_bad_export_never_gets_its_name(outcome: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = (outcome.stitched["mistral"], outcome.sizes["mistral"], make_tokenizer())
    logits = outcome.expected["mistral"]["logits-sdpa"]
    good = export_hf(*export, tmp_path / "good", CARD, Expected(outcome.token_ids, logits))
    assert "loads without darwinlm, largest difference" in capsys.readouterr().err
    with pytest.raises(DarwinError, match="expected the export to give the model's logits within"):
        export_hf(*export, tmp_path / "bad", CARD, Expected(outcome.token_ids, logits * 1.01))
    assert list(tmp_path.iterdir()) == [good]


def test_verify_says_why_an_export_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(DarwinError, match="to load in a fresh process, found"):
        verify_export(tmp_path, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 8))


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


def test_other_families_are_refused(outcome: Outcome, tmp_path: Path) -> None:
    config = native_config("gpt2", n_embd=8, n_head=2, n_layer=1, vocab_size=8)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match=f"{', '.join(EXPORTABLE)} to export, found 'gpt2'"):
        export_hf(model, [BlockSizes(2, 2, 8)], make_tokenizer(), tmp_path / "out", CARD)
    assert not list(tmp_path.iterdir())


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
    assert remaining_blocks(sizes) == (0, 2)
    names = ("model.embed_tokens.weight", "model.layers.0.a", "model.layers.1.a", "model.layers.2.a", "lm_head.weight")
    state = {name: torch.tensor(i) for i, name in enumerate(names)}
    assert {name: int(value) for name, value in renumber_blocks(state, (0, 2)).items()} == {
        "model.embed_tokens.weight": 0,
        "model.layers.0.a": 1,
        "model.layers.1.a": 3,
        "lm_head.weight": 4,
    }
