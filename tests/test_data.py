"""Text in, disjoint token blocks out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import tiny
from darwinlm.data import documents as of_sources
from darwinlm.data.corpus import HELD_OUT_SHARE, Corpus, is_held_out, read_corpus, stream_beside
from darwinlm.data.packing import scramble
from darwinlm.types import UsageError


class Numbered(PreTrainedTokenizerBase):
    """Tokenizes the document `"7 20"` as twenty times the token 7: a token says which document it is from."""

    bos_token_id = None
    eos_token_id = None

    def __init__(self) -> None:
        pass

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, text: Any = None, *_: Any, **__: Any) -> Any:
        return {"input_ids": [[int(number)] * int(length) for number, length in (d.split() for d in text)]}


def _corpus(weights: Sequence[float], seed: int = 0, documents: int = 200, length: int = 8) -> Corpus:
    """Sources whose documents are numbered apart: source `s` holds the numbers from `1000 s`."""
    sources = tuple(
        (f"source-{s}", tuple(f"{1000 * s + n} {length}" for n in range(documents)), weight)
        for s, weight in enumerate(weights)
    )
    return Corpus(sources, Numbered(), length, seed)


WEIGHTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=3)


@given(weights=WEIGHTS, seed=st.integers(0, 10**6), calibration=st.integers(1, 200), search=st.integers(0, 200))
@settings(deadline=None, max_examples=50)
def test_no_document_is_used_for_two_purposes(weights: list[float], seed: int, calibration: int, search: int):
    corpus = _corpus(weights, seed)
    drawn = corpus.draw(calibration=calibration, search=search, training=33)
    drawn["evaluation"] = corpus.draw_held_out(24)
    documents = {purpose: set(blocks.flatten().tolist()) for purpose, blocks in drawn.items()}
    assert sum(map(len, documents.values())) == len(set.union(*documents.values()))
    # As long as a block is a document, each is in one block at most.
    assert all(len(found) == len(drawn[purpose]) for purpose, found in documents.items())
    texts = {int(text.split()[0]): text for _, source, _ in corpus.sources for text in source}
    for purpose, found in documents.items():
        assert all(is_held_out(texts[number]) == (purpose == "evaluation") for number in found)


@given(weights=WEIGHTS, seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_held_out_blocks_are_the_same_for_every_seed(weights: list[float], seed: int):
    assert torch.equal(_corpus(weights, seed).draw_held_out(40), _corpus(weights, 0).draw_held_out(40))


def test_the_same_seed_draws_the_same_and_another_draws_another():
    first, same, other = (_corpus([1.0], seed).draw(calibration=400)["calibration"] for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@given(weights=WEIGHTS, seed=st.integers(0, 99), search=st.integers(0, 300), training=st.integers(0, 300))
@settings(deadline=None, max_examples=25)
def test_what_comes_later_does_not_change_what_came_before(weights: list[float], seed: int, search: int, training: int):
    corpus = _corpus(weights, seed)
    alone = corpus.draw(calibration=100, search=search)
    more = corpus.draw(calibration=100, search=search, training=training)
    assert torch.equal(alone["calibration"], corpus.draw(calibration=100)["calibration"])
    assert torch.equal(alone["calibration"], more["calibration"])
    assert torch.equal(alone["search"], more["search"])


@given(length=st.integers(1, 40), share=st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_only_the_end_of_a_scrambled_block_changes_its_order(length: int, share: float):
    blocks = torch.arange(3 * length).view(3, length)
    found, kept = scramble(blocks, share), max(1, length - round(share * length))
    assert torch.equal(found[:, :kept], blocks[:, :kept])
    assert torch.equal(found.sort().values, blocks)
    assert torch.equal(found, scramble(blocks, share))
    assert torch.equal(blocks.flatten(), torch.arange(3 * length))  # it works on a copy
    if length - kept > 12:
        assert all((row != block).sum() > 1 for row, block in zip(found, blocks, strict=True))
        orders = [row - block[0] for row, block in zip(found, blocks, strict=True)]
        assert not torch.equal(orders[0], orders[1])


def test_weights_are_heeded_in_every_prefix():
    blocks = _corpus([3.0, 1.0]).draw(calibration=8 * 80)["calibration"]
    second = (blocks[:, 0] >= 1000).long()
    assert second.sum() == 20
    expected = torch.arange(1, 81) / 4
    assert (second.cumsum(0) - expected).abs().max() <= 1


def test_counts_are_rounded_up_to_whole_sequences():
    drawn = _corpus([1.0]).draw(calibration=17, search=8, training=0)
    assert {purpose: tuple(blocks.shape) for purpose, blocks in drawn.items()} == {
        "calibration": (3, 8),
        "search": (1, 8),
        "training": (0, 8),
    }


def test_documents_are_joined_with_an_end_of_text_token():
    tokenizer = tiny.tokenizer()
    corpus = Corpus((("a", ("one", "two", "three", "four"), 1.0),), tokenizer, 2, 0)
    drawn = {d for d in ("one", "two", "three", "four") if not is_held_out(d)}
    ids = {d: tokenizer(d, add_special_tokens=False)["input_ids"] for d in drawn}
    stream = corpus.draw(calibration=2 * (sum(len(i) + 1 for i in ids.values()) // 2))["calibration"].flatten().tolist()
    pieces = " ".join(map(str, stream)).split(f" {tokenizer.eos_token_id}")[:-1]
    assert [int(x) for x in pieces[0].split()] in ids.values()


def test_about_a_tenth_is_held_out_and_by_the_text_alone():
    held_out = [is_held_out(f"document {n}") for n in range(20_000)]
    assert sum(held_out) / len(held_out) == pytest.approx(HELD_OUT_SHARE, abs=0.01)


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(
        UsageError,
        match=r"too little text in source-0 for calibration 8,000 \(--calibration.tokens\): expected 8,000 .* found 1,",
    ):
        _corpus([1.0]).draw(calibration=8000)
    with pytest.raises(UsageError, match="too little text in source-0 for evaluation"):
        _corpus([1.0], documents=3).draw_held_out(800)


def _documents(data: str) -> list[tuple[str, ...]]:
    return [documents for _, documents, _ in read_corpus(data, tiny.tokenizer(), 8, 0).sources]


def test_jsonl_keeps_line_separators_inside_a_text(tmp_path: Path):
    texts = ["one", "two\u2028three", "four\nfive"]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    assert _documents(str(path)) == [tuple(texts)]


@pytest.mark.parametrize("column", ["text", "content"])
def test_parquet(column: str, tmp_path: Path):
    from pyarrow import parquet, table

    parquet.write_table(table({"id": [1, 2, 3], column: ["one", "two", " "]}), tmp_path / "x.parquet")
    assert _documents(str(tmp_path / "x.parquet")) == [("one", "two")]
    parquet.write_table(table({"words": ["one"]}), tmp_path / "y.parquet")
    with pytest.raises(UsageError, match=r"y\.parquet has no text: expected a column text"):
        _documents(str(tmp_path / "y.parquet"))


def test_txt_is_cut_between_paragraphs(tmp_path: Path):
    paragraphs = [f"{n} " + "word " * 150 for n in range(10)]
    (tmp_path / "x.txt").write_text("\n\n".join(paragraphs))
    (documents,) = _documents(str(tmp_path / "x.txt"))
    assert len(documents) > 1
    assert all(len(document) >= 2000 for document in documents[:-1])
    assert "\n\n".join(documents) == "\n\n".join(p.strip() for p in paragraphs)


def test_mixtures_and_their_weights(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "c.txt").write_text("text of c")
    a, b, c = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "lr=1" / "c.txt"
    corpus = read_corpus(f"{a}=3, {b}=0.5,{c}", tiny.tokenizer(), 8, 0)
    assert [(name, weight) for name, _, weight in corpus.sources] == [(str(a), 3.0), (str(b), 0.5), (str(c), 1.0)]


def test_a_document_counts_once(tmp_path: Path):
    """Or its copies could be drawn for two purposes."""
    for name, texts in (("a", ["one", "two", "one"]), ("b", ["two", "three"]), ("c", ["three"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    assert _documents(f"{a},{b}") == [("one", "two"), ("three",)]
    with pytest.raises(UsageError, match="in the sources before it"):
        _documents(f"{b},{c}")


def test_the_fingerprint_changes_with_text_and_weights(tmp_path: Path):
    def fingerprint(text: str, weight: str) -> str:
        (tmp_path / "x.txt").write_text(text)
        return read_corpus(f"{tmp_path / 'x.txt'}={weight}", tiny.tokenizer(), 8, 0).fingerprint

    assert fingerprint("one", "1") == fingerprint("one", "1.0")
    assert len({fingerprint(text, weight) for text in ("one", "two") for weight in ("1", "2")}) == 4


@pytest.mark.parametrize("name", ["wikitext2", "some/dataset", "corpus.md"])
def test_without_network_a_hub_corpus_is_refused_in_one_sentence(name: str):
    with pytest.raises(UsageError, match=rf"no corpus {name}: expected .*vital-wiki.*check --data") as refused:
        _documents(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "part"), [("wikitext2", "wikitext2-test"), ("c4", "c4-validation")])
def test_texts_of_the_literature_are_their_own_test_text_joined_by_blank_lines(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(asked: str, flag: str) -> Iterator[str]:
        assert (asked, flag) == (part, "--data")
        return iter(["alpha", "", "beta"])

    monkeypatch.setattr(of_sources, "_read_hub", read)
    tokenizer = tiny.tokenizer()
    found = stream_beside(name, tokenizer, 100, lambda _: pytest.fail("all of it counts"))
    assert found.ids == tokenizer("alpha\n\n\n\nbeta")["input_ids"]
