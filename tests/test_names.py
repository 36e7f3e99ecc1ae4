"""Names on the hub: models with a revision, data sets with a configuration, a split and a revision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from darwinlm.data.hub import CONVERTED, dataset_named, stream_dataset
from darwinlm.runtime.names import HubName, hub_model, hub_name, short_name
from darwinlm.types import UsageError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", HubName("owner/name")),
        ("squad", HubName("squad")),
        ("owner/name@v1.0", HubName("owner/name", revision="v1.0")),
        ("owner/name@refs/pr/3", HubName("owner/name", revision="refs/pr/3")),
        ("owner/name:config", HubName("owner/name", "config")),
        ("owner/name:config:test", HubName("owner/name", "config", "test")),
        ("owner/name::test@main", HubName("owner/name", None, "test", "main")),
        ("/etc/models", None),
        ("./owner/name", None),
        ("~/models", None),
        ("a/b/c", None),
        ("owner/name@", None),
        ("owner/name:a:b:c", None),
    ],
)
def test_a_text_means_one_thing(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name


def test_what_exists_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_model("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_model("owner/name") is None


@pytest.mark.parametrize("text", ["name", "owner/name:config", "owner/name::test"])
def test_what_is_no_name_of_a_model(text: str) -> None:
    assert hub_model(text) is None


@pytest.mark.parametrize(
    ("text", "short"), [("owner/name@main", "name"), ("runs/a/model", "model"), ("smollm2-135m", "smollm2-135m")]
)
def test_titles_have_no_revision(text: str, short: str) -> None:
    assert short_name(text) == short


def test_a_known_data_set_may_have_another_configuration_split_or_revision() -> None:
    assert dataset_named("c4") == HubName("allenai/c4", "en", "train")
    assert dataset_named("c4:de:validation@abc") == HubName("allenai/c4", "de", "validation", "abc")
    assert dataset_named("owner/name") == HubName("owner/name", None, "train")
    with pytest.raises(UsageError, match="expected a file or a data set of the hub"):
        dataset_named("owner/name:a:b:c")


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is on this machine: what is asked of it is looked at, and the error is that of datasets 5."""
    asked: list[tuple[Any, ...]] = []

    def load(repository: str, name: str | None, split: str, revision: str | None, streaming: bool) -> list[object]:
        asked.append((repository, name, split, revision))
        if revision != CONVERTED:
            raise RuntimeError("Dataset scripts are no longer supported, but found logiqa.py")
        if repository != "owner/logiqa":
            raise FileNotFoundError("no such revision")
        return []

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream_dataset("owner/logiqa::test")
    assert asked == [("owner/logiqa", None, "test", None), ("owner/logiqa", None, "test", CONVERTED)]
    with pytest.raises(UsageError, match=r"owner/other is a script.*download them and name these"):
        stream_dataset("owner/other")
