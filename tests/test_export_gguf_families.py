"""Which families llama.cpp runs, even, uneven and in the forms that they come in: it is asked, token by token."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import llama_cpp
import tiny
from darwinlm.export.gguf import export_gguf
from darwinlm.export.gguf_vocabulary import add_vocabulary
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.gguf_file import READ
from darwinlm.model.pruned import pruned_config, register
from darwinlm.model.reading import load
from darwinlm.types import BlockSizes, UsageError
from llama_cpp import Answer, difference, needs_llama_cpp
from test_export_vocabulary import TEXTS
from vocabularies import byte_pair_tokenizer, sentencepiece_tokenizer

NEW_TOKENS = 32
PROMPT = list(range(20, 32))
DENSE = (BlockSizes(8, 4, 96),) * 4
EVEN = (BlockSizes(4, 2, 64),) * 4
NARROW = (BlockSizes(8, 4, 64),) * 4  # all heads
UNEVEN = (BlockSizes(6, 3, 64), BlockSizes(0, 0, 32), BlockSizes(2, 1, 0), BlockSizes(8, 4, 96))
UNEVEN_MLP = (BlockSizes(8, 4, 64), BlockSizes(8, 4, 32), BlockSizes(8, 4, 0), BlockSizes(8, 4, 96))
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
MULTIPLIERS = {
    "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "logits_scaling": 2.0,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 16, "sliding_window": 8}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
}
PERIOD = [*["sliding_attention"] * 2, "full_attention", "sliding_attention"]
EVERY_HEAD = (BlockSizes(8, 8, 64),) * 4  # that is a KV head too
UNEVEN_HEADS = (BlockSizes(6, 6, 64), BlockSizes(0, 0, 32), BlockSizes(2, 2, 0), BlockSizes(8, 8, 96))
WIDE = (BlockSizes(6, 6, 64), BlockSizes(0, 0, 32), BlockSizes(2, 2, 0), BlockSizes(8, 8, 256))
ONE_KEY = (BlockSizes(8, 1, 64),) * 4
UNEVEN_KEY = (BlockSizes(6, 1, 64), BlockSizes(0, 0, 32), BlockSizes(2, 1, 0), BlockSizes(8, 1, 96))
PART = {"partial_rotary_factor": 0.5}
MPT = {"n_heads": 8, "max_seq_len": 128}
FULL = {"layer_types": ["full_attention"] * 4}
EVERY_FOURTH = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
# A block without attention, of either type, where llama.cpp wants some of zeros; readers keep all KV heads.
SHARED = (
    BlockSizes(6, 3, 64), BlockSizes(0, 0, 32), BlockSizes(8, 4, 0), BlockSizes(8, 4, 96), BlockSizes(0, 0, 128),
    BlockSizes(4, 4, 64),
)  # fmt: skip
TURNS = ["sliding_attention", "full_attention"]
GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "hidden_size_per_layer_input": 0} | TIED
GEMMA4_31B = GEMMA4 | {
    "layer_types": TURNS * 2, "attention_k_eq_v": True, "num_global_key_value_heads": 2, "final_logit_softcapping": 9.0,
}  # fmt: skip
GEMMA4_E2B = GEMMA4 | {
    "layer_types": TURNS * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320,
}  # fmt: skip
GEMMA3 = GEMMA | {"layer_types": PERIOD, "rope_parameters": TWO_ROPES}


@dataclass(frozen=True)
class Made:
    """A random model of some sizes, and the architecture that its file should have."""

    family: str
    architecture: str
    sizes: tuple[BlockSizes, ...] = EVEN
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 5


CASES = {
    "granite": Made("granite", "granite", options=MULTIPLIERS),
    "granite-tied-biases": Made("granite", "granite", EVEN, MULTIPLIERS | {"attention_bias": True} | TIED),
    "granite-uneven": Made("granite", "deci", UNEVEN, MULTIPLIERS | {"mlp_bias": True, "attention_bias": True}),
    "granite-uneven-tied": Made("granite", "deci", UNEVEN, MULTIPLIERS | TIED),
    "phi3": Made("phi3", "llama", NARROW),
    "phi3-tied": Made("phi3", "llama", DENSE, TIED),
    "seed_oss": Made("seed_oss", "llama", EVEN, {"head_dim": 24}),
    "seed_oss-uneven": Made("seed_oss", "deci", UNEVEN, {"head_dim": 24}),
    "gemma2": Made("gemma2", "gemma2", EVEN, GEMMA | TIED),
    "gemma2-uneven": Made("gemma2", "gemma2", UNEVEN, GEMMA | TIED),
    "gemma2-order": Made("gemma2", "gemma2", EVEN, GEMMA | TIED | {"layer_types": PERIOD}),
    "gemma3": Made("gemma3_text", "gemma3", EVEN, GEMMA3 | TIED),
    "gemma3-uneven": Made("gemma3_text", "gemma3", UNEVEN, GEMMA3 | TIED),
    "gemma3-untied": Made("gemma3_text", "gemma3", EVEN, GEMMA3),
    "gemma4": Made("gemma4_text", "gemma4", EVEN, GEMMA4_31B),
    "gemma4-uneven": Made("gemma4_text", "gemma4", UNEVEN, GEMMA4_31B | {"num_global_key_value_heads": 4}),
    "gemma4-shared": Made("gemma4_text", "gemma4", SHARED, GEMMA4_E2B),
    "olmo2": Made("olmo2", "olmo2", NARROW),
    "olmo2-tied": Made("olmo2", "olmo2", NARROW, TIED),
    "smollm3": Made("smollm3", "smollm3", EVEN, {"no_rope_layers": [1, 1, 1, 0]}),
    "smollm3-uneven": Made("smollm3", "smollm3", UNEVEN, {"no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}),
    "smollm3-rotated": Made("smollm3", "deci", UNEVEN, {"no_rope_layers": [1, 1, 1, 1]}),
    "starcoder2": Made("starcoder2", "starcoder2", NARROW, TIED),
    "starcoder2-no-biases": Made("starcoder2", "starcoder2", NARROW, {"use_bias": False}, seed=6),
    "starcoder2-uneven": Made("starcoder2", "starcoder2", UNEVEN),
    "phi3-uneven": Made("phi3", "deci", UNEVEN),
    "olmo2-uneven": Made("olmo2", "olmo2", UNEVEN),
    "olmo3": Made("olmo3", "olmo2", NARROW, EVERY_FOURTH),
    "gpt2": Made("gpt2", "gpt2", EVERY_HEAD, {"n_inner": 96}),
    "gpt2-uneven": Made("gpt2", "gpt2", UNEVEN_HEADS, {"n_inner": 96}),
    "gpt_bigcode": Made("gpt_bigcode", "starcoder", ONE_KEY, {"n_inner": 96}),
    "gpt_bigcode-uneven": Made("gpt_bigcode", "starcoder", UNEVEN_KEY, {"n_inner": 96}),
    "gpt_neox": Made("gpt_neox", "gptneox", EVERY_HEAD, {"rotary_pct": 0.5}),
    "gpt_neox-uneven": Made("gpt_neox", "gptneox", UNEVEN_HEADS, {"use_parallel_residual": False}),
    "falcon": Made("falcon", "falcon", ONE_KEY, {"ffn_hidden_size": 96}),
    "falcon-uneven": Made("falcon", "falcon", UNEVEN_KEY, {"ffn_hidden_size": 96}),
    "falcon-groups": Made(
        "falcon", "falcon", UNEVEN, {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 4}
    ),
    "bloom": Made("bloom", "bloom", EVERY_HEAD, {"n_head": 8}),
    "bloom-uneven": Made("bloom", "bloom", WIDE, {"n_head": 8}),
    "mpt": Made("mpt", "mpt", EVERY_HEAD, MPT),
    "mpt-uneven": Made("mpt", "mpt", WIDE, MPT | {"attn_config": {"clip_qkv": 0.5}}),
    "phi": Made("phi", "phi2", UNEVEN, PART),
    "stablelm": Made("stablelm", "stablelm", NARROW, PART),
    "stablelm-uneven": Made("stablelm", "stablelm", UNEVEN, {"use_parallel_residual": False, "use_qkv_bias": True}),
    "gemma": Made("gemma", "gemma", UNEVEN, {"head_dim": 24} | TIED),
    "glm4": Made("glm4", "glm4", UNEVEN, PART | {"head_dim": 24}),
    "exaone4": Made("exaone4", "exaone4", UNEVEN, FULL),
    "cohere": Made("cohere", "command-r", UNEVEN, TIED),
    "cohere2": Made("cohere2", "cohere2", UNEVEN, TIED | EVERY_FOURTH),
    "ernie4_5": Made("ernie4_5", "llama", EVEN, {"head_dim": 24, "use_bias": True}),
    "ernie4_5-uneven": Made("ernie4_5", "deci", UNEVEN, {"head_dim": 24}),
    "helium": Made("helium", "deci", UNEVEN, {"head_dim": 8}),
    "hunyuan": Made("hunyuan_v1_dense", "hunyuan-dense", UNEVEN, {"head_dim": 24}),
    "nemotron": Made("nemotron", "nemotron", UNEVEN, PART),
    "jais2": Made("jais2", "jais2", UNEVEN),
    "arcee": Made("arcee", "arcee", UNEVEN),
    "internlm3": Made("internlm3", "deci", UNEVEN),
    "qwen3-uneven-untied": Made("qwen3", "qwen3", UNEVEN, {"head_dim": 24}),
}  # fmt: skip


def write_model(made: Made, out: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    tokenizer = tokenizer or byte_pair_tokenizer("qwen2")
    torch.manual_seed(made.seed)
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.25,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    config_class: Any = CONFIG_MAPPING[made.family]
    config = pruned_config(config_class(**(common | made.options)), made.sizes)
    register(made.family)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
        for name, chosen in model.named_buffers():  # of all heads, the last ones
            if name.endswith(".index"):
                norm = getattr(getattr(model.get_submodule(name.rpartition(".")[0]), "module", None), "weight", None)
                chosen.add_((config.num_attention_heads if norm is None else len(norm)) - len(chosen))
    tiny.draw_scalars(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(made, root / name) for name, made in CASES.items()}


@pytest.fixture(scope="module")
def files(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    # Of a file that is named after Phi-3, llama.cpp wants Phi-3's own tokens.
    named = {name: root / f"{number}.gguf" for number, name in enumerate(exports)}
    return {name: export_gguf(path, named[name], "f32", verify=False) for name, path in exports.items()}


@pytest.fixture(scope="module")
def answers(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return llama_cpp.answers(files, PROMPT, tmp_path_factory.mktemp("answers"), tiny.VOCAB, NEW_TOKENS)


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_what_transformers_gives(
    exports: dict[str, Path], answers: dict[str, Answer], name: str
) -> None:
    agreed, largest = difference(load(exports[name]), PROMPT, answers[name])
    print(f"{name}: {agreed} of {NEW_TOKENS} tokens, largest difference of a log-probability {largest:.1e}")
    assert len(answers[name].tokens) == agreed == NEW_TOKENS
    assert largest < (1e-2 if CASES[name].family in GELU else 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_the_one_that_has_room(files: dict[str, Path], name: str) -> None:
    fields = gguf.GGUFReader(files[name]).fields
    assert fields["general.architecture"].contents() == CASES[name].architecture


# llama.cpp reads it from a table in float16.
GELU = (
    "gemma", "gemma2", "gemma3_text", "gemma4_text", "starcoder2", "gpt2", "gpt_bigcode", "gpt_neox", "falcon", "bloom",
    "mpt", "phi",
)  # fmt: skip
READ_BACK = [name for name, made in CASES.items() if made.architecture in READ and made.family != "seed_oss"]


@pytest.mark.parametrize("name", READ_BACK)
def test_a_file_is_read_back(exports: dict[str, Path], files: dict[str, Path], name: str, tmp_path: Path) -> None:
    ids = torch.arange(20, 60)[None]
    found = load(find_checkpoint(str(files[name]), tmp_path).path)
    torch.testing.assert_close(found(ids).logits, load(exports[name])(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["granite", "olmo2", "smollm3", "seed_oss"])
def test_what_cannot_be_read_back_is_refused(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"of the architecture {name}: expected llama|lacks .*o_proj\.bias"):
        find_checkpoint(str(files[name]), tmp_path)


def write_phi3(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A file of the architecture phi3, as llama.cpp's converter writes it: with fused rows that are not permuted."""
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(out, "phi3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(7000.0)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
    for name, tensor in weights.items():
        writer.add_tensor(str(names.get_name(name, (".weight",))), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_llama_cpp
def test_a_phi3_that_another_program_wrote(tmp_path: Path) -> None:
    made = Made("phi3", "phi3", NARROW, {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}})
    tokenizer = byte_pair_tokenizer("qwen2")
    model = load(write_model(made, tmp_path / "model", tokenizer))
    write_phi3(model, tokenizer, tmp_path / "file.gguf")
    found = find_checkpoint(str(tmp_path / "file.gguf"), tmp_path)
    assert found.config.model_type == "phi3"
    ids = torch.arange(20, 60)[None]
    torch.testing.assert_close(load(found.path)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    answers = llama_cpp.answers({"": tmp_path / "file.gguf"}, PROMPT, tmp_path, tiny.VOCAB, NEW_TOKENS)
    assert difference(load(found.path), PROMPT, answers[""])[0] == NEW_TOKENS


@needs_llama_cpp
def test_tokens_of_every_family_that_is_read(tmp_path: Path) -> None:
    """Classes of a family's tokenizer have tokens and ways of their own, of which a file says nothing."""
    whole = {split: byte_pair_tokenizer(split, 512, every_byte=True) for split in ("qwen2", "smollm", "tekken")}
    tokenizers = {
        "gemma3": sentencepiece_tokenizer(prefix=False), "gemma2": sentencepiece_tokenizer(prefix=False),
        "phi3": sentencepiece_tokenizer(), "qwen3-uneven-untied": whole["qwen2"], "starcoder2": whole["smollm"],
        "gemma3-untied": whole["tekken"],
    }  # fmt: skip
    files = {}
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        directory = write_model(CASES[name], tmp_path / name, tokenizer)
        files[name] = export_gguf(directory, tmp_path / f"{number}.gguf", "f32", verify=False)
    answers = llama_cpp.token_ids(files, TEXTS, tmp_path)
    for name, tokenizer in tokenizers.items():
        again = find_checkpoint(str(files[name]), tmp_path / f"work-{name}").tokenizer
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == answers[name], name
        assert [again(text)["input_ids"] for text in TEXTS] == answers[name], name
        assert again.decode(again("a  b")["input_ids"], skip_special_tokens=True) == "a  b"
        assert len(again) == len(tokenizer)


def test_zeros_are_told(exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6 heads in 3 groups of 8 in 4 lack 3, and so on."""
    export_gguf(exports["gemma2-uneven"], tmp_path / "model.gguf", verify=False)
    lacking = 4 * (8 + 4 + 96) - (6 + 3 + 64) - 32 - (2 + 1) - (8 + 4 + 96)
    assert f"one size for all blocks of a gemma2, so {lacking} heads and channels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "olmo2",
            {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
            "norms over heads that fill the hidden size",
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "no such order of sliding windows"),
        ("gemma2", {"attn_logit_softcapping": None}, "a number as attn_logit_softcapping, found None"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping None, found 30"),
        ("starcoder2", {"sliding_window": 64}, "found a sliding window of 64"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm False, found True"),
        ("mpt", {"attn_config": {"softmax_scale": 0.3}}, r"attn_config\.softmax_scale None, found 0\.3"),
        ("falcon", {"parallel_attn": False}, "parallel_attn True, found False"),
        ("falcon", {"alibi": True}, "heads without slopes, found slopes"),
    ],
)
def test_what_no_graph_computes_is_refused(
    exports: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    directory = shutil.copytree(exports[name], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=reason):
        export_gguf(directory, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(("family", "blocks"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_depth_of_a_27b_changes_how_llama_cpp_scales(family: str, blocks: int, tmp_path: Path) -> None:
    made = Made(family, "", EVEN[:1] * blocks, GEMMA | TIED | {"num_hidden_layers": blocks})
    directory = write_model(made, tmp_path / "model")
    file = export_gguf(directory, tmp_path / "model.gguf", "f32", verify=False)
    answer = llama_cpp.answers({"": file}, PROMPT, tmp_path, tiny.VOCAB, NEW_TOKENS)[""]
    agreed, largest = difference(load(directory), PROMPT, answer)
    assert agreed == NEW_TOKENS
    assert largest < 0.1  # a table in float16, 46 times; 6.0 if it were scaled as other depths are
