"""A model, texts and settings in memory: written into a run's directory once, so that every stage reads files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.commands.run_directory import GIVEN
from darwinlm.config.run import RunConfig
from darwinlm.data.corpus import text_of
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_family
from darwinlm.runtime.files import locked_directory, write_text
from darwinlm.runtime.progress import quiet_transformers
from darwinlm.types import SelectionStage, UsageError

MODEL, TEXT = f"{GIVEN}model", f"{GIVEN}text.jsonl"


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `RunConfig`, with dicts where it has dataclasses: `{"calibration": {"tokens": 8192}}`.

    Raises:
        UsageError: if a name is no setting, or a value cannot be used.
    """
    sections = {each.name: each.default_factory for each in dataclasses.fields(RunConfig)}
    result = {}
    for name, value in values.items():
        _expect_fields(name, [name], RunConfig)
        section: Any = sections[name]
        if isinstance(value, Mapping) and isinstance(section, type):
            _expect_fields(name, value, section)
            content = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
            if "stages" in content:
                content["stages"] = tuple(_stage(stage) for stage in content["stages"])
            value = section(**content)
        result[name] = value
    return result


def _stage(stage: SelectionStage | Mapping[str, Any]) -> SelectionStage:
    if isinstance(stage, SelectionStage):
        return stage
    _expect_fields("search.stages", stage, SelectionStage)
    return SelectionStage(**stage)


def _expect_fields(section: str, names: Iterable[str], kind: type[Any]) -> None:
    known = [each.name for each in dataclasses.fields(kind)]
    for name in names:
        if name not in known:
            raise UsageError(f"{section}: expected settings among {', '.join(known)}, found {name!r}; check its name")


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> Path:
    """The directory in `out` that holds a model and its tokenizer, written if it is not there.

    Raises:
        UsageError: if there is no tokenizer, the family is not supported, or the directory holds another model.
    """
    if tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer: expected tokenizer=..., found none; pass it too")
    find_family(model.config)
    directory = out / MODEL
    partial = directory.with_name(f"{MODEL}.partial")  # which the next run removes if this process is killed
    with locked_directory(out), quiet_transformers():
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not directory.exists():
            partial.rename(directory)
        same = not partial.exists() or Checkpoint(directory).fingerprint == Checkpoint(partial).fingerprint
        shutil.rmtree(partial, ignore_errors=True)
    if not same:
        raise UsageError(f"{out} holds a run of another model than the one that is given; choose another out")
    return directory


def write_documents(documents: Iterable[Any], out: Path) -> Path:
    """The file in `out` that holds documents, a line of JSON each, written if it is not there.

    Args:
        documents: strings, or the records of a data set with a column of text.

    Raises:
        UsageError: if a document has no text, or the file holds others.
    """
    texts = [
        document if isinstance(document, str) else text_of(document, f"document {number}")
        for number, document in enumerate(documents)
    ]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file = out / TEXT
    with locked_directory(out):
        if not file.exists():
            write_text(file, content)
        elif file.read_text(encoding="utf-8") != content:
            raise UsageError(f"{out} holds a run on other documents than those that are given; choose another out")
    return file
