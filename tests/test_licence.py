"""An export carries the licence of the model that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import runs
from darwinlm.commands.compress import run
from darwinlm.commands.export import export_model
from darwinlm.config.run import ExportConfig
from darwinlm.model.licence import licence_files, licence_of
from tiny import write_checkpoint

FILES = {"LICENSE": "the licence", "Notice.txt": "a notice", "USE_POLICY.md": "a policy"}
CARD = "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\n---\n# A model\n"


@pytest.mark.slow
def test_licence_files_and_the_cards_licence_go_along(text: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "llama-gqa")
    for name, content in (FILES | {"README.md": CARD, "licenses.json": "{}"}).items():
        (model / name).write_text(content)
    exported = run(runs.short(model, text, tmp_path / "run")).exported
    again = export_model(tmp_path / "run", tmp_path / "again", ExportConfig(verify=False))
    for directory in (exported, again):
        assert {file.name: file.read_text() for file in licence_files(directory)} == FILES
        assert ModelCard.load(directory / "README.md").data.license_name == "llama3.1"
        assert licence_of(directory) == {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"}


def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("# no metadata\n")
    assert licence_of(tmp_path) == {}
