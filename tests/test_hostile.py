"""Directories and files that somebody else has prepared: nothing in them is run, and nothing outside is touched."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import yaml

import runs
from darwinlm.commands import compress
from darwinlm.commands.export import export
from darwinlm.config.files import read_plain
from darwinlm.config.run import RunConfig
from darwinlm.model.reading import load
from darwinlm.model.wrapper_code import foreign_code
from darwinlm.runtime.files import new_directory, write_text
from darwinlm.types import DarwinError, UsageError
from refusals import as_if_nothing_had_happened, copied_model, refused


@pytest.fixture
def config(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> RunConfig:
    """A run that would work."""
    return runs.short(checkpoints["qwen2"], text, tmp_path / "run")


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears once the module `evil`, which can be imported, has run."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "ran"


SETTINGS = [
    {"calibration": {"class_path": "evil.Evil"}},
    {"calibration": "evil.Evil"},
    {"search": {"stages": [{"class_path": "evil.Evil"}]}},
    {"class_path": "evil.Evil"},
    {"device": {"class_path": "evil.Evil"}},
    {"calibration": {"__path__": "evil.py"}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_import_nothing(
    settings: dict[str, object], config: RunConfig, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    refused(config, capsys, 2, flags=("--config", str(file)))
    assert not evil.exists()
    as_if_nothing_had_happened(config)
    compress.run(config, until="database")
    run = Path(config.out) / "run.yaml"
    run.write_text(run.read_text() + "\n" + yaml.safe_dump(settings))
    refused(config, capsys, 2, "does not hold the settings of a run")
    assert not evil.exists()


@pytest.mark.parametrize(
    "content",
    [
        '!!python/object/apply:os.system ["touch ran"]',
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
            for old, new in zip("abcdefghi", "bcdefghij", strict=True)
        ),
        "a: &a [*a]",
        "[" * 10_000,
        "x" * (1 << 21),
        "\0",
    ],
)
def test_a_file_of_settings_is_plain_and_small(content: str, tmp_path: Path) -> None:
    """No tags, no values that a few references make a billion."""
    (tmp_path / "settings.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"settings\.yaml"):
        read_plain(tmp_path / "settings.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["weights.py", "modeling_pruned_qwen2.py", "config.json", "tokenizer_config.json"])
def test_code_in_a_run_is_not_run_by_resuming_it(
    place: str, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where whoever planted it has also sealed it."""
    run = compress.run(config)
    run.report_path.unlink()
    plant = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    file = run.exported / place
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"auto_map": dict.fromkeys(("AutoConfig", "AutoTokenizer"), "evil.Evil")}))
        (run.exported / "evil.py").write_text(plant)
    else:
        file.write_text(plant)
    run.seal_export()
    assert foreign_code(run.exported) is not None
    assert runs.call(*runs.command(replace(config, verify=True))) == 0
    assert "is written again" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert foreign_code(run.exported) is None


def test_a_chat_template_is_carried_over_and_never_run(config: RunConfig, tmp_path: Path) -> None:
    """Templates are programs, which transformers runs in a sandbox and llama.cpp in an engine of its own."""
    ran = tmp_path / "ran"
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}{% include '../../secret' %}"
    assert jinja2.Template(template.partition("{% ")[0]).render() == "0"
    ran.unlink()  # so it does what it is to do
    model = copied_model(config, tmp_path)
    (model / "chat_template.jinja").write_text(template)
    compress.run(replace(config, model=str(model)))
    export(Path(config.out) / "model")
    assert (Path(config.out) / "model" / "chat_template.jinja").read_text() == template
    assert not ran.exists()


def test_a_pickle_is_not_read(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "ran"), "w")

    model = copied_model(config, tmp_path)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(replace(config, model=str(model)), capsys, 2, "expected model.safetensors")
    with pytest.raises(DarwinError):
        load(model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    refused(replace(config, model=str(model)), capsys, 1, "cannot be read")
    assert not (tmp_path / "ran").exists()


def test_links_in_a_run_are_not_followed(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.partial").write_text("dear")
    out = Path(config.out)
    for name in (".lock", "database", "run.yaml", "search", "model"):
        out.mkdir()
        (out / name).symlink_to(mine / "letter.partial" if "." in name else mine)
        refused(config, capsys, 2, "choose another directory")
        assert (mine / "letter.partial").read_text() == "dear"
        (out / name).unlink()
        out.rmdir()  # which has nothing else in it
    (tmp_path / "place").mkdir()
    out.symlink_to(tmp_path / "place")  # the run itself may lie elsewhere
    compress.run(config, until="database")
    assert (tmp_path / "place" / "run.yaml").exists()


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("dear")
    (tmp_path / "a.json.partial").symlink_to(mine)
    write_text(tmp_path / "a.json", "{}")
    assert mine.read_text() == "dear"
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "letter").write_text("dear")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "directory")
    with pytest.raises(UsageError, match="cannot write to"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "directory" / "letter").read_text() == "dear"
