"""What a search holds on its device: the count, the bytes that the simulated accelerator counts, and the limit."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig

import runs
import tiny
from accelerator import MEMORY, NAME, accelerator
from darwinlm.commands import work as module
from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import Run
from darwinlm.config.checks import bytes_of
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, RefitConfig, RunConfig
from darwinlm.losses.logits import hidden_states
from darwinlm.model.blocks import InShards
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.size import parameter_bytes
from darwinlm.model.states import last_states
from darwinlm.runtime.files import read_record
from darwinlm.search.memory import HEADROOM, Allowance, SearchMemory, allowance
from darwinlm.types import MetricName, SelectionStage, UsageError

LENGTH = 64
# Llama-3.1-8B's proportions at a sixteenth of its widths, with fewer blocks.
SCALED = LlamaConfig(
    vocab_size=2004, hidden_size=256, intermediate_size=896, num_hidden_layers=5, num_attention_heads=16,
    num_key_value_heads=8, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1,
    eos_token_id=2, pad_token_id=3,
)  # fmt: skip
STAGES = {
    "untrained": (SelectionStage(4, 4 * LENGTH), SelectionStage(2, 8 * LENGTH), SelectionStage(1, 16 * LENGTH)),
    "trained": (SelectionStage(4, 4 * LENGTH, LENGTH), SelectionStage(1, 8 * LENGTH, 2 * LENGTH)),
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaled")
    tiny.CONFIGS["scaled"] = SCALED
    try:
        model: Any = tiny.build("scaled")
        model.to(torch.bfloat16).save_pretrained(path)
    finally:
        del tiny.CONFIGS["scaled"]
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def database(scaled: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the database that all searches here can use."""
    path = tmp_path_factory.mktemp("database") / "run"
    with accelerator():
        run(config(scaled, text, path), until="database")
    return path


def config(model: Path, text: Path, out: Path, **changes: Any) -> RunConfig:
    settings = {
        "target": "params=0.7",
        "device": NAME,
        "dtype": "bfloat16",
        "calibration": CalibrationConfig(tokens=2048, sequence_length=LENGTH),
        "database": DatabaseConfig(levels=8, granularity=32),
        "refit": RefitConfig(tokens=4 * LENGTH),
    }
    return runs.short(model, text, out, **(settings | changes))


def most_held(config: RunConfig, stage: Literal["search", "export"]) -> int:
    """The most bytes that a stage holds on the device."""
    with accelerator():
        gc.collect()
        MEMORY.begin()
        run(config, until=stage)
        return MEMORY.most


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[SearchMemory]:
    """What runs count from now on."""
    found: list[SearchMemory] = []
    monkeypatch.setattr(module, "allowance", lambda *given: (found.append(given[0]), allowance(*given))[1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "trains"),
    [
        pytest.param("untrained", "consumers", marks=pytest.mark.long),
        ("trained", "consumers"),
        pytest.param("trained", "all", marks=pytest.mark.long),
    ],
)
def test_a_limit_holds_and_changes_no_result(
    selection: str,
    trains: Literal["all", "consumers"],
    scaled: Path,
    text: Path,
    database: Path,
    tmp_path: Path,
    counts: list[SearchMemory],
) -> None:
    search = replace(runs.SHORT.search, generations=2, offspring=5, stages=STAGES[selection], trains=trains)
    free = config(scaled, text, tmp_path / "free", search=search, memory="1GB", reuse=str(database))
    without_limit = most_held(free, "search")
    least = counts[-1].least
    limit = int(1.02 * least / HEADROOM)
    tight = replace(free, out=str(tmp_path / "tight"), memory=f"{limit / 1e6:.3f}MB")
    searched, refitted = most_held(tight, "search"), most_held(tight, "export")
    assert max(searched, refitted) <= limit
    assert max(searched, refitted) == pytest.approx(least, rel=0.15)
    if selection == "trained":
        assert without_limit > limit  # so it was the limit that held
    assert runs.history(tmp_path / "tight") == runs.history(tmp_path / "free")


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric",
    ["kl", pytest.param("top-k-kl", marks=pytest.mark.long), pytest.param("perplexity", marks=pytest.mark.long)],
)
def test_a_search_whose_blocks_wait_outside_holds_what_is_counted(
    metric: MetricName, scaled: Path, text: Path, database: Path, tmp_path: Path, counts: list[SearchMemory]
) -> None:
    """And finds what a search finds whose dense model stays on the device."""
    search = replace(runs.SHORT.search, generations=2, offspring=5, stages=STAGES["untrained"], metric=metric)
    free = config(
        scaled, text, tmp_path / "free", search=search, memory="1GB", reuse=str(database), refit=RefitConfig(tokens=0)
    )
    resident = most_held(free, "search")
    count = counts[-1]
    limit = int(1.02 * count.visiting / HEADROOM)
    tight = replace(free, out=str(tmp_path / "tight"), memory=f"{limit / 1e6:.3f}MB")
    assert not allowance(count, limit).resident
    held = most_held(tight, "search")
    assert held <= limit < resident
    assert held == pytest.approx(count.visiting, rel=0.15)
    assert runs.history(tmp_path / "tight") == runs.history(tmp_path / "free")


