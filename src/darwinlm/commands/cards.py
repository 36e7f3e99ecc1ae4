"""What `darwinlm evaluate` found, as a table for the screen and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from darwinlm.commands.run_directory import versions
from darwinlm.config.evaluation import EvaluateConfig
from darwinlm.data.corpus import TESTS
from darwinlm.evaluation.answering import Answers
from darwinlm.evaluation.drafting import Drafting, rows_of
from darwinlm.evaluation.generation import Writing
from darwinlm.evaluation.paired import NOTE, Difference, difference
from darwinlm.evaluation.positions import Range
from darwinlm.evaluation.tasks import LIKELIHOOD, SUITE, Score, is_share
from darwinlm.report import answering
from darwinlm.runtime.files import write_json

DENSE = "dense"


@dataclass(frozen=True)
class Card:
    """The measurements of one model.

    Attributes:
        qualities: perplexity and KL by text; KL is None without a dense model of the same vocabulary.
        writing: its greedy continuations, if they were asked for.
        answers: its answers to chat prompts, if they were asked for.
        positions: loss and KL by position, by text, if they were asked for.
        drafting: what it is worth as the dense model's draft, if that was asked for and both have the same tokens.
        scores: its scores in tasks.
    """

    name: str
    parameters: int
    qualities: dict[str, tuple[float, float | None]]
    writing: Writing | None
    scores: list[Score]
    drafting: Drafting | None = None
    positions: dict[str, list[Range]] = field(default_factory=dict)
    answers: Answers | None = None


def table(cards: Sequence[Card], config: EvaluateConfig) -> str:
    """A table with a column for each model and a row for each measure; below it the protocol and the continuations."""
    rows = [["", *(card.name for card in cards)], ["parameters", *(f"{card.parameters:,}" for card in cards)]]
    for text in cards[0].qualities:
        qualities = [card.qualities[text] for card in cards]
        rows.append([f"perplexity, {text}", *(f"{perplexity:.3f}" for perplexity, _ in qualities)])
        if any(kl is not None for _, kl in qualities):
            rows.append([f"KL, {text}", *("" if kl is None else f"{kl:.4f}" for _, kl in qualities)])
    rows += [row for text in cards[0].positions for row in _position_rows(cards, text)]
    rows += _score_rows(cards)
    if config.suite:
        rows.append(["average of the suite", *map(_average, cards)])
    written = [card.writing for card in cards if card.writing is not None]
    if written:
        repeated = ("" if w.repetition is None else f"{100 * w.repetition:.1f}" for w in written)
        rows.append(["repetition, %", *repeated])
        if any(writing.agreement is not None for writing in written):
            agreed = ("" if w.agreement is None else f"{100 * w.agreement:.1f}" for w in written)
            rows.append(["agreement with dense, %", *agreed])
    answers = answering.rows_of([card.answers for card in cards], _dense_answers(cards))
    rows += [[name, *row] for name, row in answers.items() if any(row)]
    rows += rows_of([card.drafting for card in cards])
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


def _dense_answers(cards: Sequence[Card]) -> Answers | None:
    return cards[0].answers if cards and cards[0].name == DENSE else None


def _position_rows(cards: Sequence[Card], text: str) -> list[list[str]]:
    """A row for the loss at each range of positions, and one for KL; models of other tokens may have fewer ranges."""
    by_name = [{at.name: at for at in card.positions[text]} for card in cards]
    rows = []
    for name in dict.fromkeys(name for ranges in by_name for name in ranges):
        found = [ranges.get(name) for ranges in by_name]
        rows.append([f"loss at {name}, {text}", *("" if at is None else f"{at.loss:.3f}" for at in found)])
        if any(at is not None and at.kl is not None for at in found):
            shown = ("" if at is None or at.kl is None else f"{at.kl:.4f}" for at in found)
            rows.append([f"KL at {name}, {text}", *shown])
    return rows


def _score_rows(cards: Sequence[Card]) -> list[list[str]]:
    """A row for each task and metric, and below it the difference from the dense model on the same questions."""
    rows, by_key = [], [{(score.task, score.metric, score.shots): score for score in card.scores} for card in cards]
    for key in dict.fromkeys(key for scores in by_key for key in scores):
        task, metric, shots = key
        of_cards = [scores.get(key) for scores in by_key]
        rows.append([f"{task}, {metric}, {shots}-shot", *("-" if each is None else str(each) for each in of_cards)])
        found = [None if each is None or not at else _beside(each, cards) for at, each in enumerate(of_cards)]
        if any(found):
            texts = ["" if each is None else each.text(is_share(metric)) for each in found]
            rows.append(["  beside dense", *texts])
    return rows


def _beside(score: Score, cards: Sequence[Card]) -> Difference | None:
    """How a score differs from the dense model's, if there is one and both have the same questions."""
    if not cards or cards[0].name != DENSE:
        return None
    key = score.task, score.metric, score.shots
    others = (other for other in cards[0].scores if (other.task, other.metric, other.shots) == key)
    return next((difference(score.by_question, other.by_question) for other in others), None)


