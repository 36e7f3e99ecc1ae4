"""Sequences as models were trained on them: a BOS before each where the tokenizer adds one, documents kept apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

import runs
import tiny
import trainings
from darwinlm.cli import main
from darwinlm.commands import compress
from darwinlm.commands.train import train
from darwinlm.data.packing import as_sequences, bos_of, cut, end_of_text
from darwinlm.evaluation.quality import quality_over, windows_over
from darwinlm.runtime.progress import console

BOS, END = 1, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("bos"), "llama-gqa", adds_bos=True)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All sequences of more than one token that a model reads, by the ids that its embedding looks up."""
    sequences, look_up = list[Tensor](), functional.embedding

    def spy(ids: Tensor, weight: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        # Calibration loads the rows of the embedding that it needs, and numbers them anew.
        if ids.dim() == 2 and ids.shape[1] > 1 and len(weight) == tiny.VOCAB:
            # A family is found by a run of the decoder on token 0 alone, which is no text.
            sequences.extend(sequence for sequence in ids.cpu() if sequence.any())
        return look_up(ids, weight, *arguments, **keywords)

    monkeypatch.setattr(functional, "embedding", spy)
    return sequences


def begins_with_the_only_bos(sequence: Tensor) -> bool:
    return int(sequence[0]) == BOS and int((sequence == BOS).sum()) == 1


def test_a_bos_is_what_the_tokenizer_puts_before_a_text() -> None:
    assert bos_of(tiny.tokenizer()) is None
    assert bos_of(tiny.tokenizer(adds_bos=True)) == BOS


def test_every_stage_of_a_run_reads_one_bos_and_first(
    model: Path, text: Path, tmp_path: Path, read: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = list[Tensor]()

    def noted(checkpoint: Any, token_ids: Tensor, **settings: Any) -> Any:
        calibrated.extend(token_ids)
        return calibrate(checkpoint, token_ids, **settings)

    calibrate = compress.calibrate
    monkeypatch.setattr(compress, "calibrate", noted)
    stages = tuple(replace(stage, fitness_tokens=stage.fitness_tokens + 9) for stage in runs.SHORT.search.stages)
    search = replace(runs.SHORT.search, stages=(stages[0], replace(stages[1], training_tokens=50)))
    with console.capture() as said:
        compress.run(runs.short(model, text, tmp_path / "run", search=search))
    assert "database: the BOS token makes up" in said.get()
    assert len(calibrated) == 32
    assert {len(sequence) for sequence in read} >= {32, 9}
    assert all(map(begins_with_the_only_bos, [*read, *calibrated]))


def test_a_training_and_an_evaluation_read_one_bos_and_first(
    model: Path, text: Path, tmp_path: Path, read: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    train(trainings.distilled(model, text, tmp_path / "out", model))
    assert len(read) > 10
    flags = ["--data", str(text), "--window", "16", "--stride", "7", "--tokens", "100", "--prompts", "[A function is]"]
    assert main(["evaluate", str(model), *flags, "--out", str(tmp_path / "figures.json")]) == 0
    capsys.readouterr()
    assert all(map(begins_with_the_only_bos, read))
    assert "BOS" in json.loads((tmp_path / "figures.json").read_text())["protocol"]["perplexity"]


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_with_a_bos_count_every_token_once(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    windows = windows_over(torch.arange(100, 100 + tokens), length, stride, BOS)
    counted = [token for window in windows for token in window.token_ids[window.first :].tolist()]
    assert counted == list(range(100, 100 + tokens))
    assert all(begins_with_the_only_bos(window.token_ids) and len(window.token_ids) <= length for window in windows)


def test_the_first_token_of_a_text_is_predicted_from_the_bos() -> None:
    model: Any = tiny.build("llama-mha")
    stream = torch.randint(4, tiny.VOCAB, (5,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([BOS]), stream])[None]).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, stream).exp().item()
    found = quality_over({"dense": model}, windows_over(stream, 16, 16, BOS))["dense"].perplexity
    assert found == pytest.approx(expected, rel=1e-5)


def instruct(*tokens: str, end: str) -> PreTrainedTokenizerFast:
    """A tokenizer of an instruct model: it knows these tokens, and the last of a turn is its own end token."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens), "eos_token": end})  # type: ignore[arg-type]
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (tiny.tokenizer(), "</s>"),
        (instruct("<|endoftext|>", "<|im_end|>", end="<|im_end|>"), "<|endoftext|>"),  # Qwen 2.5, SmolLM2
        (instruct("<|end_of_text|>", "<|eot_id|>", end="<|eot_id|>"), "<|end_of_text|>"),  # Llama 3.1
        (instruct("<|endoftext|>", "<eos>", end="<eos>"), "<eos>"),
    ],
)
def test_documents_end_as_they_did_in_pre_training(tokenizer: PreTrainedTokenizerFast, expected: str) -> None:
    assert end_of_text(tokenizer) == tokenizer.convert_tokens_to_ids(expected)


@given(st.integers(0, 60), st.integers(2, 9), st.booleans())
def test_sequences_hold_the_stream_in_its_order(tokens: int, length: int, adds_bos: bool) -> None:
    stream = list(range(100, 100 + tokens))
    found = as_sequences(stream, length, TOKENIZERS[adds_bos])
    assert found.shape[1] == length
    body = found[:, 1:] if adds_bos else found
    assert body.flatten().tolist() == stream[: body.numel()]
    assert len(stream) - body.numel() < body.shape[1]
    assert not adds_bos or (found[:, 0] == BOS).all()


TOKENIZERS = {adds_bos: tiny.tokenizer(adds_bos) for adds_bos in (False, True)}


@given(st.integers(1, 6), st.integers(2, 9), st.sets(st.integers(0, 60), max_size=5), st.booleans())
def test_pieces_end_after_each_number_of_tokens(count: int, length: int, ends: set[int], has_bos: bool) -> None:
    sequences = torch.arange(100, 100 + count * length).view(count, length)
    if has_bos:
        sequences[:, 0] = BOS
    pieces = cut(sequences, ends, BOS if has_bos else None)
    reached = torch.tensor([piece.numel() for piece in pieces]).cumsum(0).tolist()
    assert set(reached) == {end for end in ends if 0 < end <= sequences.numel()} | {
        length * number for number in range(1, count + 1)
    }
    together = torch.cat([piece.flatten() for piece in pieces])
    if not has_bos:
        assert torch.equal(together, sequences.flatten())
        return
    assert all(begins_with_the_only_bos(piece[0]) for piece in pieces)
    changed = together != sequences.flatten()
    assert changed.sum() <= len(ends)
