"""`darwinlm evaluate`: windows, texts, what models write, and the command on dense models, exports and runs."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import OlmoConfig, OlmoForCausalLM

import runs
import tiny
from darwinlm.commands import compress, evaluate
from darwinlm.commands.evaluate import evaluate_models, read_text
from darwinlm.config.evaluation import EvaluateConfig
from darwinlm.data.corpus import is_held_out
from darwinlm.evaluation.generation import repetition, write
from darwinlm.evaluation.local_tasks import LOCAL
from darwinlm.evaluation.quality import quality_over, windows_over
from darwinlm.evaluation.tasks import LIKELIHOOD, SUITE, Request, Score
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.types import UsageError

PROMPTS = ("The list of", "A function is", "When the")


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_count_every_token_once(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    stream = torch.arange(tokens)
    counted = [t for window in windows_over(stream, length, stride) for t in window.token_ids[window.first :].tolist()]
    starts = set(range(0, tokens, stride)) if stride == length else {0}
    assert counted == [token for token in range(tokens) if token not in starts]
    for window in windows_over(stream, length, stride)[1:]:
        assert window.first >= length - stride
        assert len(window.token_ids) <= length


@pytest.mark.parametrize("stride", [5, 24])
def test_perplexity_and_kl_in_windows_equal_those_of_full_logits(stride: int) -> None:
    models: Any = {"dense": tiny.build("llama-mha"), "other": tiny.build("llama-mha", 1)}
    stream = torch.randint(1, tiny.VOCAB, (100,), generator=torch.Generator().manual_seed(0))
    found = quality_over(models, windows_over(stream, 24, stride))
    surprises, divergences = [], []
    for at in range(1, 100):
        start = max(0, -(-(at - 23) // stride) * stride)  # of the first window that reaches it
        if start == at:
            continue
        with torch.no_grad():
            p, q = (m(stream[None, start:at]).logits[0, -1].double().log_softmax(-1) for m in models.values())
        surprises.append(-q[stream[at]])
        divergences.append((p.exp() * (p - q)).sum())
    assert found["other"].perplexity == pytest.approx(torch.stack(surprises).mean().exp().item(), rel=1e-4)
    assert found["other"].kl == pytest.approx(torch.stack(divergences).mean().item(), rel=1e-4)


def test_no_more_than_two_models_are_held_at_a_time(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all have the figures that they have when they are evaluated alone."""
    held: list[weakref.ref[Any]] = []
    most = 0
    read = Checkpoint.load

    def counted(*given: Any) -> Any:
        nonlocal most
        model = read(*given)
        held.append(weakref.ref(model))
        gc.collect()
        most = max(most, sum(each() is not None for each in held))
        return model

    dense, *others = (tiny.write_checkpoint(tmp_path / str(seed), "llama-gqa", seed) for seed in range(4))
    config = EvaluateConfig(
        model=str(others[0]), data=str(text), against=str(dense), beside=",".join(map(str, others[1:])), tokens=256,
        window=64, generation=True, continuation_tokens=4, device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(Checkpoint, "load", counted)
    cards = evaluate_models(config)
    assert most == 2
    alone = [evaluate_models(replace(config, model=str(other), beside=None))[-1] for other in others]
    assert [(card.qualities, card.writing) for card in cards[1:]] == [(card.qualities, card.writing) for card in alone]


def test_repetition_counts_four_grams() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 13) == pytest.approx(9 / 10)
    assert repetition(range(20)) == 0


def test_agreement_is_with_each_of_the_dense_models_tokens() -> None:
    """Against transformers' own generation."""
    dense: Any = tiny.build("llama-gqa")
    other: Any = tiny.build("llama-gqa", 3)
    tokenizer = tiny.tokenizer()
    assert write(dense, tokenizer, PROMPTS, 12, dense).agreement == 1
    assert write(dense, tokenizer, PROMPTS, 12).agreement is None
    for parameter, like in zip(other.parameters(), dense.parameters(), strict=True):
        parameter.data = like.data + 0.1 * (parameter.data - like.data)  # close to dense, not the same
    agreed = total = 0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        full: Any = dense.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        for at in range(ids.shape[1], full.shape[1]):
            agreed += int(other(full[:, :at]).logits[0, -1].argmax() == full[0, at])
            total += 1
    written = write(other, tokenizer, PROMPTS, 12, dense)
    assert written.agreement == pytest.approx(agreed / total)
    assert 0 < agreed < total
    assert all(text.startswith(prompt) for text, prompt in zip(written.continuations, PROMPTS, strict=True))
    repeated = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        own: Any = other.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        repeated.append(repetition(own[0, ids.shape[1] :].tolist()))
    assert written.repetition == pytest.approx(mean(repeated))


