"""Training text at scale: shards with scores are filtered and packed once, whichever process does it."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset

import tiny
from darwinlm.config.training import StreamConfig
from darwinlm.data import stream
from darwinlm.data.corpus import is_held_out
from darwinlm.data.stream import FIRST_PART, Sequences, TokenStore, draw_held_out, draw_sequences
from darwinlm.runtime import parallel
from darwinlm.types import DarwinError, UsageError

SCORED = StreamConfig(sequence_length=32, score_column="language_score", min_score=0.9)
SHARDS, DOCUMENTS = 5, 120


def records(shard: int) -> list[dict[str, object]]:
    rng = random.Random(shard)
    words = " ".join(tiny.documents()).split()
    return [
        {
            "text": " ".join(rng.choices(words, k=rng.randint(10, 80))),
            "url": "http://example.org",
            "language_score": rng.choice([0.5, 0.89, 0.9, 0.97, None]),
        }
        for _ in range(DOCUMENTS)
    ]


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of shards with the columns of FineWeb-Edu that matter here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp(request.param)
    for shard in range(SHARDS):
        file = path / f"{shard:03d}.{request.param}"
        if request.param == "parquet":
            pq.write_table(pa.Table.from_pylist(records(shard)), file, row_group_size=50)
        else:
            file.write_text("".join(f"{json.dumps(record)}\n" for record in records(shard)))
    return path


def draw(shards: Path | str, count: int, cache: Path, seed: int = 0, config: StreamConfig = SCORED) -> Sequences:
    return draw_sequences(str(shards), count, tiny.tokenizer(), config, cache, seed)


def rows(sequences: Sequences) -> list[tuple[int, ...]]:
    return [tuple(sequences[i]["input_ids"].tolist()) for i in range(len(sequences))]


def test_only_documents_of_the_score_are_there_and_none_that_is_held_out(shards: Path, tmp_path: Path):
    """Each whole document between two end-of-text tokens passes the filter, and many documents are whole."""
    every = [record for shard in range(SHARDS) for record in records(shard)]
    good = {str(r["text"]) for r in every if isinstance(r["language_score"], float) and r["language_score"] >= 0.9}
    tokenizer = tiny.tokenizer()
    for held_out, drawn in (
        (False, draw(shards, 1200, tmp_path)),
        (True, draw_held_out(str(shards), 100, tokenizer, SCORED, tmp_path)),
    ):
        expected = {text for text in good if is_held_out(text) == held_out}
        store, *_ = drawn.stores
        packed: set[str] = set()
        for lane, part in {(lane, part) for _, lane, part, _ in drawn.places.tolist()}:
            count = sum((lane, part) == tuple(place[1:3]) for place in drawn.places.tolist())
            stream = torch.cat([store.read(lane, part, row) for row in range(count)]).tolist()
            text = tokenizer.decode(stream)
            packed |= set(str(text).split("</s>")[1:-1])
        assert packed <= expected
        assert len(packed) > 0.25 * len(expected)


def test_what_is_drawn_depends_on_neither_processes_nor_what_was_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One process, three that share the lanes, and a draw after a smaller one give the same sequences."""
    expected = draw(shards, 300, tmp_path / "one")
    draw(shards, 7, tmp_path / "grown")
    grown = draw(shards, 300, tmp_path / "grown")
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "processes", lambda: 3)
        patch.setattr(parallel, "wait_for_all", lambda: None)
        for rank in (2, 1, 0, 2, 1, 0):  # each round sees what the others have written
            patch.setattr(parallel, "rank", lambda rank=rank: rank)
            patch.setattr(parallel, "first", lambda rank=rank: rank == 0)
            store = TokenStore.open(tmp_path / "three", str(shards), tiny.tokenizer(), SCORED)
            quota = -(-300 // SHARDS)
            for lane in range(rank, SHARDS, 3):
                store._extend(lane, quota)
    three = draw(shards, 300, tmp_path / "three")
    assert rows(expected) == rows(grown) == rows(three)
    assert expected.fingerprint == grown.fingerprint == three.fingerprint


def test_the_seed_decides_the_order_alone(shards: Path, tmp_path: Path):
    first, second, again = (draw(shards, 100, tmp_path, seed) for seed in (0, 1, 0))
    assert rows(first) == rows(again) != rows(second)
    assert Counter(rows(first)) == Counter(rows(second))
    places = first.places[:, 1].tolist()
    assert places != sorted(places)


def test_what_is_there_is_not_tokenised_again(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = rows(draw(shards, 100, tmp_path))
    monkeypatch.setattr(stream, "_pack", None)
    assert rows(draw(shards, 100, tmp_path)) == expected
    with pytest.raises(TypeError):
        draw(shards, 300, tmp_path)


def test_an_interrupted_filling_goes_on_from_its_last_part(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A killed process leaves whole parts, a partial one and one without a record. Lanes here have several parts."""
    monkeypatch.setattr(stream, "FIRST_PART", 4)
    monkeypatch.setattr(stream, "LARGEST_PART", 8)
    expected = draw(shards, 1000, tmp_path / "whole")
    store = tmp_path / "killed" / expected.stores[0].path.name
    shutil.copytree(expected.stores[0].path, store)
    lane = store / "lane-01"
    assert len(list(lane.glob("*.json"))) > 3
    for file in sorted(lane.iterdir()):
        if int(file.name[:5]) >= 2:
            file.unlink()
    (lane / "00001.json").unlink()
    (lane / "00002.partial").write_bytes(b"half a file")
    kept = (lane / "00000.safetensors").stat().st_mtime_ns
    assert rows(draw(shards, 1000, tmp_path / "killed")) == rows(expected)
    assert (lane / "00000.safetensors").stat().st_mtime_ns == kept
    assert not list(store.rglob("*.partial"))


def test_damaged_tokens_are_made_again_once_they_are_deleted(shards: Path, tmp_path: Path):
    drawn = draw(shards, 100, tmp_path)
    expected = rows(drawn)
    for file in drawn.stores[0].path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DarwinError, match=r"00000\.safetensors is damaged .*; delete .*lane-\d\d and run") as refused:
        rows(draw(shards, 100, tmp_path))
    for lane in drawn.stores[0].path.glob("lane-*"):
        assert lane.name[:5] in str(refused.value)
        shutil.rmtree(lane)
    assert rows(draw(shards, 100, tmp_path)) == expected


def test_a_pattern_names_files_and_a_mixture_keeps_its_weights(shards: Path, text: Path, tmp_path: Path):
    suffix = next(shards.iterdir()).suffix
    plain = StreamConfig(sequence_length=32)
    mixed = draw(f"{shards}/00[01]{suffix}".replace("[01]", "*") + f"=3,{text}=1", 80, tmp_path, config=plain)
    assert len(mixed) == 80
    assert Counter(mixed.places[:, 0].tolist()) == {0: 60, 1: 20}


@pytest.mark.parametrize(
    ("change", "count", "sentence"),
    [
        ({"score_column": "rating"}, 10, "has no column rating, it has text, url, language_score"),
        (
            {"min_score": 0.99},
            10,
            r"expected 320 tokens \(sequences of 32\), found 0 .* language_score is at least 0.99",
        ),
        ({}, 10**6, "too little text .* expected 32,000,000 tokens .* beside the tenth that is held out"),
    ],
)
def test_too_little_text_is_one_sentence(
    shards: Path, change: dict[str, object], count: int, sentence: str, tmp_path: Path
):
    with pytest.raises(UsageError, match=sentence):
        draw(shards, count, tmp_path, config=replace(SCORED, **change))  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("{no json\n")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "bad.jsonl", tmp_path / "empty", tmp_path / "*.parquet", tmp_path / "none.parquet"):
        with pytest.raises(UsageError, match=r"no text|found 0"):
            draw(source, 1, tmp_path / "cache")


def test_bad_lines_are_left_out_and_counted_in_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where datasets goes on within a file, too, and in a last part that has nothing else."""
    texts = (str(record["text"]) for record in records(0) + records(1) + records(2))
    good = [f"{json.dumps({'text': text})}\n".encode() for text in texts if not is_held_out(text)][: 3 * FIRST_PART]
    assert len(good) == 3 * FIRST_PART, "which are two parts"
    bad = (b'{"text": "\xff"}\n', b"{no json\n", b'{"text": "\\ud800"}\r\n', b'{"words": "a"}\n')
    clean, mixed = tmp_path / "clean.jsonl", tmp_path / "mixed.jsonl"
    clean.write_bytes(b"".join(good))
    mixed.write_bytes(b"".join([bad[0], *good[:70], bad[1], *good[70:], *bad[2:]]))
    config = StreamConfig(sequence_length=32)
    stores = [TokenStore.open(tmp_path, str(file), tiny.tokenizer(), config) for file in (clean, mixed)]
    rows = []
    for store in stores:
        with pytest.raises(UsageError, match="too little text"):
            store.fill(10**6)
        rows.append([store.read(*place).tolist() for place in store.fill(50)])
    assert rows[0] == rows[1]
    said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert [line.partition(" lines")[0] for line in said] == ["1 of 65", "1 of 129", "2 of 2"]
    numbers = 1, 72, 3 * FIRST_PART + 3
    assert all(f"line {number} of {mixed}: it " in line for number, line in zip(numbers, said, strict=True))


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_skipped_is_what_a_shorter_draw_has(shards: Path, text: Path, tmp_path: Path, mixed: bool):
    """Consecutive stages of a recipe therefore see no sequence twice."""
    plain = StreamConfig(sequence_length=32)
    data = f"{shards}/*{next(shards.iterdir()).suffix}=3,{text}=1" if mixed else str(shards)
    stages, start = [], 0
    for count in (13, 40, 22):
        drawn = draw_sequences(data, count, tiny.tokenizer(), plain, tmp_path, seed=0, skip=start)
        stages.append(Counter(map(tuple, drawn.places.tolist())))
        start += count
    together = draw_sequences(data, start, tiny.tokenizer(), plain, tmp_path, seed=0)
    assert sum(stages, Counter()) == Counter(map(tuple, together.places.tolist()))
    assert max(sum(stages, Counter()).values()) == 1


def test_scores_that_are_no_numbers(tmp_path: Path):
    words = tiny.documents()

    def write(*scores: object) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        lines = [{"text": words[i % len(words)], "language_score": score} for i, score in enumerate(scores)]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return path

    good = write(*[0.95] * 40)
    assert len(draw(good, 1, tmp_path / "cache")) == 1
    with pytest.raises(UsageError, match="found 0 beside"):
        draw(write(*[float("nan")] * 40), 1, tmp_path / "cache")
    with pytest.raises(UsageError, match=r"expected numbers in language_score of .* found 'high'"):
        draw(write(*["high"] * 40), 1, tmp_path / "cache")


def test_empty_shards_and_texts_that_are_null_are_passed_over(shards: Path, tmp_path: Path):
    suffix, mixed = next(shards.iterdir()).suffix, tmp_path / "mixed"
    shutil.copytree(shards, mixed)
    (mixed / f"empty{suffix}").touch()
    if suffix == ".jsonl":
        with (mixed / "000.jsonl").open("a") as file:
            file.write(json.dumps({"text": None, "url": "", "language_score": 0.95}) + "\n")
    assert rows(draw(mixed, 100, tmp_path / "one")) == rows(draw(shards, 100, tmp_path / "two"))


def test_after_too_much_was_asked_what_is_there_is_enough(shards: Path, tmp_path: Path):
    expected = rows(draw(shards, 100, tmp_path / "one"))
    with pytest.raises(UsageError, match="too little text"):
        draw(shards, 10**6, tmp_path / "two")
    assert rows(draw(shards, 100, tmp_path / "two")) == expected


def test_a_source_that_is_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any of its names: the same path, another spelling of it, a link, a directory or a pattern that it is in."""
    folder = tmp_path / "shards"
    folder.mkdir()
    file = tiny.write_text(folder / "a.jsonl")
    (tmp_path / "link.jsonl").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    config = StreamConfig(sequence_length=32)
    for other in (file, "shards/a.jsonl", tmp_path / "link.jsonl", folder, f"{folder}/*.jsonl"):
        with pytest.raises(UsageError, match=f"--data: expected every text in one source, found .* in {file} and in "):
            draw(f"{file}=2,{other}=1", 4, tmp_path / "cache", config=config)
    tiny.write_text(folder / "b.jsonl")
    assert len(draw(f"{file},{folder / 'b.jsonl'}", 4, tmp_path / "cache", config=config)) == 4


def test_a_position_that_does_not_move_on_is_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with datasets 5.0.0, which gave the first documents of a source again and again."""
    monkeypatch.setattr(IterableDataset, "state_dict", lambda self: {"examples": 0})
    with pytest.raises(DarwinError, match=r"did not move on after .* documents: expected that of datasets 5\.2"):
        draw(shards, 4, tmp_path / "cache")
