"""Runs lm-evaluation-harness on models in memory: any of its tasks, or the paper's suite, also from local files."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.config.evaluation import TasksConfig
from darwinlm.evaluation.answers import figures, likelihoods
from darwinlm.evaluation.local_tasks import LOCAL, local_tasks
from darwinlm.types import DarwinError, UsageError


@dataclass(frozen=True)
class Request:
    """A task, with the settings for running it.

    Attributes:
        shots: the number of examples before each question; None for the task's own.
        metric: the name of the only metric to report; None for all of the task's metrics.
    """

    task: str
    shots: int | None = None
    metric: str | None = None


# Shots: scripts/run_lmeval_hf.sh of IST-DASLab/DarwinLM. acc or acc_norm: the table of metrics in icl_eval/README.md of
# princeton-nlp/LLM-Shearing (ShearedLLaMA), whose protocol the paper follows.
SUITE = (
    Request("sciq", 0, "acc"),
    Request("piqa", 0, "acc"),
    Request("winogrande", 5, "acc"),
    Request("arc_easy", 0, "acc"),
    Request("arc_challenge", 25, "acc_norm"),
    Request("hellaswag", 10, "acc_norm"),
    Request("logiqa", 0, "acc_norm"),
    Request("boolq", 0, "acc"),
    Request("mmlu", 5, "acc"),
)


SHARES = ("exact_match", "em", "f1", "mcc", "pass@1")  # metrics that are shares, besides acc, acc_norm and the like
LIKELIHOOD = "log-likelihood"  # of the correct answer, in nats a question: it moves where accuracy does not yet


@dataclass(frozen=True)
class Score:
    """A model's figure on a task.

    Attributes:
        value: the figure; None if the task could not be run.
        stderr: the standard error of `value`; None if the harness gives none.
        questions: the number of questions that were asked.
        source: where the questions come from, or why there is no value.
        by_question: what `value` is the mean of, in the order of the questions; empty where it is no mean, None where
            an earlier version has not kept it.
    """

    task: str
    metric: str
    shots: int
    value: float | None
    stderr: float | None
    questions: int
    source: str
    by_question: tuple[float, ...] | None = None

    def __str__(self) -> str:
        """Return the figure with its standard error; shares are in per cent."""
        if self.value is None:
            return "-"
        figure, error = self.value, self.stderr
        share = is_share(self.metric)
        shown = f"{100 * figure:.1f}" if share else f"{figure:.3f}"
        if error is None:
            return shown
        return f"{shown} ± {100 * error:.1f}" if share else f"{shown} ± {error:.3f}"


def is_share(metric: str) -> bool:
    """Return whether a metric, which a filter of the answers may follow in brackets, is a share of questions."""
    name = metric.partition(" (")[0]
    return name.startswith("acc") or name.endswith("_acc") or name in SHARES


def requested(config: TasksConfig) -> list[Request]:
    """Return the tasks that `config` names, each once."""
    names = [] if config.tasks is None else [name.strip() for name in config.tasks.split(",")]
    return [Request(name, config.shots) for name in dict.fromkeys(names)]


def questions(requests: Sequence[Request], config: TasksConfig) -> dict[str, dict[str, Any]]:
    """Return the settings and files that determine the questions of each task, by the task's name.

    Two scores can be compared only if these are the same.

    Raises:
        UsageError: if lm-eval is not installed, or a task is unknown.
    """
    local, manager = find_tasks(requests, config)
    asked = {}
    for request in requests:
        if request.task in local:
            source = sha256((Path(str(config.tasks_data)) / LOCAL[request.task].file).read_bytes()).hexdigest()
        else:
            file: Path | None = manager.task_index[request.task].yaml_path
            source = f"lm-eval {version('lm-eval')}"
            if config.tasks_path is not None and file is not None and file.is_relative_to(config.tasks_path):
                source = sha256(file.read_bytes()).hexdigest()
        asked[request.task] = {"shots": request.shots, "limit": config.limit, "source": source}
        if config.chat_template:
            asked[request.task]["chat_template"] = True
    return asked


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], config: TasksConfig
) -> list[Score]:
    """Return a model's scores on tasks. Questions come from a file in `config.tasks_data` (see `LOCAL`) if it exists.

    Raises:
        UsageError: if lm-eval is not installed, a task is unknown, or there is no chat template that is to be used.
        DarwinError: if a task's questions cannot be loaded.
    """
    local, manager = find_tasks(requests, config)
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    check_template(tokenizer, config)
    _forget_the_machine(evaluator)

    scores = []
    for request in requests:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)  # type: ignore[arg-type]
        try:
            loaded = manager.load([local.get(request.task, request.task)])
            results: Any = evaluator.simple_evaluate(
                model=lm,
                tasks=[loaded["groups"].get(request.task) or loaded["tasks"][request.task]],
                num_fewshot=request.shots,
                limit=config.limit,
                task_manager=manager,
                log_samples=True,
                apply_chat_template=config.chat_template,
            )
        except Exception as error:  # of any kind: the hub, the data set or the harness may fail
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DarwinError(
                f"the task {request.task} cannot be run ({reason}); check its name and that its questions can be had, "
                f"or name a directory of local ones with --tasks-data ({', '.join(LOCAL)})"
            ) from error
        source = f"{LOCAL[request.task].file} (local)" if request.task in local else f"lm-eval {version('lm-eval')}"
        scores += _scores(request, results, loaded["tasks"], source)
    return scores


def check_template(tokenizer: PreTrainedTokenizerBase, config: TasksConfig) -> None:
    """Raise `UsageError` if tasks are to be asked through a chat template, and there is none."""
    if config.chat_template and not tokenizer.chat_template:
        raise UsageError(
            "--chat-template: expected a model with a chat template, found none; take its instruct version, or leave "
            "the flag out"
        )


def _forget_the_machine(evaluator: Any) -> None:
    """Keep lm-eval from noting git's commit of the working directory and the machine's software, which nobody reads.

    Where there is no repository, git complains on the terminal; the machine's software costs a second for each task.
    """
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda _: None


def require_harness() -> None:
    """Raise `UsageError` if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("tasks need lm-eval, which is not installed: pip install '.[eval]' in a clone of darwinlm")


