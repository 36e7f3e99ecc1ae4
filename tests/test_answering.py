"""Answers to chat prompts: against transformers' own generation one prompt at a time, and what is told of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MptConfig

import chats
import runs
import tiny
from darwinlm.commands import compress
from darwinlm.config.run import EvaluationConfig
from darwinlm.evaluation.answering import answer
from darwinlm.evaluation.generation import greedy
from darwinlm.evaluation.prompts import chat_prompts
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.types import UsageError

ENDS = [2, 9, 17, 30, 44, 70, 100, *range(150, 170)]  # so many that some answers end


def alone(model: Any, prompt: list[int], limit: int) -> list[int]:
    """What transformers writes after one prompt, without the token that ends it."""
    ids = torch.tensor([prompt])
    settings = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=ENDS, pad_token_id=3)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :]
    return [token for token in written.tolist() if token not in ENDS]


@pytest.mark.parametrize("family", ["llama-gqa", "bloom-mha", "gemma2"])
def test_answers_are_those_of_one_prompt_at_a_time(family: str) -> None:
    model, tokenizer = tiny.build(family), tiny.tokenizer()
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, eos_token_id=ENDS)
    prompts = [tokenizer(text)["input_ids"] for text in ("When", "A function is a thing that", "x y z", "The list of")]
    found = answer(model, tokenizer, prompts, 16, 3)
    assert model.generation_config.do_sample, "it is as it was"
    expected = [alone(model, prompt, 16) for prompt in prompts]
    assert found.texts == tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in expected)
    assert found.lengths == tuple(map(len, expected))
    assert found.cut_off == tuple(int(len(ids) == 16) for ids in expected)
    assert found.median_length == median(map(len, expected))
    repeated = []
    for ids in expected:
        grams = Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
        repeated.append((grams.total() - len(grams)) / grams.total() if grams else 0.0)
    assert found.repetition == pytest.approx(mean(repeated))


def test_an_answer_that_ends_with_its_last_token_is_not_cut_off() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.build("llama-gqa")
    prompt = tokenizer("When")["input_ids"]
    model.generation_config = GenerationConfig(eos_token_id=None)
    assert answer(model, tokenizer, [prompt], 3, 1).cut_off == (1,)
    last = greedy(model, prompt, 3)[-1]
    model.generation_config = GenerationConfig(eos_token_id=last)
    ended = answer(model, tokenizer, [prompt], 3, 1)
    assert (ended.cut_off, ended.lengths) == ((0,), (greedy(model, prompt, 3).index(last),))


def test_prompts_end_where_the_first_answer_begins(tmp_path: Path) -> None:
    tokenizer = chats.tokenizer(chats.MARKED)
    turns = chats.messages("Hi", "Hello", "More", "No")
    long = chats.messages("Hi " * 400, "Hello")
    file = chats.write(tmp_path / "c.jsonl", {"messages": turns}, {"messages": long}, {"messages": turns[:1]})
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    short, long_enough = tiny.CONFIGS["llama-gqa"], MptConfig()  # of 256 positions, and of no number that it names so
    found = chat_prompts(str(file), tokenizer, short, 9, 56, "chat")
    assert [tokenizer.decode(ids) for ids in found] == [prompt, prompt]
    assert len(chat_prompts(str(file), tokenizer, long_enough, 2, 56, "chat")) == 2
    assert len(chat_prompts(str(file), tokenizer, long_enough, 9, 56, "chat")) == 3
    with pytest.raises(UsageError, match=r"--chat: expected chats whose prompts have at most 4 tokens in .* among 3;"):
        chat_prompts(str(file), tokenizer, short, 9, 252, "chat")
    plain = chats.write(tmp_path / "plain.jsonl", {"text": "Hi"})
    with pytest.raises(UsageError, match=r"--chat: expected chats in .*, found none among 0; give others"):
        chat_prompts(str(plain), tokenizer, long_enough, 9, 4, "chat")
    with pytest.raises(UsageError, match="is a chat, and the model's tokenizer has no chat template"):
        chat_prompts(str(file), chats.tokenizer(None), short, 9, 4, "chat")


def questions(path: Path, count: int = 16) -> Path:
    """Chats with questions of different lengths."""
    topics = ("lists", "the weather", "numbers", "names of things", "files", "how functions work", "errors", "sets")
    asked = [f"Tell me about {topics[n % len(topics)]}" + ", please" * (n // len(topics)) for n in range(count)]
    return chats.write(path, *({"messages": chats.messages(question, "No.")} for question in asked))


def test_the_command_tells_whether_models_stop(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, other = (chats.write_model(tmp_path / name) for name in ("dense", "other"))
    tiny.build("llama-gqa", 3).save_pretrained(other)
    for path in (dense, other):
        GenerationConfig(eos_token_id=ENDS).save_pretrained(path)
    file, out = questions(tmp_path / "chat.jsonl"), tmp_path / "out.json"
    flags = ["--chat", str(file), "--chat-prompts", "12", "--answer-tokens", "16", "--batch-size", "5"]
    assert runs.call("evaluate", str(other), "--against", str(dense), *flags, "--out", str(out)) == 0
    shown = capsys.readouterr().out
    tokenizer = Checkpoint(dense).tokenizer
    prompts = chat_prompts(str(file), tokenizer, tiny.CONFIGS["llama-gqa"], 12, 16, "chat")
    answers = [[alone(load(path), prompt, 16) for prompt in prompts] for path in (dense, other)]
    for model, expected in zip(json.loads(out.read_text())["models"], answers, strict=True):
        assert model["answers"]["tokens"] == list(map(len, expected))
        assert model["answers"]["median_tokens"] == median(map(len, expected))
        assert model["answers"]["share_cut_off"] == pytest.approx(mean(len(ids) == 16 for ids in expected))
        assert model["answers"]["texts"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    shares = [100 * mean(len(ids) == 16 for ids in of) for of in answers]
    assert 0 < shares[0] < 100
    (line,) = (line for line in shown.splitlines() if line.startswith("cut off at 16 tokens, %"))
    assert line.split()[-2:] == [f"{share:.1f}" for share in shares]
    (line,) = (line for line in shown.splitlines() if line.startswith("cut off, beside dense"))
    assert f" {shares[1] - shares[0]:+.1f} (" in line
    assert "12 prompts through the chat template" in shown
    assert runs.call("evaluate", str(checkpoints["llama-gqa"]), *flags) == 2
    assert "is a chat, and the model's tokenizer has no chat template" in capsys.readouterr().err


def test_a_run_reports_them(text: Path, tmp_path: Path) -> None:
    model = chats.write_model(tmp_path / "model")
    judged: dict[str, Any] = {"chat": str(questions(tmp_path / "chat.jsonl")), "answer_tokens": 8}
    evaluation = replace(runs.SHORT.evaluation, **judged)
    config = runs.short(model, text, tmp_path / "run", evaluation=evaluation)
    with pytest.raises(UsageError, match=r"no text at .*none\.jsonl: expected a file; check --evaluation\.chat"):
        compress.run(replace(config, evaluation=replace(evaluation, chat=str(tmp_path / "none.jsonl"))))
    assert not (tmp_path / "run").exists()
    run = compress.run(config)
    found = [row["answers"] for row in run.table]
    exported = load(run.exported)
    prompts = chat_prompts(judged["chat"], Checkpoint(model).tokenizer, exported.config, 32, 8, "chat")
    assert found[-1]["texts"] == list(answer(exported, Checkpoint(model).tokenizer, prompts, 8, 8).texts)
    told = (run.path / "report.md").read_text()
    assert "## Answers to chat prompts" in told
    row = f"| searched | {found[-1]['median_tokens']:g} | {100 * found[-1]['share_cut_off']:.1f} |"
    assert row in told
    assert "<h2>Answers to chat prompts</h2>" in (run.path / "report.html").read_text()
    assert EvaluationConfig().chat is None, "and is off by default"
