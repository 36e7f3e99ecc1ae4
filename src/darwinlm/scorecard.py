"""`darwinlm evaluate`: one protocol for any model, a table on the screen and the same as JSON."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.artifact import write_json
from darwinlm.data import TESTS, is_held_out, token_stream
from darwinlm.device import DTYPES, resolve_device
from darwinlm.evaluate import Quality, parameter_count, quality_over, windows_over
from darwinlm.evaluation_config import EvaluateConfig
from darwinlm.generation import Writing, write
from darwinlm.harness import SUITE, Score, requested, require_harness, run_tasks
from darwinlm.progress import say
from darwinlm.run import open_model, versions
from darwinlm.types import UsageError

DENSE = "dense"


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated, under the name that it has in the table."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Card:
    """What is known of one model.

    Attributes:
        qualities: by text; KL is None without a dense model of the same vocabulary.
    """

    name: str
    parameters: int
    qualities: dict[str, tuple[float, float | None]]
    writing: Writing | None
    scores: list[Score]


def evaluate_models(config: EvaluateConfig) -> list[Card]:
    """Measure the models that `config` names, print a table, and write the JSON that it asks for.

    Raises:
        UsageError: if nothing is to be measured, or a setting, model, text or task cannot be used.
        DarwinError: if a task's questions cannot be had.
    """
    if not config.asks_for_something:
        raise UsageError("nothing to measure: expected --data, --tasks, --suite, --generation or --speed; give one")
    requests = [*(SUITE if config.suite else ()), *requested(config)]
    if requests:
        require_harness()
    with tempfile.TemporaryDirectory(prefix="darwinlm-evaluate-") as workspace:
        subjects = _subjects(config, Path(workspace))
        dense = next((subject for subject in subjects if subject.name == DENSE), None)
        texts = [] if config.data is None else [part.strip() for part in config.data.split(",")]
        qualities = {text: _qualities(text, subjects, dense, config) for text in texts}
        cards = []
        for subject in subjects:
            reference = dense if dense is not None and _same_vocabulary(subject, dense) else None
            writing = _write(subject, reference, config) if config.generation else None
            if requests:
                say(f"tasks: {subject.name}")
            scores = run_tasks(subject.model, subject.tokenizer, requests, config) if requests else []
            quality = {text: qualities[text][subject.name] for text in texts}
            cards.append(Card(subject.name, parameter_count(subject.model), quality, writing, scores))
    save(cards, config)
    print(table(cards, config))
    return cards


def _subjects(config: EvaluateConfig, workspace: Path) -> list[Subject]:
    """The dense model first, then the model, then those beside it."""
    beside = [] if config.beside is None else [name.strip() for name in config.beside.split(",")]
    wanted = {} if config.against is None else {DENSE: config.against}
    for name in [config.model, *beside]:
        short = Path(name).name
        wanted[name if short in wanted else short] = name
    device = resolve_device(config.device)
    found = []
    for number, (label, name) in enumerate(wanted.items()):
        checkpoint = open_model(name, workspace / str(number))
        if config.data is not None:
            checkpoint.check_length(config.window, "window")
        dtype = DTYPES.get(config.dtype, checkpoint.dtype)
        found.append(Subject(label, checkpoint.load(dtype, device), checkpoint.tokenizer))
    return found


def _qualities(
    text: str, subjects: Sequence[Subject], dense: Subject | None, config: EvaluateConfig
) -> dict[str, tuple[float, float | None]]:
    """Perplexity and KL on one text. Models of another vocabulary than the dense one's have only the first."""
    comparable = [] if dense is None else [subject for subject in subjects if _same_vocabulary(subject, dense)]
    groups = [comparable, *([subject] for subject in subjects if subject not in comparable)]
    found: dict[str, tuple[float, float | None]] = {}
    for group in filter(None, groups):
        stream = read_text(text, group[0].tokenizer, config)
        windows = windows_over(stream, config.window, config.stride or config.window)
        models = {subject.name: subject.model for subject in group}
        qualities: Mapping[str, Quality] = quality_over(models, windows)
        for name, quality in qualities.items():
            found[name] = quality.perplexity, quality.kl if group is comparable else None
    return found


