"""The whole pipeline on tiny random models of every family, from Python and from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

import darwinlm
import runs
import tiny
from darwinlm.commands import compress
from darwinlm.commands.run_directory import Run
from darwinlm.config.files import read_settings
from darwinlm.config.run import CalibrationConfig, RefitConfig, RunConfig, SearchConfig, Stage
from darwinlm.data.corpus import Corpus, is_held_out, read_corpus
from darwinlm.data.draw import draw_tokens, fit_to_text
from darwinlm.data.packing import scramble
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database
from darwinlm.genome import Grid, level_grid, prunable_parameters
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes
from darwinlm.runtime.files import read_json
from darwinlm.search.fitness import Fitness
from darwinlm.training.refit import set_refitted
from darwinlm.types import DarwinError, MetricName, SelectionStage, UsageError

VERIFIED = "llama-gqa"  # its export is proved in a fresh process, which takes seconds
TABLE_KEYS = {
    "model",
    "parameters",
    "perplexity",
    "kl",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "prefill_ratio",
    "decode_ratio",
    "bytes",
    "texts",
}


QUICK = ("llama-gqa", "qwen3")  # with tied embeddings, and with norms of heads; the others take a while


@pytest.fixture(
    scope="module",
    params=[pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow) for family in tiny.FAMILIES],
)
def compressed(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A finished run of each family."""
    config = runs.short(
        checkpoints[request.param],
        text,
        tmp_path_factory.mktemp("runs") / request.param,
        verify=request.param == VERIFIED,
    )
    return darwinlm.compress(**{field.name: getattr(config, field.name) for field in fields(config)})


def _grid(run: Run) -> Grid:
    config = run.config
    return level_grid(Checkpoint(Path(config.model)).units, config.database.levels, config.database.granularity)


def test_the_result_has_model_genome_and_table(compressed: Run):
    grid = _grid(compressed)
    grid.check(compressed.genome)
    rows = {row["model"]: row for row in compressed.table}
    assert list(rows) == ["dense", "uniform", "searched"]
    assert all(set(row) == TABLE_KEYS for row in rows.values())
    assert rows["searched"]["parameters"] <= rows["uniform"]["parameters"] < rows["dense"]["parameters"]
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["searched"]["kl"] > 0
    assert sum(p.numel() for p in compressed.model.parameters()) == rows["searched"]["parameters"]
    assert rows["dense"]["parameters"] - rows["searched"]["parameters"] == prunable_parameters(
        grid, grid.dense()
    ) - prunable_parameters(grid, compressed.genome)


