"""Evaluation against plain computations from full logits, and against transformers' own generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from darwinlm.config.run import EvaluationConfig
from darwinlm.evaluation import quality as module
from darwinlm.evaluation.generation import continuations
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.evaluation.rows import evaluate
from darwinlm.evaluation.speed import speed
from darwinlm.model.size import parameter_count
from darwinlm.runtime import timing
from darwinlm.runtime.timing import Ratio
from darwinlm.types import UsageError

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Larger than usual, so that probabilities differ enough for an error to show.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()


@pytest.fixture
def dense() -> LlamaForCausalLM:
    return llama(0)


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def expected(dense: PreTrainedModel, model: PreTrainedModel, token_ids: torch.Tensor) -> tuple[float, float]:
    """Perplexity and KL divergence from all logits at once, in float64."""
    with torch.no_grad():
        p, q = (m(token_ids[:, :-1]).logits.double().log_softmax(-1) for m in (dense, model))
    loss = -q.gather(-1, token_ids[:, 1:, None]).mean()
    return loss.exp().item(), (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("chunk", [1, 7, 23, 256])
def test_perplexity_and_kl_equal_those_of_full_logits(
    dense: LlamaForCausalLM, token_ids: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "CHUNK", chunk)
    models = {"dense": dense, "other": llama(1), "third": llama(2)}
    qualities = perplexity_and_kl(models, token_ids)
    assert list(qualities) == list(models)
    for name, model in models.items():
        perplexity, kl = expected(dense, model, token_ids)
        assert qualities[name].perplexity == pytest.approx(perplexity, rel=1e-5)
        assert qualities[name].kl == pytest.approx(kl, rel=1e-5, abs=1e-6)
    assert qualities["other"].kl > 0.1  # so that the comparison says something


def test_kl_of_dense_with_itself_is_zero(dense: LlamaForCausalLM, token_ids: torch.Tensor):
    qualities = perplexity_and_kl({"dense": dense, "same": dense}, token_ids)
    assert qualities["dense"].kl == 0.0
    assert abs(qualities["same"].kl) < 1e-6
    assert qualities["same"].perplexity == qualities["dense"].perplexity


def test_bfloat16_models_are_summed_in_higher_precision(dense: LlamaForCausalLM):
    """2,000 predictions: a sum in bfloat16 would stop growing at 256 times the loss of a token."""
    token_ids = torch.randint(0, VOCAB, (16, 126), generator=torch.Generator().manual_seed(3))
    half, other = dense.bfloat16(), llama(1).bfloat16()
    qualities = perplexity_and_kl({"dense": half, "other": other}, token_ids)
    # The oracle starts at the same bfloat16 logits, and is float64 from there. It too takes one sequence at a time:
    # bfloat16 matrix products depend on the batch.
    each = [expected(half, other, sequence[None]) for sequence in token_ids]
    assert math.log(qualities["other"].perplexity) == pytest.approx(sum(math.log(p) for p, _ in each) / 16, rel=1e-6)
    assert qualities["other"].kl == pytest.approx(sum(kl for _, kl in each) / 16, rel=1e-6)


COMMON: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        OlmoConfig(**COMMON, intermediate_size=48),
        GPTNeoXConfig(**COMMON, intermediate_size=48),
        OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
        GPT2Config(**COMMON),
        BloomConfig(**COMMON),
        FalconConfig(**COMMON),
        PhiConfig(**COMMON, intermediate_size=48),
        CohereConfig(**COMMON, intermediate_size=48, logit_scale=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_a_family_that_is_never_pruned_is_measured_like_any_other(config: PreTrainedConfig):
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_probs = model(ids).logits[:, :-1].double().log_softmax(-1)
    loss = -log_probs.gather(-1, ids[:, 1:, None]).mean().item()
    assert math.log(perplexity_and_kl({"it": model}, ids)["it"].perplexity) == pytest.approx(loss, rel=1e-5)


def test_models_are_left_as_they_were(dense: LlamaForCausalLM, token_ids: torch.Tensor):
    dense.train()
    dense.model.layers[0].eval()
    before = [module.training for module in dense.modules()]
    generation = dense.generation_config.to_dict()
    dropping = llama(0, attention_dropout=0.9).train()
    qualities = perplexity_and_kl({"dense": dense, "dropping": dropping}, token_ids)
    assert qualities["dropping"].kl == pytest.approx(0, abs=1e-6)
    assert [module.training for module in dense.modules()] == before
    assert dense.generation_config.to_dict() == generation


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_too_little_text_is_refused(dense: LlamaForCausalLM, shape: tuple[int, int]):
    with pytest.raises(UsageError, match="at least 2 tokens"):
        perplexity_and_kl({"dense": dense}, torch.zeros(shape, dtype=torch.long))


def test_continuations_are_those_of_generate(tokenizer: PreTrainedTokenizerFast):
    prompts = ("w3 w4 w5", "w40")
    lengths = set()
    for seed in range(4):
        model = llama(seed)
        # Sampling, as many a checkpoint asks for, must not reach the greedy continuation.
        model.generation_config = GenerationConfig(do_sample=True, temperature=3.0, eos_token_id=[2, 9, 17, 30, 44])
        greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[2, 9, 17, 30, 44], pad_token_id=2)
        oracle = LlamaForCausalLM(model.config).eval()
        oracle.load_state_dict(model.state_dict())
        texts = continuations(model, tokenizer, prompts, 12)
        for prompt, text in zip(prompts, texts, strict=True):
            ids = oracle.generate(**tokenizer(prompt, return_tensors="pt"), generation_config=greedy)[0]
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
            assert text.startswith(prompt)
            lengths.add(len(text.split()) - len(prompt.split()))
        assert model.generation_config.do_sample
    assert 12 in lengths  # one that ran to its full length
    assert min(lengths) < 12  # and one that an end token stopped


def test_empty_prompt_is_refused(dense: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(UsageError, match="empty prompt"):
        continuations(dense, tokenizer, ("",), 4)


def test_speed_lets_models_take_turns(
    dense: LlamaForCausalLM, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    """The clock is replaced by one that a model's forward moves: a second a token, ten for the slow model."""
    models = {"dense": dense, "slow": llama(1)}
    paces = [1000.0, 1.0, 3.0]  # of the turns; the first warms up and must not count
    clock, calls = [0.0], []

    def watch(name: str, pace: float) -> None:
        def move(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
            # A turn of both models is ten calls: for each a prefill, the decode's own prompt, and three steps.
            clock[0] += kwargs["input_ids"].shape[1] * pace * paces[len(calls) // 10]
            calls.append(name)

        models[name].register_forward_pre_hook(move, with_kwargs=True)

    watch("dense", 1.0)
    watch("slow", 10.0)
    monkeypatch.setattr(timing, "now", lambda _: clock[0])
    config = EvaluationConfig(speed_tokens=90, decode_tokens=3, repeats=2)  # more than the 72 tokens given
    speeds = speed(models, token_ids, config)
    assert (speeds["dense"].prefill_tokens_per_s, speeds["slow"].prefill_tokens_per_s) == (0.5, 0.05)
    assert (speeds["dense"].decode_tokens_per_s, speeds["slow"].decode_tokens_per_s) == (0.5, 0.05)
    assert speeds["dense"].decode_ratio == Ratio(1, 1, 1)
    assert speeds["slow"].prefill_ratio == Ratio(0.1, 0.1, 0.1)
    assert calls == (["dense"] * 5 + ["slow"] * 5) * 3


def test_tied_parameters_count_once():
    tied, untied = llama(0, tie_word_embeddings=True), llama(0, tie_word_embeddings=False)
    assert parameter_count(untied) - parameter_count(tied) == VOCAB * 32
    assert parameter_count(torch.nn.Linear(3, 4)) == 16


def test_evaluate_gives_a_row_a_model(
    dense: LlamaForCausalLM, token_ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast
):
    small = llama(1, intermediate_size=16)
    models = {"dense": dense, "small": small}
    config = EvaluationConfig(
        prompts=("w3 w4", "w5"), continuation_tokens=3, speed_tokens=8, decode_tokens=2, repeats=1
    )
    rows = evaluate(models, token_ids, tokenizer, config, {"dense": 400, "small": 300})
    assert [row.model for row in rows] == ["dense", "small"]
    assert [row.bytes for row in rows] == [400, 300]
    assert [row.parameters for row in rows] == [parameter_count(dense), parameter_count(small)]
    qualities = perplexity_and_kl(models, token_ids)
    assert [(row.perplexity, row.kl) for row in rows] == [(q.perplexity, q.kl) for q in qualities.values()]
    assert rows[0].kl == 0.0 < rows[1].kl
    assert rows[1].continuations == continuations(small, tokenizer, config.prompts, 3)
    assert all(row.prefill_tokens_per_s > 0 and row.decode_tokens_per_s > 0 for row in rows)
