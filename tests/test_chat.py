"""Chats as data sets hold them, rendered by models' templates, with the tokens that an assistant wrote."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import chats
from darwinlm.data.chat import Chat, chat_of, prompt_text, render
from darwinlm.data.corpus import is_held_out, read_corpus
from darwinlm.data.documents import read_documents
from darwinlm.data.packing import as_counts, as_sequences, one_stream
from darwinlm.types import UsageError
from refusals import told

TURNS = chats.messages("One?", "Two, three.", "Four?", "Five\nsix. ")
CALL = {"name": "look_up", "arguments": {"city": "Rome", "days": 2}}
WITH_TOOLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "Rain"},
    {"role": "assistant", "content": "It rains."},
]


def written(ids: list[int], marks: list[bool], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the marked tokens say, run by run."""
    runs = groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1])
    return [str(tokenizer.decode([token for token, _ in run])) for marked, run in runs if marked]


@pytest.mark.parametrize("template", [chats.CHATML, chats.MARKED, chats.THINKING])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_mask_is_of_what_the_assistant_wrote_and_of_the_end_of_its_turn(template: str, adds_bos: bool) -> None:
    tokenizer = chats.tokenizer(template, adds_bos)
    ids, assistant = render(Chat.of(TURNS), tokenizer)
    encoded: Any = tokenizer.apply_chat_template(TURNS)
    assert ids == encoded["input_ids"]
    last = "<think>\n\n</think>\n\nFive\nsix. <|im_end|>" if template == chats.THINKING else "Five\nsix. <|im_end|>"
    assert written(ids, assistant, tokenizer) == ["Two, three.<|im_end|>", last]


def test_without_tokens_of_their_own_marks_of_turns_count_likewise() -> None:
    tokenizer = chats.tokenizer(marks=False)
    ids, assistant = render(Chat.of(TURNS), tokenizer)
    assert written(ids, assistant, tokenizer) == ["Two, three.<|im_end|>", "Five\nsix. <|im_end|>"]


def test_tool_calls_are_written_by_the_assistant_and_results_are_not() -> None:
    tokenizer = chats.tokenizer(chats.DATED)
    as_text = [*WITH_TOOLS]
    as_text[1] = as_text[1] | {
        "tool_calls": [{"id": "1", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}]
    }
    for turns in (WITH_TOOLS, as_text):
        chat = chat_of(
            {"messages": turns, "tools": json.dumps([{"type": "function", "function": {"name": "look_up"}}])}, "it"
        )
        assert chat is not None
        ids, assistant = render(chat, tokenizer)
        call = '{"name": "look_up", "arguments": {"city": "Rome", "days": 2}}<|im_end|>'
        assert written(ids, assistant, tokenizer) == [call, "It rains.<|im_end|>"]
        assert '"type": "function"' in tokenizer.decode(ids)
    with pytest.raises(UsageError, match="it: the model's chat template does not write the call of look_up"):
        render(chat, chats.tokenizer(chats.CHATML))


def test_the_date_of_today_is_always_the_same() -> None:
    text = prompt_text(Chat.of(TURNS[:1]), chats.tokenizer(chats.DATED))
    assert text == "<s>Today: 26 Jul 2024[user]One?<|im_end|>[assistant]"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"messages": [{**turn, "name": None, "tool_calls": None} for turn in TURNS], "text": None},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS
            ]
        },
        {"conversations": [{"from": "system", "value": ""}, *TURNS]},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]},
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
    ],
)
def test_all_forms_of_a_chat_are_one(record: dict[str, Any]) -> None:
    assert chat_of(record, "it") == Chat.of(TURNS)


def test_a_prompt_and_its_completion_are_two_turns() -> None:
    assert chat_of({"prompt": "One?", "completion": "Two, three."}, "it") == Chat.of(TURNS[:2])
    assert chat_of({"prompt": "One?"}, "it") is None


BROKEN = {
    "has an empty turn, number 2 (assistant): expected text": chats.messages("One?", " "),
    "has user after user in turn 2: expected assistant": [TURNS[0], TURNS[0]],
    "has assistant at the beginning in turn 1: expected system or developer or user": TURNS[1:],
    "has assistant after assistant in turn 3: expected user or tool": [*TURNS[:2], TURNS[1]],
    "has the role 'critic' in turn 1: expected one of system, developer, user, assistant, tool": [
        {"role": "critic", "content": "x"}
    ],
    "has a part that is no text in turn 1": [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
    "has no message as turn 1": ["One?"],
    "has no turns": [],
}


@pytest.mark.parametrize("reason", BROKEN)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_broken_chats_are_left_out_by_the_number_of_their_row(
    reason: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".parquet" and reason == "has no message as turn 1":
        pytest.skip("a column has one type")
    good, bad = {"messages": TURNS}, {"messages": BROKEN[reason]}
    rows = [good, bad, bad] if reason != "has a part that is no text in turn 1" else [bad, bad]
    path = _write(tmp_path / f"chats{suffix}", rows)
    place = f"line 2 of {path}" if suffix == ".jsonl" else f"row 2 of {path}"
    if len(rows) == 3:
        assert list(read_documents(str(path))) == [Chat.of(TURNS)]
        (said,) = told(capsys.readouterr().err)
        kind = "lines" if suffix == ".jsonl" else "rows"
        assert said.startswith(f"{path}: 2 of 3 {kind} are left out, the first for this: {place}: it {reason}")
    path = _write(path, [bad])
    with pytest.raises(UsageError) as refused:
        list(read_documents(str(path)))
    assert reason in str(refused.value)
    assert f"{place.split()[0]} 1 of {path}" in str(refused.value)
    assert "\n" not in str(refused.value)


def _write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        return chats.write(path, *rows)
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), path)
    return path