@pytest.mark.slow
def test_a_refit_holds_what_is_counted_and_no_dense_model(
    scaled: Path, text: Path, database: Path, tmp_path: Path, counts: list[SearchMemory]
) -> None:
    search = replace(runs.SHORT.search, generations=1, stages=STAGES["untrained"])
    refit = RefitConfig(tokens=16 * LENGTH)
    settings = config(scaled, text, tmp_path / "run", search=search, memory="1GB", reuse=str(database), refit=refit)
    with accelerator():
        run(settings, until="search")
    held, count = most_held(settings, "export"), counts[-1]
    print("REFIT", held, count.refitting, count)
    assert held == pytest.approx(count.refitting, rel=0.15)


@pytest.mark.slow
def test_targets_are_made_with_one_block_of_the_dense_model(scaled: Path, text: Path, tmp_path: Path) -> None:
    """And are the last hidden states of the whole one."""
    checkpoint = Checkpoint(scaled)
    ids = torch.randint(4, 2000, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    whole: Any = checkpoint.load(torch.bfloat16, torch.device("cpu"))
    with accelerator():
        gc.collect()
        MEMORY.begin()
        before = MEMORY.most
        blocks = InShards.of(checkpoint, torch.bfloat16, torch.device(NAME))
        found = last_states(blocks.skeleton, checkpoint.family, blocks, ids.split(1))
        held = MEMORY.most - before
        read = [found.read(index).cpu() for index in range(3)]
        size = parameter_bytes(whole)
        whole.to(NAME)
        for index in range(3):
            hidden = hidden_states(whole, ids[index : index + 1])
            assert torch.equal(read[index], hidden.cpu())
    print("TARGETS", held, size)
    assert held < size / 2


@pytest.mark.slow
def test_a_report_on_a_model_that_does_not_fit_has_the_figures_of_one_that_does(
    scaled: Path, text: Path, database: Path, tmp_path: Path, counts: list[SearchMemory]
) -> None:
    """Its blocks wait in the host's memory, and the device never holds more than the limit."""
    search = replace(runs.SHORT.search, generations=2, offspring=5, stages=STAGES["untrained"])
    free = config(
        scaled, text, tmp_path / "free", search=search, memory="1GB", reuse=str(database), refit=RefitConfig(tokens=0)
    )
    with accelerator():
        run(free)
    limit = int(1.02 * counts[-1].visiting / HEADROOM)
    tight = replace(free, out=str(tmp_path / "tight"), memory=f"{limit / 1e6:.3f}MB")
    with accelerator():
        gc.collect()
        MEMORY.begin()
        run(tight)
        assert MEMORY.most <= limit
    there, here = (Run(tmp_path / name).table for name in ("free", "tight"))
    for row, other in zip(there, here, strict=True):
        assert other["model"] == row["model"]
        assert other["kl"] == pytest.approx(row["kl"], rel=1e-2, abs=1e-3)
        assert other["perplexity"] == pytest.approx(row["perplexity"], rel=1e-2)
    curves = [read_record(tmp_path / name / "search" / "curves.json", "curves")["curves"] for name in ("free", "tight")]
    assert [[point[0] for point in curve] for curve in curves[0]] == [[p[0] for p in curve] for curve in curves[1]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("24GB", 24 * 10**9),
        ("22.5GiB", int(22.5 * 2**30)),
        ("80 GB", 80 * 10**9),
        ("512MiB", 2**29),
        ("512MB", 512 * 10**6),
    ],
)
def test_sizes_are_read(text: str, found: int) -> None:
    assert bytes_of(text) == found