def test_the_export_is_the_stitched_model(compressed: Run):
    checkpoint, grid = Checkpoint(Path(compressed.config.model)), _grid(compressed)
    database = Database(compressed.database, grid, read_json(compressed.database / "database.json")["provenance"])
    dense = checkpoint.load(torch.float32, torch.device("cpu"))
    stitched = Stitcher(dense, checkpoint.family, database).stitch(compressed.genome)
    refitted = load_file(compressed.refit / "searched.safetensors")
    set_refitted(stitched, {name.removeprefix("weight."): weight for name, weight in refitted.items()})
    tokens = torch.randint(tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, dense_logits = stitched(tokens).logits, dense(tokens).logits
        torch.testing.assert_close(compressed.model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, dense_logits, atol=1e-2)
    sizes = block_sizes(grid, compressed.genome, checkpoint.config)
    assert {(size.query_heads, size.intermediate) for size in sizes} != {
        (checkpoint.config.num_attention_heads, checkpoint.config.intermediate_size)
    }


@pytest.mark.parametrize(("metric", "scrambled"), [("kl", 0.5), ("perplexity", 0.0)])
def test_candidates_are_scored_on_text_whose_ends_are_scrambled(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, metric: MetricName, scrambled: float
):
    """And, trained before, on text that is not."""
    stage = SelectionStage(1, 128, training_tokens=128)
    settings = SearchConfig(metric=metric, generations=0, scrambled=0.5, stages=(stage,), learning_rate=1e-3)
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", search=settings, dtype="float32")
    run = compress.run(config, until="search")
    checkpoint, grid = Checkpoint(Path(config.model)), _grid(run)
    drawn = draw_tokens(read_corpus(config.data, checkpoint.tokenizer, 32, config.seed), config)
    database = Database(run.database, grid, read_json(run.database / "database.json")["provenance"])
    stitcher = Stitcher(checkpoint.load(torch.float32, torch.device("cpu")), checkpoint.family, database)
    as_it_is = replace(settings, scrambled=0.0)
    scores = {
        share: Fitness(stitcher, scramble(drawn["search"], share), drawn["training"], as_it_is).score(
            run.genome, settings.stages[-1]
        )
        for share in (0.0, 0.5)
    }
    found = read_json(run.search / "result.json", "fitness")["fitness"]
    assert found == pytest.approx(scores[scrambled], rel=1e-4)
    assert scores[0.0] != pytest.approx(scores[0.5], rel=1e-3)


def test_a_command_needs_no_text_for_later_stages(checkpoints: dict[str, Path], text: Path, tmp_path: Path):
    """And what it draws, of a mixture too, is what the whole run draws."""
    documents = text.read_text().splitlines()
    halves = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for half, lines in zip(halves, (documents[::2], documents[1::2]), strict=True):
        half.write_text("\n".join(lines))
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run")
    corpus = read_corpus(f"{halves[0]}=2,{halves[1]}", tiny.tokenizer(), 32, seed=0)
    whole = draw_tokens(corpus, config)
    assert whole.keys() == {"calibration", "search", "training", "refit", "evaluation"}
    expected: dict[Stage, list[str]] = {
        "database": ["calibration"],
        "search": ["calibration", "search", "training"],
    }
    for until, purposes in expected.items():
        drawn = draw_tokens(corpus, config, until)
        assert list(drawn) == purposes
        assert all(torch.equal(drawn[purpose], whole[purpose]) for purpose in purposes)


def test_the_run_directory_holds_what_the_design_says_and_nothing_else(compressed: Run):
    found = set(runs.files(compressed.path))
    code = {name for name in found if name.startswith("model/modeling_pruned_")}
    assert len(code) <= 1
    assert found - code == {
        "run.yaml",
        "stages.json",
        "model.json",
        "table.json",
        "report.md",
        "report.html",
        "levels.png",
        "search.png",
        "search/sensitivities.json",
        "search/history.jsonl",
        "search/curves.json",
        "search/precision.json",
        "search/result.json",
        "refit/uniform.safetensors",
        "refit/searched.safetensors",
        "database/database.json",
        *(f"database/{unit.name}.safetensors" for unit in _grid(compressed).units),
        "model/README.md",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
    }


def test_the_model_card_says_what_it_is_and_how_good(compressed: Run):
    card = (compressed.exported / "README.md").read_text()
    report = compressed.report_path.read_text()
    for row in ("dense", "uniform", "searched"):
        (line,) = (line for line in report.splitlines() if line.startswith(f"| {row} |"))
        assert line in card
    for said in (Path(compressed.config.model).name, compressed.config.data, "AutoModelForCausalLM.from_pretrained"):
        assert said in card


def test_settings_survive_yaml(compressed: Run):
    config = read_settings(compressed.path / "run.yaml")
    assert config == runs.short(
        Path(config.model), Path(config.data), compressed.path, verify=compressed.path.name == VERIFIED
    )


def test_a_second_call_does_nothing_again(compressed: Run, monkeypatch: pytest.MonkeyPatch):
    before = {path: path.stat().st_mtime_ns for path in compressed.path.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(compress, "open_work", None)  # not even the model is looked at
    began = time.monotonic()
    again = compress.run(compressed.config)
    assert time.monotonic() - began < 5
    assert again.genome == compressed.genome
    after = {path: path.stat().st_mtime_ns for path in compressed.path.rglob("*") if path.name != ".lock"}
    assert after == before


def test_the_held_out_text_of_the_table_was_never_seen(compressed: Run):
    config = compressed.config
    tokenizer = Checkpoint(Path(config.model)).tokenizer
    corpus = read_corpus(config.data, tokenizer, config.calibration.sequence_length, config.seed)
    seen = corpus.draw(calibration=config.calibration.tokens, search=128, training=64)
    held_out = {tuple(block) for block in corpus.draw_held_out(config.evaluation.tokens).tolist()}
    assert not held_out & {tuple(block) for blocks in seen.values() for block in blocks.tolist()}


@pytest.fixture(scope="module")
def by_command(
    checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, subprocess.CompletedProcess[str]]:
    """A run of `python -m darwinlm compress`."""
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path_factory.mktemp("command") / "run")
    arguments, environment = runs.process(*runs.command(config))
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Run.open(config.out), done


def test_the_command_ends_with_table_continuations_and_paths(
    by_command: tuple[Run, subprocess.CompletedProcess[str]],
):
    run, done = by_command
    for word in ("dense", "uniform", "searched", "perplexity", "KL", "Hello there"):
        assert word in done.stdout
    for name in ("model", "report.md", "report.html", "table.json", "levels.png", "search.png"):
        assert str(run.path / name) in done.stdout.splitlines()


def test_the_command_shows_its_own_progress_and_no_one_elses(
    by_command: tuple[Run, subprocess.CompletedProcess[str]],
):
    _, done = by_command
    assert "database: 6/6" in done.stderr
    assert "s left" in done.stderr
    assert re.search(
        r"search: (\d)/\1, \d+ s, 0 s left, KL \d\.\d{4} of \d+ candidates, [\d.]+ s a generation\n", done.stderr
    )
    for foreign in ("Writing model shards", "Loading weights", "Warning", "Traceback", "it/s"):
        assert foreign not in done.stderr


def test_command_and_python_do_the_same(
    by_command: tuple[Run, subprocess.CompletedProcess[str]], checkpoints: dict[str, Path], text: Path, tmp_path: Path
):
    run, _ = by_command
    other = compress.run(runs.short(checkpoints["llama-gqa"], text, tmp_path / "run"))
    assert runs.history(run.path) == runs.history(other.path)
    assert (run.exported / "model.safetensors").read_bytes() == (other.exported / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_stages_alone_are_the_whole(
    by_command: tuple[Run, subprocess.CompletedProcess[str]], checkpoints: dict[str, Path], text: Path, tmp_path: Path
):
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run")
    assert runs.call(*runs.command(config, name="database")) == 0
    assert set(runs.files(tmp_path / "run")) >= {"database/database.json", "database/block-02-mlp.safetensors"}
    assert not (tmp_path / "run" / "search").exists()
    assert runs.call(*runs.command(config, name="search")) == 0
    assert (tmp_path / "run" / "search" / "result.json").exists()
    assert not (tmp_path / "run" / "model").exists()
    assert runs.call(*runs.command(config)) == 0
    assert runs.history(tmp_path / "run") == runs.history(by_command[0].path)


def test_a_given_genome_is_used_without_search_or_budget(
    by_command: tuple[Run, subprocess.CompletedProcess[str]], checkpoints: dict[str, Path], text: Path, tmp_path: Path
):
    genome = tmp_path / "genome.json"
    genome.write_text("[0, 1, 0, 2, 4, 0]")  # larger than the uniform model
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", genome=str(genome))
    run = compress.run(config)
    assert run.genome.levels == (0, 1, 0, 2, 4, 0)
    rows = {row["model"]: row["parameters"] for row in run.table}
    assert rows["uniform"] < rows["searched"] < rows["dense"]
    assert sum(p.numel() for p in run.model.parameters()) == rows["searched"]
    assert not run.history_path.exists()

    found = by_command[0]  # another run's result, whose model is then the same
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "again", genome=str(found.search / "result.json"))
    again = compress.run(config)
    assert again.genome == found.genome
    assert (again.exported / "model.safetensors").read_bytes() == (found.exported / "model.safetensors").read_bytes()


def test_a_given_genome_that_diverges_is_refused(checkpoints: dict[str, Path], text: Path, tmp_path: Path):
    """Here by training before its score."""
    genome = tmp_path / "genome.json"
    genome.write_text("[0, 1, 0, 2, 4, 0]")
    search = SearchConfig(stages=(SelectionStage(1, 64, training_tokens=64),), learning_rate=3e38)
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", genome=str(genome), search=search)
    with pytest.raises(DarwinError, match="the model of --genome diverges: expected a finite fitness"):
        compress.run(config, until="search")
    assert not Run(tmp_path / "run").searched


def test_the_public_face_is_whole_and_quick_to_import():
    source = "import sys, darwinlm; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)
    for name in darwinlm.__all__:
        assert getattr(darwinlm, name) is not None
    assert darwinlm.RunConfig is RunConfig
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = darwinlm.nonsense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dense_model_is_loaded_once_in_each_precision(
    checkpoints: dict[str, Path],
    text: Path,
    tmp_path: Path,
    dtype: Literal["float32", "bfloat16"],
    monkeypatch: pytest.MonkeyPatch,
):
    """Search, refit and evaluation share it; the checkpoint's own precision is float32."""
    loads, load = [], Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, *given: (loads.append(given[0]), load(self, *given))[1])
    evaluated, evaluate = [], compress._evaluate
    monkeypatch.setattr(
        compress, "_evaluate", lambda work, *given: (evaluate(work, *given), evaluated.extend(work.models))[0]
    )
    compress.run(runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", dtype=dtype))
    assert evaluated == [torch.float32], "what only the search needed is freed"
    assert len(loads) == len(set(loads))
    assert set(loads) == {torch.float32, getattr(torch, dtype)}


def test_stages_fit_a_text_that_is_too_short(checkpoints: dict[str, Path], text: Path, tmp_path: Path):
    """Every stage has whole sequences of it, and a command that runs fewer stages draws the same."""
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": document}) + "\n" for document in tiny.few_documents(12)))
    calibration = CalibrationConfig(tokens=1 << 20, sequence_length=32, batch_size=4)
    config = runs.short(checkpoints["llama-gqa"], short, tmp_path / "run", calibration=calibration)
    shares = r"calibration 1,048,576 \(--calibration.tokens\), search 128 .*, refit 128 \(--refit.tokens\)"
    with pytest.raises(UsageError, match=rf"too little text in .* for {shares}: expected .* --fit-data"):
        compress.run(config)
    config = replace(config, fit_data=True)
    compress.run(config, until="database")
    run = compress.run(config)
    assert run.finished
    corpus = read_corpus(config.data, tiny.tokenizer(), 32, config.seed)
    fitted = fit_to_text(corpus, config)
    counts = {purpose: blocks.numel() for purpose, blocks in draw_tokens(corpus, fitted).items()}
    assert fitted.calibration.tokens == counts["calibration"] < 1 << 20
    assert all(counts.values())
    used = sum(count for purpose, count in counts.items() if purpose != "evaluation")
    assert used <= 32 * corpus.available(1 << 20, held_out=False)[0] < used + 4 * 32, "hardly anything is left over"


@pytest.mark.parametrize("weight", [1.0, 9.0])
def test_stages_fit_a_mixture_whose_smaller_source_is_short(weight: float):
    """Every stage takes whole sequences of each source, and rounds up for each."""
    pieces = [document[start : start + 400] for document in tiny.documents() for start in range(0, 4000, 400)]
    for documents in range(16, 40, 3):
        sources = ("long", tuple(pieces[:150]), weight), ("short", tuple(pieces[300 : 300 + documents]), 1.0)
        corpus = Corpus(sources, tiny.tokenizer(), 32, seed=0)
        stage = SelectionStage(survivors=1, fitness_tokens=4096, training_tokens=2048)
        config = replace(runs.SHORT, search=SearchConfig(stages=(stage,)), refit=RefitConfig(tokens=8192))
        config = replace(config, fit_data=True, calibration=replace(config.calibration, tokens=32_768))
        drawn = draw_tokens(corpus, fit_to_text(corpus, config))
        assert all(len(blocks) for blocks in drawn.values())


def test_a_single_held_out_sequence_is_enough_to_fit(checkpoints: dict[str, Path], text: Path, tmp_path: Path):
    """However many are asked for."""
    kept = next(document for document in tiny.documents() if is_held_out(document))
    others = tuple(document for document in tiny.documents() if not is_held_out(document))
    one = tiny.tokenizer().decode(tiny.tokenizer()(kept)["input_ids"][:40])
    held_out = next(f"{one} {number}" for number in range(1000) if is_held_out(f"{one} {number}"))
    corpus = Corpus((("text", (held_out, *others), 1.0),), tiny.tokenizer(), 32, seed=0)
    for sequences in (49, 98, 103):
        config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", fit_data=True)
        config = replace(config, evaluation=replace(config.evaluation, tokens=32 * sequences))
        assert fit_to_text(corpus, config).evaluation.tokens == 32


def test_a_text_of_enough_tokens_is_not_scaled(checkpoints: dict[str, Path], text: Path, tmp_path: Path):
    config = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", fit_data=True)
    assert fit_to_text(read_corpus(config.data, tiny.tokenizer(), 32, 0), config) == config


def test_a_text_without_a_sequence_for_each_stage_is_refused(checkpoints: dict[str, Path], tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("Three words only.")
    config = runs.short(checkpoints["llama-gqa"], short, tmp_path / "run", fit_data=True)
    with pytest.raises(UsageError, match="--fit-data: expected a sequence of 32 tokens for each of 4 stages"):
        compress.run(config)
