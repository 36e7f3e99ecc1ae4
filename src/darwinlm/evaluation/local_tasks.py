"""Tasks with questions from local files, asked in the way of lm-eval's own: the paper's suite, GSM8K and IFEval."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from darwinlm.types import DarwinError, UsageError


@dataclass(frozen=True)
class Local:
    """How a local file's records become the questions of an official task.

    Attributes:
        file: the name of the file.
        question: makes a question of a record: the prompt, the choices and, for some tasks, a common ending.
        metrics: the metrics of the official task.
        official: for a file in the form of the official data set, lm-eval's own file of the task, whose prompts and
            metrics are used as they are.
    """

    file: str
    question: Callable[[Mapping[str, Any]], dict[str, Any]]
    metrics: tuple[str, ...] = ()
    official: str | None = None


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


def _gsm8k(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(record[name]) for name in ("question", "answer")}


def _ifeval(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("key", "prompt", "instruction_id_list", "kwargs")}


LOCAL = {
    "arc_easy": Local("arc_easy.jsonl", _arc, ("acc", "acc_norm")),
    "boolq": Local("boolq.jsonl", _boolq, ("acc",)),
    "gsm8k": Local("gsm8k.jsonl", _gsm8k, official="gsm8k/gsm8k.yaml"),
    "ifeval": Local("ifeval.jsonl", _ifeval, official="ifeval/ifeval.yaml"),
    "logiqa": Local("logi_qa.jsonl", _logiqa, ("acc", "acc_norm")),
    "piqa": Local("piqa.jsonl", _piqa, ("acc", "acc_norm")),
    "winogrande": Local("winogrande.jsonl", _winogrande, ("acc",)),
}


def local_tasks(directory: Path, wanted: Collection[str] = tuple(LOCAL)) -> dict[str, dict[str, Any]]:
    """Return lm-eval's configuration of every wanted task in `LOCAL` whose file is in the directory, by name.

    Prompts are those of the official tasks, except that the files lack the titles of BoolQ's passages. Examples for
    shots come from the same file; a question is never its own example.

    Raises:
        UsageError: if the directory has none of the files, or a task needs a package that is not installed.
    """
    present = {name: local for name, local in LOCAL.items() if (directory / local.file).is_file()}
    if not present:
        files = ", ".join(local.file for local in LOCAL.values())
        raise UsageError(f"--tasks-data: expected one of {files} in {directory}, found none; name their directory")
    return {name: _config(name, local, directory) for name, local in present.items() if name in wanted}


def _config(name: str, local: Local, directory: Path) -> dict[str, Any]:
    if local.official is not None:
        official = _official(local.official)
        split = official["test_split"]
        custom = {"custom_dataset": lambda **_: {split: _questions(local, directory / local.file)}}
        return official | custom | {"fewshot_split": split}
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


def _official(file: str) -> dict[str, Any]:
    """lm-eval's own configuration of a task, without its data set.

    Raises:
        UsageError: if the functions that it names need a package that is not installed.
    """
    from lm_eval import tasks

    path = Path(str(tasks.__file__)).parent / file
    config = yaml.load(path.read_text(encoding="utf-8"), _Named)
    for key in ("tag", "dataset_path", "dataset_name", "training_split"):
        config.pop(key, None)
    try:
        return {key: _imported(value, f"lm_eval.tasks.{path.parent.name}") for key, value in config.items()}
    except ImportError as error:
        raise UsageError(
            f"--tasks: {config['task']} needs the package {error.name}, which is not installed: "
            f"pip install lm-eval[{config['task']}]"
        ) from None


class _Named(yaml.SafeLoader):
    """Reads `!function utils.name` as what it names, to be imported later."""


class _Function(str):
    """The name of a function in a task's folder."""


def _named(_: yaml.SafeLoader, node: yaml.Node) -> _Function:
    return _Function(node.value)


_Named.add_constructor("!function", _named)


def _imported(value: Any, package: str) -> Any:
    """A value of a configuration with its functions in place of their names."""
    if isinstance(value, _Function):
        module, _, name = value.rpartition(".")
        return getattr(importlib.import_module(f"{package}.{module}"), name)
    if isinstance(value, list):
        return [_imported(item, package) for item in value]
    return {key: _imported(item, package) for key, item in value.items()} if isinstance(value, dict) else value


def _questions(local: Local, path: Path) -> Any:
    from datasets import Dataset

    try:
        with path.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        gold = [{} if local.official else {"gold": record["gold"]} for record in records]
        return Dataset.from_list([local.question(one) | answer for one, answer in zip(records, gold, strict=True)])
    except (ValueError, KeyError, TypeError) as error:
        raise DarwinError(f"{path} cannot be read as questions ({error!r}); check the file") from None