@pytest.mark.parametrize("text", ["", "24", "GB", "24gb", "-1GB", "0GB", "24GBs", "1e3GB", "24TB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--memory: expected a size such as 24GB"):
        replace(runs.SHORT, memory=text)


def test_a_limit_that_is_too_low_is_refused_with_what_would_help(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = runs.short(checkpoints["llama-gqa"], text, tmp_path / "run", memory="0.1MB")
    assert runs.call(*runs.command(settings)) == 2
    message = capsys.readouterr().err
    assert "--memory: expected" in message
    assert "found 0.0 GB" not in message  # small sizes are told in MB
    assert "take" in message
    assert not (tmp_path / "run").exists()


def counted(**changes: int) -> SearchMemory:
    sizes = {
        "dense": 100, "ends": 10, "block": 9, "narrow": 50, "targets": 10, "stream": 1, "scoring": 20, "training": 0,
        "frozen": 0, "refit": 0, "states": 40, "survivors": 0, "answers": 0,
    }  # fmt: skip
    return SearchMemory(**(sizes | changes))


def given(memory: SearchMemory, bytes_held: int) -> Allowance:
    return allowance(memory, -int(-bytes_held // HEADROOM))


def test_what_is_left_goes_to_the_blocks_then_to_the_states() -> None:
    memory = counted()
    least = 10 + 3 * 9 + 10 + 4 * 1 + 20
    assert memory.least == least
    assert allowance(memory, None) == Allowance()
    with pytest.raises(UsageError, match="--memory"):
        given(memory, least - 10)
    assert not given(memory, least).resident
    assert given(memory, 100 + 9 + 10 + 4 + 20).resident
    assert (given(memory, least + 39).states, given(memory, least + 40).states) == (False, True)
    assert (given(memory, 143 + 39).states, given(memory, 143 + 40).states) == (False, True)
    for room in (least, least + 60, 143, 143 + 60):
        allowed = given(memory, room)
        held = (memory.dense if allowed.resident else memory.visiting - 9 - 34) + memory.states * allowed.states
        assert allowed.narrow is not None
        assert held + allowed.narrow + allowed.wave + 10 + 2 + 20 <= room + 1


def test_candidates_that_are_trained_are_whole_and_the_dense_model_may_be_elsewhere() -> None:
    memory = counted(training=80, frozen=15, survivors=20)
    least = 10 + 10 + 9 + 15 + 80
    assert (memory.least, memory.resident) == (least, 100 + 50 + 10 + 80)
    assert given(memory, least + 30).survivors == 15, "where there is no room for the states"
    assert given(memory, least + 50).survivors == 5
    assert given(memory, least + 100).survivors == 20
    assert [given(memory, bytes_held).resident for bytes_held in (least, 239, 240)] == [False, False, True]


@pytest.mark.slow
def test_models_that_do_not_fit_beside_each_other_are_judged_from_outside(
    scaled: Path, text: Path, database: Path, tmp_path: Path, counts: list[SearchMemory]
) -> None:
    """Where the search has room for the dense model and the evaluation none for three models, the limit still holds."""
    search = replace(runs.SHORT.search, generations=1, offspring=3, stages=STAGES["untrained"])
    free = config(
        scaled, text, tmp_path / "free", search=search, memory="1GB", reuse=str(database), refit=RefitConfig(tokens=0)
    )
    with accelerator():
        run(free)
    limit = int(1.02 * counts[-1].resident / HEADROOM)
    tight = replace(free, out=str(tmp_path / "tight"), memory=f"{limit / 1e6:.3f}MB")
    with accelerator():
        run(tight, until="search")
        gc.collect()
        MEMORY.begin()
        run(tight)
        assert MEMORY.most <= limit
    assert allowance(counts[-1], limit).resident
    for near, far in zip(Run(free.out).table, Run(tight.out).table, strict=True):
        assert near["kl"] == pytest.approx(far["kl"], abs=1e-4)
