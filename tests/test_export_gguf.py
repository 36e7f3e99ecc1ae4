"""Real llama.cpp runs the files: the tokens and log-probabilities of the Hugging Face export they are made from."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from darwinlm.checkpoint import find_checkpoint
from darwinlm.export.gguf import FileType, export_gguf
from darwinlm.export.gguf_vocabulary import SPLITS, add_vocabulary
from darwinlm.export.hf import export_hf
from darwinlm.modeling import load
from darwinlm.types import DarwinError, UsageError
from exports import LLAMA_3_ROPE, Case, dense_model, stitched_model

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp, a prebuilt llama.cpp"
)
CHANNELS, GROUPS, NEW_TOKENS = 96, 4, 32
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
SOME = tuple(range(40)) + tuple(range(70, 94))
ALL = tuple(range(CHANNELS))
UNEVEN = (((0, 1, 3), SOME), ((), SOME[:32]), ((2,), ()), ((0, 1, 2, 3), ALL))
EVEN = (((0, 2), SOME),) * 4
TEXT = "In 1969, Neil's crew FLEW 384400  km: IT'S   so, x+=10;\n\n\tdef f(a_b): return 3.14159 //2  #no\r\n  Yes"
STEPS: dict[str, Any] = {
    "ByteLevel": lambda split: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split),
    "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
    "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
}
END = "<|endoftext|>"  # token 0
PROMPT = list(range(20, 32))

# Runs apart, for llama.cpp ends the process when it asserts. Reads and prints JSON.
LLAMA_CPP = """
import json, sys
import xllamacpp as llama

def run(job):
    params = llama.CommonParams()
    params.model.path = job["file"]
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 1
    server = llama.Server(params)
    wanted = {"prompt": job["prompt"], "n_predict": job["tokens"], "temperature": 0.0, "n_probs": job["probabilities"],
              "ignore_eos": True, "cache_prompt": False}
    return server.handle_completions(wanted)

json.dump([run(job) for job in json.load(sys.stdin)], open(sys.argv[1], "w"))
"""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a prompt: its greedy tokens, and the log-probabilities of all tokens at each of them."""

    tokens: list[int]
    log_probs: list[dict[int, float]]
    prompt_tokens: int


def llama_cpp(
    files: dict[str, Path], prompt: Any, tmp_path: Path, probabilities: int, tokens: int
) -> dict[str, Answer]:
    """The answers of every file."""
    jobs = [
        {"file": str(file), "prompt": prompt, "tokens": tokens, "probabilities": probabilities}
        for file in files.values()
    ]
    out = tmp_path / "answers.json"
    command = [sys.executable, "-c", LLAMA_CPP, str(out)]
    result = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    answers = {}
    for name, found in zip(files, json.loads(out.read_text()), strict=True):
        places = found["choices"][0]["logprobs"]["content"]
        log_probs = [{top["id"]: top["logprob"] for top in place["top_logprobs"]} for place in places]
        answers[name] = Answer([place["id"] for place in places], log_probs, found["usage"]["prompt_tokens"])
    return answers


@torch.inference_mode()
def difference(
    model: PreTrainedModel, prompt: list[int], answer: Answer, ends: tuple[int, ...] = (0,)
) -> tuple[int, float]:
    """Tokens in which the model agrees with llama.cpp, and the largest difference of a log-probability.

    llama.cpp was told not to choose those that end a text.
    """
    token_ids = torch.tensor([prompt + answer.tokens])
    log_probs = model(token_ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    ending = log_probs.new_zeros(log_probs.shape[1])
    ending[list(ends)] = -torch.inf
    agreed = int(((log_probs + ending).argmax(-1) == torch.tensor(answer.tokens)).sum())
    largest = 0.0
    for row, places in zip(log_probs, answer.log_probs, strict=True):
        found = torch.tensor(list(places.values()))
        largest = max(largest, (row[list(places)] - found).abs().max().item())
    return agreed, largest


@dataclass(frozen=True)
class Kept:
    """A model, what is kept of it, and the architecture that its file should have."""

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


def byte_pair_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """Trained on real text, which it splits into words as the families of models do."""
    steps = next(steps for steps, name in SPLITS.items() if name == split)
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([STEPS[kind](argument) for kind, argument in steps])
    tokenizer.decoder = decoders.ByteLevel()
    # llama.cpp's server leaves out tokens that end within a character: none of these does.
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for text in tiny.documents()[:40] if text.isascii()], trainer)
    assert tokenizer.get_vocab_size() == tiny.VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gguf")
    return {name: write_export(name, root / name) for name in CASES}


