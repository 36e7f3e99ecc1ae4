"""`darwinlm evaluate`: measure any model by one protocol, and print a table or write JSON."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.commands.cards import DENSE, Card, save, table
from darwinlm.commands.run_directory import open_model
from darwinlm.config.evaluation import EvaluateConfig, SpeedConfig
from darwinlm.data.corpus import is_held_out, parts_of, stream_beside
from darwinlm.data.packing import bos_of, check_ids
from darwinlm.evaluation.answering import Answers, answer
from darwinlm.evaluation.drafting import Drafting, drafting
from darwinlm.evaluation.generation import Writing, write
from darwinlm.evaluation.positions import Range, by_position, long_windows
from darwinlm.evaluation.prompts import chat_prompts
from darwinlm.evaluation.quality import Window, quality_over, windows_over
from darwinlm.evaluation.speed import count, measure
from darwinlm.evaluation.tasks import SUITE, Request, Score, check_template, find_tasks, requested, run_tasks
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count
from darwinlm.runtime.device import DTYPES, resolve_device
from darwinlm.runtime.progress import say
from darwinlm.runtime.scratch import scratch_directory
from darwinlm.runtime.timing import Ratio
from darwinlm.types import DarwinError, UsageError


class Subject:
    """A model that is evaluated, and its name in the table; its weights are read when they are asked for."""

    def __init__(self, name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.name = name
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        self.vocabulary = checkpoint.config.vocab_size
        self._place = dtype, device

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, on its device."""
        return self.checkpoint.load(*self._place)

    def forget(self) -> None:
        """Free the model."""
        self.__dict__.pop("model", None)


def evaluate(config: EvaluateConfig, timing: SpeedConfig, speed: bool = False) -> None:
    """Measure what `config` asks for and, if `speed` is set, how fast the model is beside the dense one.

    Raises:
        UsageError: if speed is to be measured without a dense model; else as `evaluate_models` and `compare_speed`.
        DarwinError: as `evaluate_models`.
    """
    if speed and config.against is None:
        raise UsageError("--speed is beside the dense model: expected --against, found none; name it")
    with scratch_directory("evaluate") as workspace:
        timed = open_model(config.model, workspace).path if speed else None
        cards = evaluate_models(config) if config.asks_for_something or not speed else []
        if timed is not None:
            save(cards, config, compare_speed(timed, str(config.against), timing, config.device, config.dtype))


def evaluate_models(config: EvaluateConfig) -> list[Card]:
    """Measure the models that `config` names, print a table, and write the JSON that it asks for.

    Raises:
        UsageError: if nothing is to be measured, or a setting, model, text or task cannot be used.
        DarwinError: if a task cannot be run, after all else has been measured, printed and written.
    """
    if not config.asks_for_something:
        raise UsageError(
            "nothing to measure: expected --data, --tasks, --suite, --generation, --chat, --draft or --speed; give one"
        )
    requests = [*(SUITE if config.suite else ()), *requested(config)]
    if requests:
        find_tasks(requests, config)
    _check_file(config)
    with scratch_directory("evaluate") as workspace:
        subjects = _subjects(config, workspace)
        dense = None if config.against is None else subjects[0]
        windows = _Windows(config)
        cards = []
        for subject in subjects:
            reference = dense if dense is not None and _same_vocabulary(subject, dense) else None
            cards.append(_measure(subject, reference, windows, requests, config))
            if subject is not dense:  # so that no more than two models are on the device
                subject.forget()
    print(table(cards, config))
    save(cards, config)
    for score in (score for card in cards for score in card.scores if score.value is None):
        raise DarwinError(score.source)
    return cards


