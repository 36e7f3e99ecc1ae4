"""The tasks of the paper's suite with questions from local files, asked in the way of lm-eval's own tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwinlm.types import DarwinError, UsageError


@dataclass(frozen=True)
class Local:
    """How a local file's records become the questions of an official task.

    Attributes:
        file: the name of the file.
        question: makes a question of a record: the prompt, the choices and, for some tasks, a common ending.
        metrics: the metrics of the official task.
    """

    file: str
    question: Callable[[Mapping[str, Any]], dict[str, Any]]
    metrics: tuple[str, ...]


def _arc(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": f"{record['query']}\nAnswer:", "choices": record["choices"]}


def _piqa(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": f"{record['query']}Answer:", "choices": record["choices"]}


def _boolq(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": f"{record['query'].removeprefix('Passage: ')}\nAnswer:", "choices": record["choices"]}


def _logiqa(record: Mapping[str, Any]) -> dict[str, Any]:
    """Make the options' texts the choices, as in the official task; in the file, letters are the choices."""
    match = re.fullmatch(
        r"Context: (.*)\nChoices: A\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\n", record["query"], re.DOTALL
    )
    if match is None:
        raise ValueError("a LogiQA query without Context, Choices and four options")
    passage, *options = match.groups()
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
    return {"text": f"Passage: {passage}\nChoices:\n{listed}Answer:", "choices": options}


def _winogrande(record: Mapping[str, Any]) -> dict[str, Any]:
    """Make a question of partial evaluation: the likelihood of the same ending after each of two beginnings."""
    return {"text": record["gold"], "choices": record["context_options"], "ending": record["continuation"]}


LOCAL = {
    "arc_easy": Local("arc_easy.jsonl", _arc, ("acc", "acc_norm")),
    "boolq": Local("boolq.jsonl", _boolq, ("acc",)),
    "logiqa": Local("logi_qa.jsonl", _logiqa, ("acc", "acc_norm")),
    "piqa": Local("piqa.jsonl", _piqa, ("acc", "acc_norm")),
    "winogrande": Local("winogrande.jsonl", _winogrande, ("acc",)),
}


def local_tasks(directory: Path) -> dict[str, dict[str, Any]]:
    """Return lm-eval's configuration of every task in `LOCAL` whose file is in the directory, by name.

    Prompts are those of the official tasks, except that the files lack the titles of BoolQ's passages. Examples for
    shots come from the same file; a question is never its own example.

    Raises:
        UsageError: if the directory has none of the files.
    """
    present = {name: local for name, local in LOCAL.items() if (directory / local.file).is_file()}
    if not present:
        files = ", ".join(local.file for local in LOCAL.values())
        raise UsageError(f"--tasks-data: expected one of {files} in {directory}, found none; name their directory")
    return {name: _config(name, local, directory) for name, local in present.items()}


def _config(name: str, local: Local, directory: Path) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": lambda **_: {"validation": _questions(local, directory / local.file)},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "text",
        "doc_to_target": "ending" if name == "winogrande" else "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in local.metrics],
    }


def _questions(local: Local, path: Path) -> Any:
    from datasets import Dataset

    try:
        with path.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        return Dataset.from_list([local.question(record) | {"gold": record["gold"]} for record in records])
    except (ValueError, KeyError, TypeError) as error:
        raise DarwinError(f"{path} cannot be read as questions ({error!r}); check the file") from None
