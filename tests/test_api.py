"""The Python API: what docs/api.md shows runs, and what cannot be used is refused before anything is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import darwinlm
import runs
import tiny
from darwinlm.commands.compress import run as run_command
from darwinlm.commands.in_memory import read_arguments
from darwinlm.types import UsageError

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
SHORT = {name: getattr(runs.SHORT, name) for name in ("calibration", "database", "search", "refit", "evaluation")}


@pytest.mark.slow
def test_the_examples_of_the_page_run(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, with a tiny model and real text."""
    monkeypatch.chdir(tmp_path)
    given = {"MODEL": str(checkpoints["llama-gqa"]), "DATA": str(text)}
    names: dict[str, Any] = {"documents": tiny.documents()}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        for word, value in given.items():
            block = block.replace(f'"{word}"', repr(value))
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["qualities"]["pruned"].kl > 0
    assert Path("api.gguf").stat().st_size > 1000


def compress(out: Path, model: Any = None, data: Any = None, **settings: Any) -> darwinlm.Run:
    """A short run of a model and documents in memory, or of those that are given."""
    model = tiny.build("llama-gqa") if model is None else model
    documents = tiny.documents() if data is None else data
    tokenizer = None if isinstance(model, Path) else tiny.tokenizer()
    settings = {"tokenizer": tokenizer, "target_level": 2.0, "verify": False, **SHORT, **settings}
    return darwinlm.compress(model, documents, out=out, **settings)


@pytest.mark.slow
def test_models_and_texts_in_memory_give_what_files_give(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    by_name = compress(tmp_path / "files", checkpoints["llama-gqa"], text)
    strings = compress(tmp_path / "memory")
    assert strings.genome == by_name.genome
    records = Dataset.from_list([{"content": document} for document in tiny.documents()])
    assert compress(tmp_path / "records", data=records).genome == by_name.genome
    assert compress(tmp_path / "memory").table == strings.table, "a finished run is returned"
    with pytest.raises(UsageError, match="holds a run of another model"):
        compress(tmp_path / "memory", tiny.build("llama-gqa", seed=1))
    with pytest.raises(UsageError, match="holds a run on other documents"):
        compress(tmp_path / "memory", data=tiny.documents()[1:])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"calibration": {"token": 8}}, "calibration: expected settings among tokens, .*, found 'token'"),
        ({"calibration": {"tokens": 0}}, "--calibration.tokens: expected at least 1"),
        ({"search": {"stages": [{"survivor": 1}]}}, "search.stages: expected settings among survivors"),
        ({"level": 3}, "compress: expected settings among .*, found 'level'"),
        ({"calibration": 5}, "calibration: expected a dict of settings or their dataclass, found 5"),
        ({"search": {"stages": ["x"]}}, "search.stages: expected a dict"),
        ({"calibration": {"tokens": 1.5}}, 'a setting cannot be used: "calibration.tokens"'),
        ({"dtype": "float16"}, 'a setting cannot be used: "dtype"'),
        ({"data": {"train": tiny.documents()}}, "data: expected a name, .*, found dict"),
        ({"target": "params=3"}, "--target"),
        ({"model": tiny.build("llama-gqa"), "data": ["Three words only."]}, "too little text"),
        ({"data": []}, "is empty"),
    ],
)
def test_what_cannot_be_used_leaves_nothing(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        compress(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_models_and_texts_of_other_types_are_refused() -> None:
    """Not through `compress`, whose types are checked while tests run."""
    with pytest.raises(UsageError, match="model: expected a name, a path or a PreTrainedModel, found int"):
        read_arguments(5, None, "DATA", "OUT", {})
    with pytest.raises(UsageError, match=r"data: expected a name, .*, found int"):
        read_arguments("MODEL", None, 5, "OUT", {})


def test_a_tokenizer_beside_a_name_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tokenizer: expected none beside the name of a model"):
        compress(tmp_path / "run", checkpoints["llama-gqa"], tokenizer=tiny.tokenizer())


def test_no_comma_in_the_place_of_texts(tmp_path: Path) -> None:
    """It would part the name of the file in two sources."""
    with pytest.raises(UsageError, match="out: expected no comma"):
        compress(tmp_path / "a,b")


def test_a_directory_that_is_refused_stays_as_it_was(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "given-names.txt").write_text("a user's own")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        compress(own)
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        compress(own, checkpoints["llama-gqa"], tmp_path / "nowhere.jsonl")
    assert runs.files(own) == {"given-names.txt": b"a user's own"}
    run = run_command(runs.short(checkpoints["llama-gqa"], text, tmp_path / "run"), until="database")
    before = runs.files(run.path)
    with pytest.raises(UsageError, match="holds another run"):
        compress(run.path)
    assert runs.files(run.path) == before


@pytest.mark.slow
def test_a_run_of_a_model_in_memory_may_be_moved(tmp_path: Path) -> None:
    run = compress(tmp_path / "run")
    run.report_path.unlink()
    moved = run.path.rename(tmp_path / "moved")
    assert compress(moved).finished
    assert darwinlm.Run.open(moved).config.model == str(moved / "given-model")


def test_settings_may_be_dicts(tmp_path: Path) -> None:
    """Those that a dict leaves out have their defaults."""
    run = compress(tmp_path / "run", calibration={"tokens": 1024, "sequence_length": 32})
    assert run.config.calibration == darwinlm.CalibrationConfig(tokens=1024, sequence_length=32)


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(darwinlm, name) is not None for name in darwinlm.__all__)


def test_the_import_does_not_wait_for_torch() -> None:
    """Nor does the first message of a command."""
    script = "import darwinlm, darwinlm.cli, sys; raise SystemExit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
