"""`evaluation.texts`: further texts that a run's models are judged on, and that no stage of it learns from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import runs
import tiny
from darwinlm.commands import compress
from darwinlm.config.run import EvaluationConfig, RunConfig
from darwinlm.data.corpus import is_held_out, read_corpus
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.types import UsageError
from refusals import as_if_nothing_had_happened, refused


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(Path(__file__).read_text())
    return path


@pytest.fixture
def config(checkpoints: dict[str, Path], text: Path, other: Path, tmp_path: Path) -> RunConfig:
    evaluation = replace(runs.SHORT.evaluation, texts=(str(other),))
    return runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", evaluation=evaluation)


def test_blocks_begin_where_the_text_does_and_leave_out_what_the_corpus_uses(text: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    corpus = read_corpus(str(text), tokenizer, 8, 0)
    documents = tiny.few_documents(12)
    used = [document for document in documents if not is_held_out(document)]
    assert len(used) == 11
    mixed = tmp_path / "mixed.jsonl"
    own = ["The first of its own.", *documents, "And the last."]
    mixed.write_text("".join(json.dumps({"text": document}) + "\n" for document in own))
    expected = "".join(f"{document}</s>" for document in own if document not in used)
    tokens = len(tokenizer(expected, add_special_tokens=False)["input_ids"]) // 8 * 8
    blocks = corpus.draw_beside(str(mixed), tokens)
    assert blocks.shape == (tokens // 8, 8)
    assert expected.startswith(str(tokenizer.decode(blocks.flatten())))
    assert len(corpus.draw_beside(str(mixed), 9)) == 2  # whole sequences
    with pytest.raises(UsageError, match=r"too little text in .*mixed\.jsonl: expected 80,000 tokens .* found "):
        corpus.draw_beside(str(mixed), 80_000)
    with pytest.raises(UsageError, match=r"--evaluation\.texts: expected texts without weights"):
        corpus.draw_beside("wikitext2=2", 8)


@pytest.mark.slow
def test_table_report_card_and_screen_have_them(
    config: RunConfig, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compress.run(config)
    checkpoint = Checkpoint(Path(config.model))
    corpus = read_corpus(config.data, checkpoint.tokenizer, config.calibration.sequence_length, config.seed)
    models = {"dense": load(config.model), "searched": run.model}
    expected = perplexity_and_kl(models, corpus.draw_beside(str(other), config.evaluation.tokens))
    rows = {row["model"]: row for row in run.table}
    for name, quality in expected.items():
        found = rows[name]["texts"][str(other)]
        assert found["perplexity"] == pytest.approx(quality.perplexity)
        assert found["kl"] == pytest.approx(quality.kl, abs=1e-6)
    assert rows["searched"]["texts"][str(other)]["kl"] != pytest.approx(rows["searched"]["kl"], rel=1e-3)
    screen = capsys.readouterr().out
    figures = [f"{rows['searched']['texts'][str(other)][measure]:{form}}" for measure, form in COLUMNS]
    for shown in (run.report_path.read_text(), (run.exported / "README.md").read_text(), screen):
        assert shown.count("other.txt") >= 2
        (line,) = (line for line in shown.splitlines() if "searched" in line and figures[0] in line)
        assert figures[1] in line

    other.write_text(f"Another beginning.\n\n{other.read_text()}")
    run.report_path.unlink()
    with pytest.raises(UsageError, match="a database made from another evaluation text"):
        compress.run(config)


COLUMNS = (("perplexity", ".2f"), ("kl", ".4f"))


def test_texts_that_cannot_be_used(
    config: RunConfig, other: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other.write_text("Three words only.")
    refused(config, capsys, 2, "--evaluation.texts: too little text in", "lower --evaluation.tokens")
    as_if_nothing_had_happened(config)
    other.unlink()
    refused(config, capsys, 2, str(other), "check --evaluation.texts")
    as_if_nothing_had_happened(config)
    for texts in (("a.txt", "a.txt"), ("",)):
        with pytest.raises(UsageError, match=r"--evaluation\.texts: expected texts by name, each once"):
            EvaluationConfig(texts=texts)