def test_text_is_that_which_is_held_out_or_all(text: Path) -> None:
    tokenizer = tiny.tokenizer()
    whole = list(dict.fromkeys(tiny.documents()))  # two topics have one text
    held_out = EvaluateConfig("M", tokens=10**7)
    for config, wanted in ((held_out, filter(is_held_out, whole)), (replace(held_out, documents="all"), whole)):
        stream, counts = read_text(str(text), tokenizer, config)
        assert counts is None
        assert tokenizer.decode(stream) == "".join(f"{document}</s>" for document in wanted)
    assert len(read_text(str(text), tokenizer, EvaluateConfig("M", tokens=77))[0]) == 77


@pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies'
def test_command_measures_dense_models_runs_and_exports(
    checkpoints: dict[str, Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # a second a call, for notes
    dense = checkpoints["llama-gqa"]
    run = compress.run(runs.short(dense, text, tmp_path / "run"))
    record = {"query": "Question: Which is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1}
    (tmp_path / LOCAL["arc_easy"].file).write_text(f"{json.dumps(record)}\n" * 10)
    flags = f"--data {text} --tokens 300 --window 64 --stride 32 --generation --continuation-tokens 6 --tasks arc_easy"
    files = ["--tasks-data", str(tmp_path), "--out", str(tmp_path / "out.json")]
    capsys.readouterr()
    against = ["--against", str(dense), "--beside", f"{run.exported},{checkpoints['llama-mha']}"]
    assert runs.call("evaluate", str(run.path), *flags.split(), *files, *against) == 0
    shown = capsys.readouterr().out
    for words in ("perplexity, ", "KL, ", "arc_easy, acc, 0-shot", "arc_easy, log-likelihood, 0-shot", "repetition, %",
                  "agreement with dense, %",
                  "windows of 64 tokens, each 32 tokens further", "held-out documents", "KL("):  # fmt: skip
        assert words in shown
    found = json.loads((tmp_path / "out.json").read_text())
    names = [model["model"] for model in found["models"]]
    assert names == ["dense", "run", "model", "llama-mha"]
    first, of_run, of_export, other = found["models"]
    assert first["texts"][str(text)]["kl"] == 0
    assert first["generation"]["agreement"] is None
    assert of_run | {"model": ""} == of_export | {"model": ""}
    assert other["texts"][str(text)]["kl"] > 0
    stream, _ = read_text(str(text), tiny.tokenizer(), EvaluateConfig("M", tokens=300))
    models = {"dense": load(dense), "run": load(run.exported)}
    expected = quality_over(models, windows_over(stream, 64, 32))["run"]
    assert of_run["texts"][str(text)] == {"perplexity": expected.perplexity, "kl": expected.kl}
    assert f"{expected.perplexity:.3f}" in shown
    assert {task["questions"] for task in of_run["tasks"]} == {10}
    likelihoods = [next(task for task in model["tasks"] if task["metric"] == LIKELIHOOD) for model in found["models"]]
    assert likelihoods[0]["beside_dense"] is None
    gap = likelihoods[3]["value"] - likelihoods[0]["value"]
    # The ten questions are one: so is the difference, and its interval has no width.
    assert likelihoods[3]["beside_dense"] == {k: pytest.approx(gap) for k in ("value", "low", "high")} | {"real": True}
    (line,) = (line for line in shown.splitlines() if f"({gap:+.3f} to {gap:+.3f}) *" in line)
    assert line.startswith("  beside dense")


def test_models_of_another_vocabulary_have_no_kl(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    tiny.build("llama-mha").save_pretrained(tmp_path)
    other = tiny.tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(tmp_path)
    config = EvaluateConfig(
        str(tmp_path), str(text), against=str(checkpoints["llama-mha"]), tokens=100, window=50, generation=True,
        prompts=PROMPTS, continuation_tokens=4,
    )  # fmt: skip
    dense, card = evaluate_models(config)
    assert dense.qualities[str(text)][1] == 0
    assert card.qualities[str(text)] == (pytest.approx(dense.qualities[str(text)][0]), None)
    assert card.writing is not None
    assert card.writing.agreement is None


def test_as_many_tokens_but_more_logits_have_no_kl(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Models of one family may pad their heads to other sizes."""
    dense: Any = load(checkpoints["llama-mha"])
    dense.resize_token_embeddings(tiny.VOCAB + 8)
    dense.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = EvaluateConfig(
        str(tmp_path), str(text), against=str(checkpoints["llama-mha"]), tokens=100, window=50, generation=True,
        prompts=PROMPTS, continuation_tokens=4,
    )  # fmt: skip
    _, card = evaluate_models(config)
    assert card.qualities[str(text)][1] is None
    assert card.writing is not None
    assert card.writing.agreement is None


def test_only_against_names_the_dense_model(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Not a directory that happens to be called dense, as every run on a GGUF file has one."""
    shutil.copytree(checkpoints["llama-gqa"], tmp_path / "dense")
    config = EvaluateConfig(
        str(checkpoints["llama-mha"]), str(text), beside=str(tmp_path / "dense"), tokens=100, window=50
    )
    assert [card.qualities[str(text)][1] for card in evaluate_models(config)] == [None, None]


def test_a_model_that_darwinlm_does_not_prune_can_stand_beside(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    OlmoForCausalLM(OlmoConfig(vocab_size=tiny.VOCAB, **sizes)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    flags = ["--data", str(text), "--tokens", "100", "--window", "50", "--beside", str(tmp_path)]
    assert runs.call("evaluate", str(checkpoints["llama-mha"]), *flags) == 0
    assert tmp_path.name in capsys.readouterr().out


def test_the_suite_is_asked_whole_and_averaged(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Request]()

    def answer(_: object, __: object, requests: list[Request], ___: object) -> list[Score]:
        asked.extend(requests)
        share = len(asked) / 10
        return [Score(each.task, str(each.metric), each.shots or 0, share, None, 1, "") for each in requests]

    monkeypatch.setattr(evaluate, "find_tasks", lambda *_: None)
    monkeypatch.setattr(evaluate, "run_tasks", answer)
    evaluate_models(EvaluateConfig(str(checkpoints["llama-mha"]), suite="darwinlm"))
    assert asked == list(SUITE)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("average of the suite"))
    assert line.split()[-1] == f"{100 * mean(n / 10 for n in range(1, 10)):.1f}"


@pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies'
def test_a_task_that_cannot_be_run_costs_no_other_figure(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    record = {"query": "Question: Which is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1}
    (tmp_path / LOCAL["arc_easy"].file).write_text(f"{json.dumps(record)}\n" * 3)
    (tmp_path / LOCAL["piqa"].file).write_text('{"query": "half a record"}\n')
    files = ["--tasks-data", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert runs.call("evaluate", str(checkpoints["llama-mha"]), "--tasks", "piqa,arc_easy", *files) == 1
    printed = capsys.readouterr()
    assert "piqa.jsonl cannot be read as questions" in printed.err.splitlines()[-1]
    assert re.search(r"^piqa, -, 0-shot +-$", printed.out, re.MULTILINE)
    found = json.loads((tmp_path / "out.json").read_text())["models"][0]["tasks"]
    assert [score["value"] is None for score in found] == [True, False, False, False]


def test_what_cannot_be_measured_is_refused(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(checkpoints["llama-mha"])
    for flags, words in (
        ([], "nothing to measure: expected --data, --tasks, --suite, --generation, --chat, --draft or --speed"),
        (["--speed"], "expected --against, found none"),
        (["--data", f"{text}=2", "--window", "64"], "expected texts without weights"),
        (["--data", str(text)], "--window: expected at most the 256 positions of the model, found 1024"),
        (["--data", str(text), "--window", "64", "--stride", "65"], "--stride: expected at most the --window of 64"),
        (["--data", str(text), "--tokens", "1"], "--tokens: expected at least 2, found 1"),
        (["--data", "nowhere.txt", "--window", "64"], "no text at nowhere.txt"),
        (["--generation", "--chat-template"], "--chat-template: expected a model with a chat template, found none"),
        (["--data", str(text), "--window", "64", "--out", str(tmp_path)], "--out: expected a file that can be written"),
        (["--data", str(text), "--out", str(tmp_path / "o"), "--against", str(tmp_path / "none")], "no model at"),
    ):
        assert runs.call("evaluate", model, *flags) == 2, flags
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with pytest.raises(UsageError, match="--prompts: expected prompts of at least one word"):
        EvaluateConfig("M", prompts=("",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("nothing", "--tasks: expected tasks of lm-eval"),
        ("ai2_arc", "a tag without figures; name its tasks: arc_challenge, arc_easy"),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(
    task: str, words: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the text is read. lm-eval takes ten seconds to read the names of its tasks."""
    assert runs.call("evaluate", str(checkpoints["llama-mha"]), "--data", "nowhere.txt", "--tasks", task) == 2
    assert words in capsys.readouterr().err
