"""What the dense model writes itself: batched as alone, resumed as uninterrupted, and read by every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import chats
import runs
import tiny
import trainings
from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import Run
from darwinlm.commands.train import train
from darwinlm.config.own import OwnConfig
from darwinlm.config.run import RunConfig
from darwinlm.data.chat import Chat, prompt_text
from darwinlm.data.documents import read_documents
from darwinlm.evaluation.generation import greedy
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime.files import read_record
from darwinlm.training import own_text as module
from darwinlm.training.own_text import Writer, with_own_text
from darwinlm.types import UsageError
from pruned import CPU
from test_parallel import torchrun

CONFIG = OwnConfig(answer_tokens=12, batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(chats.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = chats.conversations()[:400]
    return chats.write(tmp_path_factory.mktemp("data") / "chats.jsonl", *({"messages": each} for each in turns))


def writer(checkpoint: Checkpoint, source: object, out: Path, tokens: int = 2500, **changes: Any) -> Writer:
    return Writer(checkpoint, str(source), tokens, replace(CONFIG, **changes), out, 0)


def test_batches_of_prompts_are_answered_as_each_alone(checkpoint: Checkpoint, asked: Path, tmp_path: Path) -> None:
    """Whatever is beside a prompt, and although the checkpoint asks for a penalty for repetition."""
    model: Any = checkpoint.load(torch.float32, CPU)
    ends = model.generation_config.eos_token_id
    model.generation_config.repetition_penalty = 5.0
    own = writer(checkpoint, f"self:{asked}", tmp_path, temperature=0.0)
    own.write(model)
    documents = list(read_documents(str(own.file)))
    assert len(documents) > 10
    model.generation_config.eos_token_id = ends
    openings = {chat.opening for chat in read_documents(str(asked)) if isinstance(chat, Chat)}
    for chat in documents[:10]:
        assert isinstance(chat, Chat)
        assert chat.opening in openings
        tokenizer = checkpoint.tokenizer
        ids = tokenizer(prompt_text(chat.opening, tokenizer), add_special_tokens=False)["input_ids"]
        expected = tokenizer.decode(greedy(model, ids, 12), skip_special_tokens=True)
        assert chat.messages[len(chat.opening.messages)]["content"] == str(expected).strip()
        assert len(chat.messages) == len(chat.opening.messages) + 1
    record = read_record(own.file.with_suffix(".json"), "texts", "written")
    assert record["provenance"]["settings"]["temperature"] == 0
    assert record["texts"] == len(documents)
    assert record["written"] >= 2500


def test_interrupted_writing_ends_with_the_same_texts(
    checkpoint: Checkpoint, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint.load(torch.float32, CPU)
    whole = writer(checkpoint, f"self:{asked}", tmp_path / "whole")
    whole.write(model)
    generate, batches = Writer._generate, list[int]()

    def counted(self: Writer, model: Any, prompts: Sequence[Any]) -> list[list[int]]:
        batches.append(len(prompts))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return generate(self, model, prompts)

    monkeypatch.setattr(Writer, "_generate", counted)
    again = writer(checkpoint, f"self:{asked}", tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        again.write(model)
    assert not again.file.exists()
    again.write(model)
    assert again.file.read_bytes() == whole.file.read_bytes()
    count = len(batches)
    assert len({len(text) for text in whole.file.read_text().splitlines()}) > 5
    other = Writer(checkpoint, f"self:{asked}", 2500, CONFIG, tmp_path, 1)
    other.write(model)
    assert other.file.read_bytes() != whole.file.read_bytes()
    assert len(batches) > count


@pytest.mark.parametrize("adds_bos", [False, True])
def test_texts_from_nothing_are_samples_of_the_model(adds_bos: bool, tmp_path: Path) -> None:
    """The first tokens of many texts have about the frequencies that the model gives them."""
    checkpoint = Checkpoint(tiny.write_checkpoint(tmp_path / "model", "llama-gqa", adds_bos=adds_bos))
    model: Any = checkpoint.load(torch.float32, CPU)
    own = writer(checkpoint, "self", tmp_path, answer_tokens=1, batch_size=500)
    answers = [answer for _ in range(4) for answer in own._generate(model, [*_first(own, 500)])]
    first = torch.tensor([answer[0] for answer in answers])
    begin = 1 if adds_bos else 2  # a BOS, or the token that ends texts
    expected = model(torch.tensor([[begin]])).logits[0, -1].softmax(-1)
    found = torch.bincount(first, minlength=tiny.VOCAB) / len(first)
    assert (found - expected).abs().sum() < 0.5 * (1 - expected).sum() / 100
    assert [prompt.ids for prompt in _first(own, 2)] == [(begin,), (begin,)]


def _first(own: Writer, count: int) -> list[Any]:
    prompts = own._prompts()
    return [next(prompts) for _ in range(count)]


def test_of_plain_text_the_beginning_is_continued(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = chats.write(tmp_path / "plain.jsonl", *({"text": text} for text in tiny.documents()))
    own = writer(checkpoint, f"self:{path}", tmp_path, tokens=300)
    own.write(checkpoint.load(torch.float32, CPU))
    tokenizer, beginnings = checkpoint.tokenizer, set()
    for text in tiny.documents():
        beginnings.add(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: module.BEGINNING]))
    documents = list(read_documents(str(own.file)))
    assert documents
    assert all(any(text.startswith(str(beginning)) for beginning in beginnings) for text in documents)


def test_a_mixture_names_what_was_written_once(checkpoint: Checkpoint, asked: Path, tmp_path: Path) -> None:
    data = f"{asked}=2,self:{asked}=1"
    settings = checkpoint, (600, 60), CONFIG, tmp_path, 0, CPU, torch.float32
    named = with_own_text(data, *settings)
    own, directory = named.split(",")[1].removesuffix("=1.0"), tmp_path / module.DIRECTORY
    assert named == f"{asked}=2.0,{own}=1.0"
    assert sorted(path.name for path in directory.iterdir()) == [
        Path(own).with_suffix(end).name for end in (".json", ".jsonl")
    ]
    written = read_record(Path(own).with_suffix(".json"))["provenance"]["settings"]["tokens"]
    assert written == round(600 / 0.9 / 3 * module.SPARE)
    before = Path(own).stat().st_mtime_ns
    assert with_own_text(data, *settings) == named
    assert Path(own).stat().st_mtime_ns == before
    long = chats.write(tmp_path / "long.jsonl", {"messages": chats.messages("word " * 400)})
    with pytest.raises(UsageError, match="expected prompts of at most 244 tokens"):
        with_own_text(f"self:{long}", *settings)


@pytest.fixture(scope="module")
def config(checkpoint: Checkpoint, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    stages = tuple(replace(stage, fitness_tokens=512) for stage in runs.SHORT.search.stages)
    search, own = replace(runs.SHORT.search, stages=stages), replace(CONFIG, answer_tokens=60)
    made = runs.short(checkpoint.path, Path("-"), tmp_path_factory.mktemp("run") / "run", own=own, search=search)
    return replace(made, data=f"{asked}=2,self:{asked}=1")


def test_a_run_reads_what_its_model_wrote(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In calibration, search and refit; a second command writes nothing."""
    run(config, until="database")
    generated = list[int]()
    monkeypatch.setattr(Writer, "_generate", lambda *_: generated.append(1))
    done = run(config)
    assert not generated
    assert done.finished
    (own,) = (done.path / module.DIRECTORY).glob("*.jsonl")
    report = done.report_path.read_text()
    assert f"KL {own.name}, held out" in report
    assert "KL chats.jsonl, held out" in report
    assert config.data in report
    assert Run.open(done.path).config == config


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_write_the_texts_of_one(config: RunConfig, tmp_path: Path, processes: int) -> None:
    """Each writes some of the batches; what is written beyond the tokens that were asked for is not taken."""
    run(config, until="database")
    shared = replace(config, out=str(tmp_path / "run"))
    done = torchrun("-m", "darwinlm", *runs.command(shared, name="database"), processes=processes)
    assert done.returncode == 0, done.stderr
    ours, theirs = (next((Path(each.out) / module.DIRECTORY).glob("*.jsonl")) for each in (shared, config))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not ours.with_suffix(".parts").exists()


def test_a_training_is_taught_on_what_the_teacher_wrote(checkpoint: Checkpoint, asked: Path, tmp_path: Path) -> None:
    settings = trainings.distilled(checkpoint.path, Path("-"), tmp_path / "out", checkpoint.path)
    settings = replace(settings, data=f"self:{asked}", own=CONFIG, tokens=4 * trainings.BATCH * trainings.LENGTH)
    with pytest.raises(UsageError, match="--data self is what the dense model writes: expected --teacher"):
        train(replace(settings, teacher=None, distillation=trainings.SHORT.distillation))
    result = train(settings).result
    assert result["before"]["kl"] < 1e-6
    (own,) = (tmp_path / "out" / "cache" / module.DIRECTORY).glob("*.jsonl")
    line = json.loads(own.read_text().splitlines()[0])
    assert [message["role"] for message in line["messages"]][-1] == "assistant"


def test_elsewhere_self_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--evaluation\.texts: self:x\.jsonl is what the dense model writes"):
        list(read_documents("self:x.jsonl", "--evaluation.texts"))