def test_what_cannot_be_rendered_is_named_by_its_row(tmp_path: Path) -> None:
    with_system = [{"role": "system", "content": "Be brief."}, *TURNS]
    path = chats.write(tmp_path / "chats.jsonl", {"messages": TURNS}, {"messages": with_system})
    with pytest.raises(UsageError, match=r"line 1 of .*chats.jsonl is a chat, and the model's tokenizer has no chat t"):
        one_stream(read_documents(str(path)), chats.tokenizer(None), 1000)
    with pytest.raises(UsageError, match=r"line 2 of .*: the model's chat template does not take it \(System role not"):
        one_stream(read_documents(str(path)), chats.tokenizer(chats.REFUSING), 1000)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_packed_predictions_count_where_the_next_token_is_the_assistants(adds_bos: bool) -> None:
    """By an independent walk: each token of the stream is predicted once, after the token or the BOS before it."""
    tokenizer = chats.tokenizer(chats.DATED.replace("Today", "T"), adds_bos)
    documents = [Chat.of(TURNS), "plain text of no chat", Chat.of(TURNS[:2])]
    stream = one_stream(documents, tokenizer, 1000)
    expected_ids: list[int] = []
    expected: list[bool] = []
    for document in documents:
        if isinstance(document, Chat):
            ids, marks = render(document, tokenizer)
            first = int(adds_bos)  # within the stream, only sequences begin with a BOS
            expected_ids += [*ids[first:], 2]
            expected += [*marks[first:], False]
        else:
            ids = tokenizer(document, add_special_tokens=False)["input_ids"]
            expected_ids += [*ids, 2]
            expected += [True] * (len(ids) + 1)
    assert stream.ids == expected_ids
    length = 9
    sequences, counts = as_sequences(stream.ids, length, tokenizer), as_counts(stream, length, tokenizer)
    assert sequences.shape == counts.shape
    text = length - adds_bos
    for row in range(len(sequences)):
        for column in range(length):
            token = row * text + column + 1 - adds_bos  # in the stream, which is predicted here
            assert counts[row, column] == expected[min(token, len(expected) - 1)]


def test_a_question_and_all_its_answers_are_on_one_side() -> None:
    openings = [Chat.of(chats.messages(f"Question {number}?", "An answer")) for number in range(100)]
    for chat in openings:
        other = Chat.of([*chat.opening.messages, {"role": "assistant", "content": "Another"}])
        assert is_held_out(chat) == is_held_out(other) == is_held_out(chat.opening)
    assert 2 < sum(map(is_held_out, openings)) < 25


def test_the_fingerprint_has_what_renders_chats(tmp_path: Path) -> None:
    path = str(chats.write(tmp_path / "chats.jsonl", {"messages": TURNS}))
    plain = str(chats.write(tmp_path / "plain.jsonl", {"text": "One"}))

    def fingerprint(file: str, template: str, loss_tokens: Any) -> str:
        return read_corpus(file, chats.tokenizer(template), 8, 0, loss_tokens).fingerprint

    settings = [(chats.CHATML, "assistant"), (chats.MARKED, "assistant"), (chats.CHATML, "all")]
    assert len({fingerprint(path, *each) for each in settings}) == 3
    assert len({fingerprint(plain, *each) for each in settings}) == 1


def test_mixtures_count_answers_of_chats_and_all_of_text(tmp_path: Path) -> None:
    asked = chats.write(tmp_path / "chats.jsonl", *({"messages": turns} for turns in chats.conversations()))
    text = chats.write(tmp_path / "plain.jsonl", *({"text": text} for text in chats.tiny.documents()))
    tokenizer = chats.tokenizer()
    ids, counts = read_corpus(f"{asked},{text}", tokenizer, 64, 0).draw_counted(calibration=64 * 20)["calibration"]
    assert counts is not None
    assert ids.shape == counts.shape == (20, 64)
    assert counts[1::2].all()
    assert 0.2 < counts[::2].float().mean() < 0.95
    asked_for = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert not counts[:, :-1][ids[:, 1:] == asked_for].any()
    everything = read_corpus(f"{asked},{text}", tokenizer, 64, 0, "all").draw_counted(calibration=64 * 20)[
        "calibration"
    ]
    assert everything.counts is None
    assert torch.equal(everything.ids, ids)


def test_chats_without_answers_are_refused_where_answers_count(tmp_path: Path) -> None:
    path = str(chats.write(tmp_path / "asked.jsonl", *({"messages": chats.messages(f"{n}?")} for n in range(90))))
    with pytest.raises(UsageError, match="no token of calibration counts: expected answers of an assistant"):
        read_corpus(path, chats.tokenizer(), 16, 0).draw(calibration=64)
    read_corpus(path, chats.tokenizer(), 16, 0, "all").draw(calibration=64)
