"""Whole runs and trainings on chats: what counts in them, and how each part of a mixture fares."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chats
import runs
import tiny
import trainings
from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import Run, load
from darwinlm.commands.train import train
from darwinlm.config.run import RefitConfig, RunConfig
from darwinlm.config.training import TrainConfig
from darwinlm.data.chat import Chat, render
from darwinlm.data.corpus import Corpus, is_held_out, read_corpus
from darwinlm.data.documents import read_documents
from darwinlm.data.draw import draw_counted
from darwinlm.data.stream import draw_held_out, draw_sequences
from darwinlm.database.store import Database
from darwinlm.evaluation.quality import Quality, perplexity_and_kl, windows_over
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_grid
from darwinlm.report import comparison, frontier
from darwinlm.report.comparison import Cell, notes_on
from darwinlm.report.left_behind import left_behind
from darwinlm.runtime.files import read_record, read_tensors
from darwinlm.types import UsageError
from pruned import zero_masked
from test_masked import by_hand
from test_parallel import torchrun


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two parts of chats and one of text."""
    path = tmp_path_factory.mktemp("data")
    asked = chats.write(path / "chats.jsonl", *({"messages": turns} for turns in chats.conversations()))
    text = chats.write(path / "plain.jsonl", *({"text": text} for text in tiny.documents()))
    return f"{asked}=2,{text}"