def find_tasks(requests: Sequence[Request], config: TasksConfig) -> tuple[dict[str, Any], Any]:
    """Return the configurations of the tasks that have a local file, by name, and lm-eval's manager of all others.

    Raises:
        UsageError: if lm-eval is not installed, or a task is unknown or a tag.
    """
    require_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    local = {} if config.tasks_data is None else local_tasks(Path(config.tasks_data), {r.task for r in requests})
    tasks_path = None if config.tasks_path is None else Path(config.tasks_path)
    if tasks_path is not None and not tasks_path.is_dir():
        raise UsageError(f"--tasks-path: no directory {tasks_path}; name one with task files (YAML)")
    names = {request.task for request in requests} - local.keys()
    manager = _manager(tasks_path, include_defaults=False)
    if names - set(manager.all_tasks):
        manager = _manager(tasks_path, include_defaults=True)
    unknown = sorted(names - set(manager.all_tasks))
    if unknown:
        harness = f"lm-eval {version('lm-eval')}"
        raise UsageError(f"--tasks: expected tasks of {harness}, found {unknown[0]!r}; `lm-eval ls tasks` lists them")
    for tag in sorted(names & set(manager.all_tags)):
        tagged = ", ".join(sorted(manager.task_index[tag].tags))
        raise UsageError(
            f"--tasks: expected tasks or groups, found {tag!r}, a tag without figures; name its tasks: {tagged}"
        )
    return local, manager


@cache
def _manager(tasks_path: Path | None, include_defaults: bool) -> Any:
    """Return lm-eval's manager of tasks. To read the 14,000 files of its own tasks takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=tasks_path, include_defaults=include_defaults)


def _scores(request: Request, results: Mapping[str, Any], tasks: Mapping[str, Any], source: str) -> list[Score]:
    """Return the scores of a task, or of a group as a whole. Raises `DarwinError` if it has none."""
    found = results["results"][request.task]
    counts = results.get("n-samples", {})
    inside = sorted(_leaves(request.task, results.get("group_subtasks", {})))
    count = sum(counts[name]["effective"] for name in inside if name in counts)
    shots = results.get("n-shot", {}).get(request.task, request.shots) or 0
    samples = [sample for name in inside for sample in results["samples"].get(name, ())]
    scores = [
        Score(
            request.task,
            name if kind == "none" else f"{name} ({kind})",
            shots,
            value,
            _number(found.get(f"{name}_stderr,{kind}")),
            count,
            source,
            figures(samples, name, kind, value),
        )
        for key, value in found.items()
        for name, _, kind in [key.partition(",")]
        if kind and not name.endswith("_stderr") and request.metric in (None, name)
    ]
    if not scores:
        missing, names = request.metric or "figure of its own", ", ".join(inside)
        raise DarwinError(f"the task {request.task} has no {missing}; name tasks that have one, of {names}")
    of_leaves = [likelihoods(tasks[name], results["samples"][name]) for name in inside if name in tasks]
    answers = tuple(round(one, 5) for leaf in of_leaves for one in leaf)
    if not all(of_leaves) or not all(map(math.isfinite, answers)):
        return scores
    error = stdev(answers) / math.sqrt(len(answers)) if len(answers) > 1 else None
    return [*scores, Score(request.task, LIKELIHOOD, shots, fmean(answers), error, count, source, answers)]


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """Return all tasks in a group and in the groups inside it; for a task, return the task itself."""
    inside = groups.get(task) or ()
    return {leaf for name in inside for leaf in _leaves(name, groups)} if inside else {task}


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None
