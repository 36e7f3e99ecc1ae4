"""What `compare` and `frontier` measure of every model: quality, speed and tasks, beside one dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.config.evaluation import TasksConfig
from darwinlm.config.run import EvaluationConfig
from darwinlm.data.corpus import Drawn
from darwinlm.evaluation.generation import continuations
from darwinlm.evaluation.quality import Quality, perplexity_and_kl
from darwinlm.evaluation.rows import answers_of
from darwinlm.evaluation.speed import speed
from darwinlm.evaluation.tasks import SUITE, Request, questions, requested, run_tasks
from darwinlm.model.size import parameter_bytes
from darwinlm.report.comparison import DENSE, HELD_OUT, Cell, read_cells, write_cells
from darwinlm.runtime.files import read_record, write_record
from darwinlm.runtime.progress import say
from darwinlm.types import UsageError

QUESTIONS = "questions.json"
METRICS = {request.task: request.metric for request in SUITE}


class Cells:
    """The cells that are measured, as `cells.jsonl` in a directory holds them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.of = {(cell.method, cell.kept): cell for cell in read_cells(directory)}

    def keep(self, cell: Cell) -> Cell:
        """Add a cell, or replace the one of the same method and size, and write the file."""
        self.of[cell.method, cell.kept] = cell
        write_cells(self.directory, self.of.values())
        return cell


@dataclass(frozen=True)
class Judge:
    """Measures models beside the dense one.

    Attributes:
        dense: the dense model.
        held_out, texts: text that no stage has seen; perplexity and KL are measured on all of it that counts.
        tokenizer: for the tasks.
        parts: those of `texts` that are parts of a mixture.
        of_dense: the dense model's last hidden states on each text, which all models are judged against.
    """

    dense: PreTrainedModel
    held_out: Drawn
    texts: dict[str, Drawn]
    tokenizer: PreTrainedTokenizerBase
    evaluation: EvaluationConfig
    tasks: TasksConfig
    parts: tuple[str, ...] = ()
    of_dense: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, cell: Cell, model: PreTrainedModel) -> Cell:
        """Return a model's cell with its size, perplexity, KL, speed beside the dense one, and what it writes."""
        models = {DENSE: self.dense, cell.method: model}
        quality = self._quality(models, self.held_out, HELD_OUT)[cell.method]
        speeds = speed(models, self.held_out.ids, self.evaluation)
        own = speeds[cell.method]
        prompts, length = self.evaluation.prompts, self.evaluation.continuation_tokens
        texts = {text: self._quality(models, judged, text)[cell.method] for text, judged in self.texts.items()}
        return replace(
            cell,
            bytes=parameter_bytes(model),
            perplexity=quality.perplexity,
            kl=quality.kl,
            prefill_tokens_per_s=own.prefill_tokens_per_s,
            decode_tokens_per_s=own.decode_tokens_per_s,
            speedup=(own.prefill_ratio.median, own.decode_ratio.median),
            uncertain_speed=own.prefill_ratio.wide or own.decode_ratio.wide,
            texts=texts,
            parts=self.parts,
            continuations=continuations(model, self.tokenizer, prompts, length),
            answers=answers_of(model, self.tokenizer, self.evaluation),
        )

    def quality_of(self, model: PreTrainedModel) -> Quality:
        """Return a model's perplexity on the held-out documents, and its KL from the dense model there."""
        return self._quality({DENSE: self.dense, "model": model}, self.held_out, HELD_OUT)["model"]

    def _quality(self, models: dict[str, PreTrainedModel], text: Drawn, name: str) -> dict[str, Quality]:
        return perplexity_and_kl(models, text.ids, self.of_dense[name], counts=text.counts)

    def with_scores(
        self, cells: Cells, cell: Cell, find_model: Callable[[], PreTrainedModel], requests: list[Request], place: str
    ) -> Cell:
        """The cell with the scores that are requested, in their order; the model runs the tasks that it has none of.

        Scores of versions that did not keep the answers to each question are measured again.

        Args:
            place: where in the whole work this is, for the log.
        """
        cell = replace(cell, scores=tuple(score for score in cell.scores if score.by_question is not None))
        answered = {score.task for score in cell.scores}
        left = [request for request in requests if request.task not in answered and cell.refused is None]
        if left:
            model = find_model()
            for request in left:
                say(f"{place}: {request.task}")
                scores = run_tasks(model, self.tokenizer, [request], self.tasks)
                cell = cells.keep(replace(cell, scores=(*cell.scores, *scores)))
        by_request = [score for request in requests for score in cell.scores if score.task == request.task]
        return replace(cell, scores=tuple(by_request))


def find_requests(config: TasksConfig, out: Path) -> tuple[list[Request], dict[str, Any]]:
    """The tasks, each by the metric that the paper's protocol takes, or by all that it has, and their questions.

    Args:
        out: the directory of the results, which may hold answers already.

    Raises:
        UsageError: if there is no such task, or the directory holds answers to other questions.
    """
    requests = [replace(request, metric=METRICS.get(request.task)) for request in requested(config)]
    asked = questions(requests, config) if requests else {}
    path = out / QUESTIONS
    before = read_record(path, "questions")["questions"] if path.exists() else {}
    for task in before.keys() & asked.keys():
        if before[task] != asked[task]:
            raise UsageError(
                f"{out} holds answers to other questions of {task} ({before[task]}, not {asked[task]}); choose "
                "another --out"
            )
    return requests, before | asked


def note_questions(asked: dict[str, Any], out: Path) -> None:
    """Write down which questions the answers in a directory are to."""
    if asked:
        write_record(out / QUESTIONS, {"questions": asked}, {})