@pytest.fixture(scope="module")
def config(model: Path, mixture: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run."""
    calibration = replace(runs.SHORT.calibration, loss_tokens="assistant")
    stages = tuple(replace(stage, training_tokens=0) for stage in runs.SHORT.search.stages)
    search = replace(runs.SHORT.search, stages=stages, scrambled=0.0)
    made = runs.short(model, Path("-"), tmp_path_factory.mktemp("run") / "run", calibration=calibration, search=search)
    # Of consumers alone: at this rate Adam takes whole steps along gradients of updates that are all rounding.
    refit = RefitConfig(tokens=640, batch_size=4, learning_rate=1e-2, rank=0)
    made = replace(made, data=mixture, refit=refit, dtype="float32")
    run(made)
    return made


def corpus(config: RunConfig) -> Corpus:
    length = config.calibration.sequence_length
    return read_corpus(config.data, chats.tokenizer(marks=False), length, config.seed, config.loss_tokens)


def test_a_search_is_on_what_counts(config: RunConfig) -> None:
    drawn = draw_counted(corpus(config), config)
    done = Run.open(config.out)
    dense, found = load(config.model), read_record(done.search / "result.json")
    ids, counts = drawn["search"]
    assert counts is not None
    assert 0.3 < counts.float().mean() < 0.95
    checkpoint = Checkpoint(Path(config.model))
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
    database = Database(done.database, grid, read_record(done.database / "database.json")["provenance"])
    masked, everything = (
        by_hand("kl", dense, zero_masked(dense, database, done.genome), ids[:4], marks)
        for marks in (counts[:4], torch.ones_like(counts[:4]))
    )
    assert found["fitness"] == pytest.approx(masked, abs=1e-3)  # the search is in low precision where that is fast
    assert abs(masked - everything) > 1e-2


def test_the_report_tells_how_each_part_fares(config: RunConfig, mixture: str) -> None:
    parts = corpus(config).draw_parts(config.evaluation.tokens)
    assert list(parts) == ["chats.jsonl, held out", "plain.jsonl, held out"]
    models = {"dense": load(config.model), "searched": load(config.out)}
    rows = {row["model"]: row for row in Run.open(config.out).table}
    for name, part in parts.items():
        found = perplexity_and_kl(models, part.ids, counts=part.counts)["searched"]
        assert rows["searched"]["texts"][name]["kl"] == pytest.approx(found.kl, rel=1e-3)
        assert rows["searched"]["texts"][name]["perplexity"] == pytest.approx(found.perplexity, rel=1e-3)
    report = (Path(config.out) / "report.md").read_text()
    assert "KL chats.jsonl, held out" in report
    searched, uniform = (
        {name: rows[which]["texts"][name]["kl"] for name in parts} for which in ("searched", "uniform")
    )
    behind = left_behind(searched, uniform, "the uniform model")
    assert all(sentence in report for sentence in behind)
    assert report.count("is left behind") == len(behind)
    drawn = corpus(config).draw_held_out_counted(config.evaluation.tokens)
    whole = perplexity_and_kl(models, drawn.ids, counts=drawn.counts)["searched"]
    assert rows["searched"]["kl"] == pytest.approx(whole.kl, rel=1e-3)


def test_comparisons_tell_which_part_a_method_left_behind() -> None:
    def cell(method: str, kept: float, kl: dict[str, float]) -> Cell:
        texts = {part: Quality(9.0, value) for part, value in kl.items()}
        return Cell(method, kept, parameters=round(100 * kept), texts=texts, parts=("a", "b"))

    cells = [
        cell("dense", 1.0, {"a": 0.0, "b": 0.0}),
        cell("uniform", 0.8, {"a": 0.4, "b": 0.4}),
        cell("evolution", 0.8, {"a": 0.3, "b": 0.5}),
        cell("params=0.6", 0.6, {"a": 0.3, "b": 0.9}),
    ]
    worse, far = notes_on(cells)
    assert worse.startswith("evolution, params=0.8: b is left behind: its KL is 0.500, where the uniform model has 0.4")
    assert far.startswith("params=0.6: b is left behind: its KL is 0.900, where the other parts have 0.300 on average")
    assert worse in frontier.markdown(cells, [], "picture.png")
    assert worse in comparison.markdown(cells, [], "picture.png")


def test_a_part_that_is_left_behind_is_told() -> None:
    assert left_behind({"a": 0.2, "b": 0.3}, {"a": 0.3, "b": 0.3}, "uniform") == []
    (worse,) = left_behind({"a": 0.2, "b": 0.31}, {"a": 0.3, "b": 0.3}, "uniform")
    assert worse.startswith("b is left behind: its KL is 0.310, where uniform has 0.300; give it more weight")
    (far,) = left_behind({"a": 0.2, "b": 0.5, "c": 0.25}, {"a": 1.0, "b": 1.0, "c": 1.0}, "uniform")
    assert far.startswith("b is left behind: its KL is 0.500, where the other parts have 0.225 on average")


@pytest.mark.slow
def test_two_processes_count_what_one_counts(config: RunConfig, tmp_path: Path) -> None:
    """Calibration, search and refit."""
    here = replace(config, out=str(tmp_path / "run"))
    done = torchrun("-m", "darwinlm", *runs.command(here))
    assert done.returncode == 0, done.stderr
    ours, theirs = (runs.history(Path(each.out)) for each in (here, config))
    assert [line["genome"] for line in ours] == [line["genome"] for line in theirs]
    assert [line["fitness"] for line in ours] == pytest.approx([line["fitness"] for line in theirs], rel=1e-5)
    for name in ("searched", "uniform"):
        one, two = (read_tensors(Path(each.out) / "refit" / f"{name}.safetensors")[1] for each in (here, config))
        for path, weight in two.items():
            torch.testing.assert_close(one[path], weight, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def training(model: Path, mixture: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A training on the mixture, from the model itself, towards another one."""
    path = tmp_path_factory.mktemp("training")
    teacher = chats.write_model(path / "teacher")
    tiny.build("llama-gqa", 1).save_pretrained(teacher)
    return replace(trainings.distilled(model, Path("-"), path / "out", teacher), data=mixture)


def test_a_training_counts_answers_alone(training: TrainConfig, tmp_path: Path) -> None:
    """By hand: the loss of a step is the mean over all tokens of its sequences that count."""
    trained = train(training)
    found = trainings.losses(trained.history)
    tokenizer = chats.tokenizer(marks=False)
    text = training.data, trainings.STEPS * trainings.BATCH, tokenizer, training.stream, tmp_path / "cache"
    sequences = draw_sequences(*text, training.seed)
    student: Any = (
        Checkpoint(Path(training.model)).load(torch.float32, torch.device("cpu")).requires_grad_(True).train()
    )
    teacher: Any = load(str(training.teacher))
    settings = training.training
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    expected = []
    for step in range(3):
        share = (step + 1) / (settings.warmup_steps + 1) if step < settings.warmup_steps else 1.0
        optimizer.param_groups[0]["lr"] = settings.learning_rate * share
        items = [sequences[step * trainings.BATCH + i] for i in range(trainings.BATCH)]
        ids, counts = (torch.stack([item[name] for item in items]) for name in ("input_ids", "counts"))
        marks = counts[:, :-1]
        log_q = student(ids).logits[:, :-1].log_softmax(-1)[marks]
        with torch.no_grad():
            log_p = teacher(ids).logits[:, :-1].log_softmax(-1)[marks]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss = (kl - log_q.gather(-1, ids[:, 1:][marks][:, None]).mean()) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found[:3] == pytest.approx(expected, abs=3e-5)
    held_out = draw_held_out(training.data, 10, tokenizer, training.stream, tmp_path / "cache")
    assert held_out.sources == ("chats.jsonl", "plain.jsonl")
    models = {"dense": teacher, "student": load(training.model)}
    items = [held_out[i] for i in range(10)]
    of_part = held_out.places[:, 0]
    for name, chosen in (("", of_part >= 0), (" on chats.jsonl", of_part == 0), (" on plain.jsonl", of_part == 1)):
        ids, counts = (
            torch.stack([item[key] for item, mine in zip(items, chosen, strict=True) if mine])
            for key in ("input_ids", "counts")
        )
        quality = perplexity_and_kl(models, ids, counts=counts)["student"]
        assert trained.result["before"][f"kl{name}"] == pytest.approx(quality.kl, rel=1e-4)
        assert trained.result["before"][f"perplexity{name}"] == pytest.approx(quality.perplexity, rel=1e-4)


def test_the_cache_of_tokens_knows_the_template(model: Path, mixture: str, tmp_path: Path) -> None:
    def drawn(template: str, loss_tokens: Any) -> Any:
        tokenizer = chats.tokenizer(template, marks=False)
        return draw_sequences(mixture, 8, tokenizer, trainings.SHORT.stream, tmp_path / "cache", 0, 0, loss_tokens)

    own, other, everything = (
        drawn(chats.CHATML, "assistant"),
        drawn(chats.MARKED, "assistant"),
        drawn(chats.CHATML, "all"),
    )
    assert len({own.fingerprint, other.fingerprint, everything.fingerprint}) == 3
    assert own.stores[0].path != other.stores[0].path
    assert own.stores[0].path == everything.stores[0].path  # tokens are packed once for both
    assert "counts" not in everything[0]
    assert torch.equal(own[0]["input_ids"], everything[0]["input_ids"])


def test_chats_without_a_template_are_refused_by_both(
    checkpoints: dict[str, Path], mixture: str, tmp_path: Path
) -> None:
    for command in ("compress", "train"):
        settings: Any = runs if command == "compress" else trainings
        asked = replace(settings.short(checkpoints["llama-gqa"], Path("-"), tmp_path / command), data=mixture)
        with pytest.raises(
            UsageError, match=r"line \d+ of .*chats.jsonl is a chat, and the model's tokenizer has no chat"
        ):
            (run if command == "compress" else train)(asked)
        assert not any((tmp_path / command).glob("*.yaml"))


@given(st.integers(2, 60), st.integers(3, 12), st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_windows_predict_each_token_that_counts_once(
    tokens: int, length: int, stride: int, has_bos: bool, rng: Random
) -> None:
    stream, counts = torch.arange(100, 100 + tokens), torch.tensor([rng.random() < 0.5 for _ in range(tokens)])
    bos = 1 if has_bos else None
    predicted = [
        int(window.token_ids[row + 1])
        for window in windows_over(stream, length, min(stride, length), bos, counts)
        for row in window.rows
    ]
    every = [
        int(window.token_ids[row + 1])
        for window in windows_over(stream, length, min(stride, length), bos)
        for row in window.rows
    ]
    assert predicted == [token for token in every if counts[token - 100]]


def test_evaluate_counts_answers_alone(config: RunConfig, mixture: str, tmp_path: Path) -> None:
    """Beside an independent walk over the windows' logits."""
    source, out = mixture.partition("=")[0], tmp_path / "out.json"
    flags = ["--data", source, "--tokens", "600", "--window", "50", "--out", str(out)]
    assert runs.call("evaluate", config.out, "--against", config.model, *flags) == 0
    found = json.loads(out.read_text())["models"][1]["texts"][source]
    tokenizer = chats.tokenizer(marks=False)
    documents = dict.fromkeys(text for text in read_documents(source) if is_held_out(text))
    ids, counts = list[int](), list[bool]()
    for chat in documents:
        assert isinstance(chat, Chat)
        own, marks = render(chat, tokenizer)
        ids, counts = [*ids, *own, 2], [*counts, *marks, False]
    losses, divergences = [], []
    dense, pruned = load(config.model), load(config.out)
    for start in range(0, 600, 50):
        window = torch.tensor([ids[start : start + 50]])
        with torch.no_grad():
            log_p, log_q = (model(window).logits[0].double().log_softmax(-1) for model in (dense, pruned))
        for place in range(49):
            if counts[start + place + 1]:
                losses.append(-log_q[place, window[0, place + 1]].item())
                divergences.append((log_p[place].exp() * (log_p[place] - log_q[place])).sum().item())
    assert 100 < len(losses) < 550
    assert found["kl"] == pytest.approx(mean(divergences), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(mean(losses)), rel=1e-4)
