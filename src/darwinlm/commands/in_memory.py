"""A model, texts and settings in memory: checked first, then written into a run's directory for the stages to read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.commands.run_directory import GIVEN_MODEL, GIVEN_TEXT
from darwinlm.config.files import check_known, settings_parser
from darwinlm.config.run import RunConfig
from darwinlm.data.documents import text_of
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_family
from darwinlm.model.reading import skeleton
from darwinlm.model.wrapped import text_config
from darwinlm.runtime.files import write_text
from darwinlm.runtime.progress import quiet_transformers
from darwinlm.types import UsageError


@dataclasses.dataclass(frozen=True)
class Given:
    """A model with its tokenizer, and the lines of a `.jsonl` file of texts; None for what a file holds already."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    lines: str | None

    def write(self, out: Path) -> None:
        """Write them into the directory of a run, which this process must hold, or check that they are there.

        Raises:
            UsageError: if the directory holds another model or other texts.
        """
        if self.lines is not None:
            file = out / GIVEN_TEXT
            if not file.exists():
                write_text(file, self.lines)
            elif file.read_text(encoding="utf-8") != self.lines:
                raise UsageError(f"{out} holds a run on other documents than those that are given; choose another out")
        if self.model is not None and self.tokenizer is not None:
            _write_model(self.model, self.tokenizer, out / GIVEN_MODEL)


def _write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    partial = directory.with_name(f"{directory.name}.partial")  # which the next run removes if this process is killed
    try:
        with quiet_transformers():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if not directory.exists():
            partial.rename(directory)
        elif Checkpoint(directory).fingerprint != Checkpoint(partial).fingerprint:
            raise UsageError(
                f"{directory.parent} holds a run of another model than the one that is given; choose another out"
            )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_arguments(
    model: Any, tokenizer: Any, data: Any, out: str | Path, settings: Mapping[str, Any]
) -> tuple[RunConfig, Given | None]:
    """The settings that the arguments of `darwinlm.compress` mean, and what of them is in memory. It writes nothing.

    Raises:
        UsageError: if an argument is of another type or cannot be used.
    """
    in_memory = not isinstance(model, str | Path), not isinstance(data, str | Path)
    names = {
        "model": str(Path(out) / GIVEN_MODEL if in_memory[0] else model),
        "data": str(Path(out) / GIVEN_TEXT if in_memory[1] else data),
        "out": str(out),
    }
    config = _settings({**names, **settings})
    if in_memory[0]:
        _expect_model(model, tokenizer)
    elif tokenizer is not None:
        raise UsageError(f"tokenizer: expected none beside the name of a model ({model}), found one; leave it out")
    lines = _lines(data) if in_memory[1] else None
    if in_memory[1] and "," in str(out):
        raise UsageError(f"out: expected no comma in it where texts are in memory, found {out}; choose another out")
    given = Given(model if in_memory[0] else None, tokenizer, lines) if any(in_memory) else None
    return config, given


def _expect_model(model: Any, tokenizer: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        found = type(model).__name__
        raise UsageError(f"model: expected a name, a path or a PreTrainedModel, found {found}; give one of these")
    if tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer: expected tokenizer=..., found none; pass it too")
    find_family(skeleton(text_config(model.config)))  # as it is read again


def _lines(documents: Any) -> str:
    """Strings, or the records of a data set with a column of text, as the lines of a `.jsonl` file."""
    if isinstance(documents, Mapping) or not isinstance(documents, Iterable):
        raise UsageError(
            f"data: expected a name, a path, a list of strings or a data set, found {type(documents).__name__}; give "
            "one of these, of a dict of data sets one"
        )
    texts = [
        document if isinstance(document, str) else text_of(document, f"document {number}")
        for number, document in enumerate(documents)
    ]
    if not any(text.strip() for text in texts):
        raise UsageError("data is empty: expected at least one document with text, found none; give some")
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def _settings(values: Mapping[str, Any]) -> RunConfig:
    """Settings with dicts where `RunConfig` has dataclasses: `{"calibration": {"tokens": 8192}}`.

    Raises:
        UsageError: if a name is no setting, or a value is of another type or cannot be used.
    """
    plain = _as_in_yaml(values)
    check_known("compress", plain, RunConfig)
    parser = settings_parser(RunConfig)
    try:
        parsed = parser.parse_object(plain)
    except ArgumentError as error:
        reason = " ".join(str(error).removeprefix("Parser key ").split())
        raise UsageError(f"a setting cannot be used: {reason}; give another value") from None
    return RunConfig(**parser.instantiate(parsed).as_dict())


def _as_in_yaml(value: Any) -> Any:
    """Dicts for dataclasses, lists for tuples, strings for paths."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _as_in_yaml(item) for key, item in value.items()}
    return [_as_in_yaml(item) for item in value] if isinstance(value, list | tuple) else value