@pytest.fixture(scope="module")
def answers(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    root = tmp_path_factory.mktemp("answers")
    files = {name: export_gguf(directory, root / f"{name}.gguf", "f32") for name, directory in exports.items()}
    return llama_cpp(files, PROMPT, root, tiny.VOCAB, NEW_TOKENS)


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
    model, found = load(directory), llama_cpp(files, PROMPT, tmp_path, tiny.VOCAB, 4)
    differences = {kind: difference(model, PROMPT, answer)[1] for kind, answer in found.items()}
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


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: byte_pair_tokenizer(name) for name in SPLITS.values()} | {"llama": sentencepiece_tokenizer()}


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """What transformers makes of a SentencePiece model as Llama 2 has it."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(
        [text for text in tiny.documents()[:40] if text.isascii()],
        trainers.BpeTrainer(vocab_size=200, show_progress=False),
    )
    learnt = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    merges = [tuple(merge) for merge in learnt["merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # type: ignore[arg-type]
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=END)


@needs_llama_cpp
def test_llama_cpp_tokenises_as_the_tokenizer_does(
    tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """A text and its token ids must give the same distribution, in a model that tells any two inputs apart."""
    rows = 512  # more than any of the tokenizers has tokens
    case = Case("llama", {"vocab_size": rows}, heads=8, groups=GROUPS, kept=UNEVEN)
    stitched, sizes = stitched_model(dense_model(case), case)
    files = {}
    for name, tokenizer in tokenizers.items():
        directory = export_hf(stitched, sizes, tokenizer, tmp_path / name, "card")
        files[name] = export_gguf(directory, tmp_path / f"{name}.gguf", "f32")
    found = llama_cpp(files, TEXT, tmp_path, rows, 1)
    for name, answer in found.items():
        ids = tokenizers[name](TEXT)["input_ids"]
        assert answer.prompt_tokens == len(ids), name
        _, largest = difference(load(tmp_path / name), ids, answer)
        assert largest < 1e-3, name


def test_unknown_tokenizers_are_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    known = byte_pair_tokenizer("gpt-2")
    writer = gguf.GGUFWriter(tmp_path / "unused", "llama")
    with pytest.raises(UsageError, match="expected at most 300 tokens"):
        add_vocabulary(writer, known, 300)
    known.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="words split as in gpt-2, smollm"):
        add_vocabulary(writer, known, tiny.VOCAB)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UsageError, match="a WordLevel tokenizer"):
        add_vocabulary(writer, words, tiny.VOCAB)


def rewrite_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mistral-head-width", {"sliding_window": 7}, "found a sliding window of 7"),
        ("llama-untied", {"hidden_act": "gelu"}, "expected the activation silu"),
        ("llama-3-rope", {"rope_parameters": LLAMA_3_ROPE | {"rope_type": "dynamic"}}, "found rope_type dynamic"),
        ("qwen3-tied", {"tie_word_embeddings": False}, "uneven Qwen3, whose heads have norms, found a head of its own"),
        ("llama-untied", {"model_type": "gpt2", "auto_map": {}}, "found 'gpt2'"),
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
    """SmolLM2-135M with random parts of it kept, an attention and an MLP gone."""
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
    by_text = llama_cpp({"f32": file, "q8_0": small}, text, tmp_path, 100, NEW_TOKENS)
    by_ids = llama_cpp({"f32": file}, prompt, tmp_path, 100, NEW_TOKENS)["f32"]
    agreed, largest = difference(model, prompt, by_ids, ends)
    print(f"SmolLM2: {agreed} of {NEW_TOKENS} tokens, largest difference of a log-probability {largest:.1e}")
    assert len(by_ids.tokens) == agreed == NEW_TOKENS
    assert largest < 1e-3
    assert (by_text["f32"].prompt_tokens, by_text["f32"].tokens) == (len(prompt), by_ids.tokens)
    assert difference(model, prompt, by_text["q8_0"], ends)[0] > NEW_TOKENS - 6