class _Windows:
    """The windows of each text in a tokenizer's tokens, and the dense model's last hidden states on them."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.texts = [] if config.data is None else parts_of(config.data)
        self.of_dense: dict[str, list[Tensor]] = defaultdict(list)
        self._cut: dict[tuple[str, int, str], list[Window]] = {}

    def of(self, text: str, subject: Subject) -> list[Window]:
        """The windows of a text. Raises as `read_text` and `check_ids`."""
        length = self.config.window
        return self._cut_once(text, subject, partial(windows_over, length=length, stride=self.config.stride or length))

    def long(self, text: str, subject: Subject, length: int) -> list[Window]:
        """The windows of a text in which positions are told apart. Raises as `of`."""
        return self._cut_once(text, subject, partial(long_windows, length=length))

    def _cut_once(self, text: str, subject: Subject, cut: partial[list[Window]]) -> list[Window]:
        key = text, id(subject), cut.func.__name__
        if key not in self._cut:
            stream, counts = read_text(text, subject.tokenizer, self.config)
            check_ids(stream, subject.vocabulary)
            self._cut[key] = cut(stream, bos=bos_of(subject.tokenizer), counts=counts)
        return self._cut[key]


def _measure(
    subject: Subject, reference: Subject | None, windows: _Windows, requests: Sequence[Request], config: EvaluateConfig
) -> Card:
    """The card of a model; without a reference, the dense model of the same vocabulary, it has no KL."""
    qualities = {text: _quality(text, subject, reference, windows) for text in windows.texts}
    writing = _write(subject, reference, config) if config.generation else None
    scores = [score for request in requests for score in _ask(subject, request, config)]
    drafted = _draft(subject, reference, config) if config.draft else None
    long = [] if config.positions is None else windows.texts
    positions = {text: _positions(text, subject, reference, windows) for text in long}
    answers = _answer(subject, config) if config.chat is not None else None
    return Card(subject.name, parameter_count(subject.model), qualities, writing, scores, drafted, positions, answers)


def _answer(subject: Subject, config: EvaluateConfig) -> Answers:
    """A model's answers to chat prompts."""
    return answer(subject.model, subject.tokenizer, _prompts(subject, config), config.answer_tokens, config.batch_size)


def _prompts(subject: Subject, config: EvaluateConfig) -> list[list[int]]:
    """The chat prompts, in a model's tokens. Raises as `chat_prompts`."""
    room = config.chat_prompts, config.answer_tokens
    return chat_prompts(str(config.chat), subject.tokenizer, subject.checkpoint.config, *room, "chat")


def _quality(text: str, subject: Subject, reference: Subject | None, windows: _Windows) -> tuple[float, float | None]:
    """Perplexity and, beside a reference, KL on one text."""
    if reference is None:
        own = quality_over({subject.name: subject.model}, windows.of(text, subject))[subject.name]
        return own.perplexity, None
    models = {reference.name: reference.model, subject.name: subject.model}
    found = quality_over(models, windows.of(text, reference), windows.of_dense[text])[subject.name]
    return found.perplexity, found.kl


def _positions(text: str, subject: Subject, reference: Subject | None, windows: _Windows) -> list[Range]:
    """Loss and, beside a reference, KL by position on one text."""
    length = _longest(windows.config, subject.checkpoint if reference is None else reference.checkpoint)
    if reference is None:
        return by_position(subject.model, windows.long(text, subject, length))
    kept = windows.of_dense[f"{text}, by position"]
    return by_position(subject.model, windows.long(text, reference, length), reference.model, kept)


def _longest(config: EvaluateConfig, checkpoint: Checkpoint) -> int:
    """The tokens of a window in which positions are told apart. Raises `UsageError` if the model does not say."""
    if config.positions != "context":
        return config.positions or 0
    length = getattr(checkpoint.config, "max_position_embeddings", None)
    if length is None:
        raise UsageError("--positions: expected a model that says how many positions it has, found none; give a number")
    return length


def _check_file(config: EvaluateConfig) -> None:
    """Raise `UsageError` if the JSON could not be written, before anything is measured for it."""
    if config.out is None:
        return
    out = Path(config.out).absolute()
    parent = next(parent for parent in out.parents if parent.exists())
    if out.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--out: expected a file that can be written, found {config.out}; name another")


def _ask(subject: Subject, request: Request, config: EvaluateConfig) -> list[Score]:
    """A model's scores in a task; one without a value gives the reason if the task fails, for others took hours."""
    say(f"tasks: {subject.name}, {request.task}")
    try:
        return run_tasks(subject.model, subject.tokenizer, [request], config)
    except DarwinError as error:
        return [Score(request.task, request.metric or "-", request.shots or 0, None, None, 0, str(error))]


def _subjects(config: EvaluateConfig, workspace: Path) -> list[Subject]:
    """Find the dense model, then the model, then those of `--beside`."""
    beside = [] if config.beside is None else [name.strip() for name in config.beside.split(",")]
    models = {} if config.against is None else {DENSE: config.against}
    for name in [config.model, *beside]:
        short = Path(name).name
        models[name if short in models or short == DENSE else short] = name
    device = resolve_device(config.device)
    subjects = []
    for number, (label, name) in enumerate(models.items()):
        checkpoint = open_model(name, workspace / str(number))
        if config.data is not None:
            checkpoint.check_length(config.window, "window")
        if config.positions is not None:
            checkpoint.check_length(_longest(config, checkpoint), "positions")
        if config.generation or config.draft:
            checkpoint.check_length(config.continuation_tokens, "continuation-tokens")
        dtype = DTYPES.get(config.dtype, checkpoint.dtype)
        check_template(checkpoint.tokenizer, config)
        assert checkpoint.headers  # that its files can be read, before others are measured
        subjects.append(Subject(label, checkpoint, dtype, device))
        if config.chat is not None:
            _prompts(subjects[-1], config)  # raises if there are none, before others are measured
    return subjects