def _average(card: Card) -> str:
    """The mean over the suite's tasks in per cent, or a dash if one of them has no score."""
    own = [score for score in card.scores if score.metric != LIKELIHOOD][: len(SUITE)]
    values = [score.value for score in own if score.value is not None]
    return f"{100 * math.fsum(values) / len(SUITE):.1f}" if len(values) == len(SUITE) else "-"


def protocol(cards: Sequence[Card], config: EvaluateConfig) -> dict[str, str]:
    """How the figures were measured, as sentences by topic."""
    how = {}
    if config.data is not None:
        stride = config.stride or config.window
        windows = "disjoint" if stride == config.window else f"each {stride} tokens further, none counted twice"
        own = [f"{text}: its {TESTS[text].partition('-')[2]} set" for text in cards[0].qualities if text in TESTS]
        others = [f"{config.documents} documents"] if len(own) < len(cards[0].qualities) else []
        what = "; ".join([*own, *others])
        how["perplexity"] = (
            f"windows of {config.window} tokens, {windows}, after a BOS where the tokenizer adds one; at most "
            f"{config.tokens:,} tokens; {what}; of a token, so not comparable across tokenizers"
        )
    if config.against is not None and config.data is not None:
        how["KL"] = f"KL({config.against} || model) in nats a token"
    if config.positions is not None:
        how["positions"] = (
            "tokens before a token in its window; disjoint windows of joined documents, as long as the last position"
        )
    if config.generation:
        how["repetition"] = "share of 4-grams of tokens that the continuation had before"
        if config.against is not None:
            how["agreement"] = "share of the dense model's greedy tokens that the model would have chosen there"
    if any(card.drafting for card in cards):
        how["draft"] = f"{config.draft_tokens} tokens at a time, greedy, {config.continuation_tokens} after each prompt"
    if cards[0].answers is not None:
        how["answers"] = answering.note(cards[0].answers)
    if _dense_answers(cards) is not None and len(cards) > 1:
        how["beside dense"] = NOTE.partition(": ")[2]
    if any(_beside(score, cards) for card in cards[1:] for score in card.scores):
        how[LIKELIHOOD] = "of the correct answer, in nats a question; it moves where accuracy does not yet"
        how["beside dense"] = NOTE.partition(": ")[2]
    if cards[0].scores:
        sources = dict.fromkeys(
            f"{score.task} from {score.source}, {score.questions:,} questions"
            for score in cards[0].scores
            if score.value is not None
        )
        how["tasks"] = "; ".join([*sources, *dict.fromkeys(s.source for s in cards[0].scores if s.value is None)])
    return how


def save(cards: Sequence[Card], config: EvaluateConfig, speed: Mapping[str, Any] | None = None) -> None:
    """Write the JSON that `config` asks for, if any: the measurements of every model, and of `--speed`."""
    if config.out is None:
        return
    models = [
        {
            "model": card.name,
            "parameters": card.parameters,
            "texts": {text: {"perplexity": p, "kl": kl} for text, (p, kl) in card.qualities.items()},
            "positions": {text: [asdict(at) for at in ranges] for text, ranges in card.positions.items()},
            "tasks": [_score_record(score, cards if number else ()) for score in card.scores],
            "generation": None if card.writing is None else asdict(card.writing),
            "answers": None if card.answers is None else answering.record(card.answers, _dense_answers(cards)),
            "draft": None if card.drafting is None else asdict(card.drafting),
        }
        for number, card in enumerate(cards)
    ]
    how = {"protocol": protocol(cards, config) if cards else {}, "settings": asdict(config), "versions": versions()}
    write_json(Path(config.out), {"models": models, **({} if speed is None else {"speed": dict(speed)}), **how})


def _score_record(score: Score, cards: Sequence[Card]) -> dict[str, Any]:
    """A score as JSON has it, with the difference from the dense model in place of the answers to each question."""
    beside = _beside(score, cards)
    found = None if beside is None else asdict(beside) | {"real": beside.real}
    return {k: v for k, v in asdict(score).items() if k != "by_question"} | {"beside_dense": found}