def read_text(text: str, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> Int[Tensor, " tokens"]:
    """The tokens of a text that `config` counts, at most `config.tokens`.

    Raises:
        UsageError: if the text is unknown, unreadable, or too short for a prediction.
    """
    stream = token_stream(text, tokenizer, config.tokens, lambda d: config.documents == "all" or is_held_out(d))
    if len(stream) < 2:
        raise UsageError(
            f"too little text in {text}: expected at least 2 tokens of {config.documents} documents, found "
            f"{len(stream)}; give more text, or --documents all"
        )
    return stream


def _same_vocabulary(one: Subject, other: Subject) -> bool:
    return one is other or one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def _write(subject: Subject, reference: Subject | None, config: EvaluateConfig) -> Writing:
    model = None if reference is None or reference is subject else reference.model
    return write(subject.model, subject.tokenizer, config.prompts, config.continuation_tokens, model)


def table(cards: Sequence[Card], config: EvaluateConfig) -> str:
    """A column a model, a row a measure, and below it how it was measured and what the models write."""
    rows = [["", *(card.name for card in cards)], ["parameters", *(f"{card.parameters:,}" for card in cards)]]
    for text in cards[0].qualities:
        found = [card.qualities[text] for card in cards]
        rows.append([f"perplexity, {text}", *(f"{perplexity:.3f}" for perplexity, _ in found)])
        if any(kl is not None for _, kl in found):
            rows.append([f"KL, {text}", *("" if kl is None else f"{kl:.4f}" for _, kl in found)])
    for scores in zip(*(card.scores for card in cards), strict=True):
        label = f"{scores[0].task}, {scores[0].metric}, {scores[0].shots}-shot"
        rows.append([label, *map(str, scores)])
    if config.suite:
        rows.append(["average of the suite", *(f"{100 * _average(card):.1f}" for card in cards)])
    written = [card.writing for card in cards if card.writing is not None]
    if written:
        rows.append(["repetition, %", *(f"{100 * writing.repetition:.1f}" for writing in written)])
        if any(writing.agreement is not None for writing in written):
            agreed = ("" if w.agreement is None else f"{100 * w.agreement:.1f}" for w in written)
            rows.append(["agreement with dense, %", *agreed])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{row[0]:{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    lines += ["", *(f"{what}: {how}" for what, how in protocol(cards, config).items())]
    for number, prompt in enumerate(config.prompts if written else ()):
        lines += ["", f"> {prompt}"]
        lines += [f"{card.name}: {card.writing.continuations[number]}" for card in cards if card.writing is not None]
    return "\n".join(line.rstrip() for line in lines)


def _average(card: Card) -> float:
    return math.fsum(score.value for score in card.scores[: len(SUITE)]) / len(SUITE)


def protocol(cards: Sequence[Card], config: EvaluateConfig) -> dict[str, str]:
    """How the figures came about, for people."""
    how = {}
    if config.data is not None:
        stride = config.stride or config.window
        windows = "disjoint" if stride == config.window else f"each {stride} tokens further, none counted twice"
        own = [f"{text}: its {TESTS[text].partition('-')[2]} set" for text in cards[0].qualities if text in TESTS]
        others = [f"{config.documents} documents"] if len(own) < len(cards[0].qualities) else []
        what = "; ".join([*own, *others])
        how["perplexity"] = f"windows of {config.window} tokens, {windows}; at most {config.tokens:,} tokens; {what}"
    if config.against is not None and config.data is not None:
        how["KL"] = f"KL({config.against} || model) in nats a token"
    if config.generation:
        how["repetition"] = "share of 4-grams of tokens that the continuation had before"
        if config.against is not None:
            how["agreement"] = "share of the dense model's greedy tokens that the model would have chosen there"
    if cards[0].scores:
        sources = dict.fromkeys(
            f"{score.task} from {score.source}, {score.questions:,} questions" for score in cards[0].scores
        )
        how["tasks"] = "; ".join(sources)
    return how


def save(cards: Sequence[Card], config: EvaluateConfig, speed: Mapping[str, Any] | None = None) -> None:
    """Write the JSON that `config` asks for, if it does: what is known of every model, and what `--speed` measured."""
    if config.out is None:
        return
    models = [
        {
            "model": card.name,
            "parameters": card.parameters,
            "texts": {text: {"perplexity": p, "kl": kl} for text, (p, kl) in card.qualities.items()},
            "tasks": [asdict(score) for score in card.scores],
            "generation": None if card.writing is None else asdict(card.writing),
        }
        for card in cards
    ]
    how = {"protocol": protocol(cards, config) if cards else {}, "settings": asdict(config), "versions": versions()}
    write_json(Path(config.out), {"models": models, **({} if speed is None else {"speed": dict(speed)}), **how})