def read_text(
    text: str, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig
) -> tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"] | None]:
    """The tokens of a text's documents, at most `config.tokens`, and the predictions of which count; None if all do.

    Raises:
        UsageError: if the text is unknown, unreadable, or too short for a prediction.
    """
    stream = stream_beside(text, tokenizer, config.tokens, lambda d: config.documents == "all" or is_held_out(d))
    if len(stream) < 2:
        raise UsageError(
            f"too little text in {text}: expected at least 2 tokens of {config.documents} documents, found "
            f"{len(stream)}; give more text, or --documents all"
        )
    ids = torch.tensor(stream.ids[: config.tokens], dtype=torch.long)
    if config.loss_tokens == "all" or stream.all_count:
        return ids, None
    return ids, torch.tensor(list(stream.counts[: config.tokens]), dtype=torch.bool)


def _same_vocabulary(one: Subject, other: Subject) -> bool:
    """Whether two models have the same tokens, and as many logits, which may be more than there are tokens."""
    if one is other:
        return True
    return one.vocabulary == other.vocabulary and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def _write(subject: Subject, reference: Subject | None, config: EvaluateConfig) -> Writing:
    model = None if reference is None or reference is subject else reference.model
    return write(subject.model, subject.tokenizer, config.prompts, config.continuation_tokens, model)


def _draft(subject: Subject, reference: Subject | None, config: EvaluateConfig) -> Drafting | None:
    """What a model is worth as the dense model's draft; nothing for the dense model, or one of other tokens."""
    if reference is None or reference is subject:
        return None
    return drafting(
        reference.model,
        subject.model,
        subject.tokenizer,
        config.prompts,
        config.continuation_tokens,
        config.draft_tokens,
    )


def compare_speed(directory: Path, dense: str, config: SpeedConfig, device: str, dtype: str) -> dict[str, Any]:
    """Print how fast the model in `directory` is beside the dense one, and the speed-ups that operations predict.

    Returns:
        What was measured of both models, and the measured and the predicted speed-ups.

    Args:
        dense: a directory, a hub id, a .gguf file, or smollm2-135m.
        dtype: precision of both; auto is that in which each is stored.

    Raises:
        UsageError: if there is no such model or device.
    """
    where = resolve_device(device)
    with scratch_directory("speed") as workspace:
        checkpoints = {"dense": find_checkpoint(dense, workspace), "model": Checkpoint(directory)}
        for checkpoint in checkpoints.values():
            checkpoint.check_length(config.prompt_tokens + config.new_tokens, "prompt-tokens")
        loaded: dict[str, Any] = {name: load(checkpoint.path, dtype) for name, checkpoint in checkpoints.items()}
    models: dict[str, PreTrainedModel] = {name: model.to(where) for name, model in loaded.items()}
    before, after = measure(models, config).values()
    counted_before, counted_after = (count(model, config) for model in models.values())
    predicted = {
        "prefill": counted_before.prefill_flops / counted_after.prefill_flops,
        "decode": counted_before.decode_bytes / counted_after.decode_bytes,
    }
    speedups = {
        "prefill": Ratio.of(before.prefill_seconds, after.prefill_seconds),
        "decode": Ratio.of(before.decode_seconds, after.decode_seconds),
    }
    rows = [("", "dense", "model", "")]
    rows += [("parameters", *(f"{parameter_count(model):,}" for model in models.values()), "")]
    rows += [
        (f"{stage}, tokens/s", f"{a:.1f}", f"{b:.1f}", f"{speedups[stage]}; {predicted[stage]:.2f}x predicted")
        for stage, a, b in (
            ("prefill", before.prefill_tokens_per_s, after.prefill_tokens_per_s),
            ("decode", before.decode_tokens_per_s, after.decode_tokens_per_s),
        )
    ]
    rows += [("time to first token, s", f"{before.first_token_s:.3f}", f"{after.first_token_s:.3f}", "")]
    rows += [("KV cache, MB", f"{before.cache_bytes / 1e6:.1f}", f"{after.cache_bytes / 1e6:.1f}", "")]
    rows += [("peak memory, MB", _megabytes(before.peak_bytes), _megabytes(after.peak_bytes), "")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, left, right, note in rows:
        print(f"{name:{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}  {note}".rstrip())
    if any(ratio.wide for ratio in speedups.values()):
        print("? a wide range: this machine did other work meanwhile; measure again when it does not")
    ranges = {stage: ratio._asdict() for stage, ratio in speedups.items()}
    return {"dense": asdict(before), "model": asdict(after), "speedup": ranges, "predicted": predicted}


def _megabytes(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 1e6:.0f}"
