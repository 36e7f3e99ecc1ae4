"""What lm-eval's samples say of each question by itself, so that models can be compared question by question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from statistics import fmean
from typing import Any

Sample = Mapping[str, Any]


def likelihoods(task: Any, samples: Sequence[Sample]) -> tuple[float, ...]:
    """Return the log-likelihood of the correct answer to every question, in nats, as lm-eval has computed it.

    Where several answers are correct, it is that of any of them. A task that is not answered by likelihoods has none.

    Args:
        task: lm-eval's object of the task.
        samples: the task's samples, as lm-eval logs them.
    """
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return ()
    return tuple(_likelihood(task, sample) for sample in _of_one_filter(samples))


def _likelihood(task: Any, sample: Sample) -> float:
    found = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
    if task.OUTPUT_TYPE == "loglikelihood":
        return found[0]
    likely = [found[index] for index in _correct(task, sample)]
    peak = max(likely, default=-math.inf)
    if not math.isfinite(peak):
        return math.nan
    return peak + math.log(math.fsum(math.exp(one - peak) for one in likely))


def _correct(task: Any, sample: Sample) -> list[int]:
    """The places of the correct answers among the choices. With several contexts, the "text" of a task is the place."""
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    choices = task.doc_to_choice(sample["doc"])
    places = [choices.index(one) if isinstance(one, str) else int(one) for one in _listed(gold)]
    return [place for place in dict.fromkeys(places) if 0 <= place < len(choices)]


def _listed(gold: Any) -> Iterable[Any]:
    return gold if isinstance(gold, list) else [gold]


def _of_one_filter(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the first filter: lm-eval repeats every question for each filter of the answers."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def figures(samples: Sequence[Sample], metric: str, kind: str, mean: Any) -> tuple[float, ...]:
    """Return a metric's figure for every question; none if the metric is not their mean.

    Args:
        kind: the name of the filter of the answers.
        mean: the metric's figure over all questions.
    """
    found = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    numbers = tuple(float(one) for one in found if isinstance(one, Real))
    if len(numbers) < len(found) or not numbers or not isinstance(mean, Real):
        return ()
    return numbers if math.isclose(fmean(numbers), float(mean), abs_tol=1e-6) else ()
