"""The text of a run, drawn for each of its stages."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Bool, Int
from torch import Tensor

from darwinlm.config.run import RunConfig, SearchConfig, Stage
from darwinlm.data.corpus import Corpus, Drawn
from darwinlm.runtime.progress import say
from darwinlm.types import SelectionStage, UsageError


def draw_tokens(
    corpus: Corpus, config: RunConfig, until: Stage = "report"
) -> dict[str, Int[Tensor, "sequences length"]]:
    """The ids of `draw_counted`. Raises as it does."""
    return {purpose: drawn.ids for purpose, drawn in draw_counted(corpus, config, until).items()}


def draw_counted(corpus: Corpus, config: RunConfig, until: Stage = "report") -> dict[str, Drawn]:
    """Disjoint tokens for each stage up to `until`, and which predictions count.

    Raises:
        UsageError: if there is too little text, or nothing in a stage's counts.
    """
    counts = _token_counts(config)
    if until == "database":
        return corpus.draw_counted(calibration=counts["calibration"])
    purposes = ("calibration", "search", "training") if until == "search" else tuple(counts)
    drawn = corpus.draw_counted(**{purpose: counts[purpose] for purpose in purposes})
    expect_answers(drawn["search"].counts, config.search)
    if until == "search":
        return drawn
    return drawn | {"evaluation": corpus.draw_held_out_counted(config.evaluation.tokens)}


def expect_answers(counts: Bool[Tensor, "sequences length"] | None, config: SearchConfig) -> None:
    """Raise `UsageError` if a stage of the search has no token that counts.

    Args:
        counts: of the search's text, for every token whether the prediction after it counts; None if all do.
    """
    if counts is None:
        return
    last = int(config.metric == "perplexity")  # after the last token of a sequence, it predicts none
    for stage in config.stages:
        sequences, rest = divmod(stage.fitness_tokens, counts.shape[1])
        whole = counts[:sequences, : counts.shape[1] - last]
        if not (whole.any() or counts[sequences : sequences + 1, : max(0, rest - last)].any()):
            raise UsageError(
                f"--search.stages: expected answers of an assistant within the first {stage.fitness_tokens:,} tokens "
                "of the search, found none; give the stage more fitness_tokens, or take --loss-tokens all"
            )


def tokens_taken(config: RunConfig) -> tuple[int, int]:
    """The tokens that all stages take together, and those that are held out."""
    return sum(_token_counts(config).values()), config.evaluation.tokens


def _token_counts(config: RunConfig) -> dict[str, int]:
    """The tokens that each stage takes from the documents that are not held out, in the order of the stages."""
    stages = config.search.stages
    return {
        "calibration": config.calibration.tokens,
        "search": max(stage.fitness_tokens for stage in stages),
        "training": max(stage.training_tokens for stage in stages),
        "refit": config.refit.tokens,
    }


def apart(
    drawn: Mapping[str, Drawn],
) -> tuple[dict[str, Int[Tensor, "_ length"]], dict[str, Bool[Tensor, "_ length"]]]:
    """The ids by purpose, and which predictions count, for purposes where not all do."""
    counts = {purpose: blocks.counts for purpose, blocks in drawn.items() if blocks.counts is not None}
    return {purpose: blocks.ids for purpose, blocks in drawn.items()}, counts


def fit_to_text(corpus: Corpus, config: RunConfig) -> RunConfig:
    """The settings with every stage's tokens scaled down, by one factor, to the text that there is.

    Stages take whole sequences, at least one each. The counts do not depend on how far a run goes, so that all commands
    on one directory agree on them.

    Raises:
        UsageError: if there is less text than a sequence for each stage, and one that is held out.
    """
    length, counts = corpus.sequence_length, _token_counts(config)
    tokens, stages = _fitted(corpus, counts, held_out=False), sum(count > 0 for count in counts.values())
    held_out = _fitted(corpus, {"evaluation": config.evaluation.tokens}, held_out=True)
    if tokens is None or held_out is None:
        there, judged = (min(corpus.available(stages, held_out=kept)) for kept in (False, True))
        each = " in each source" if len(corpus.sources) > 1 else ""
        raise UsageError(
            f"--fit-data: expected a sequence of {length} tokens for each of {stages} stages and one held out{each}, "
            f"found {there} and {judged}; give more text or lower --calibration.sequence-length"
        )
    judged_on = held_out["evaluation"]
    if tokens == counts and judged_on == config.evaluation.tokens:
        return config
    parts = ", ".join(f"{purpose} {count:,}" for purpose, count in [*tokens.items(), ("evaluation", judged_on)])
    say(f"--fit-data: the text has tokens for {parts}")

    def scaled(stage: SelectionStage) -> SelectionStage:
        fitness, training = stage.fitness_tokens, stage.training_tokens
        return replace(
            stage,
            fitness_tokens=max(1, fitness * tokens["search"] // counts["search"]),
            training_tokens=training * tokens["training"] // max(counts["training"], 1),
        )

    return replace(
        config,
        calibration=replace(config.calibration, tokens=tokens["calibration"]),
        search=replace(config.search, stages=tuple(map(scaled, config.search.stages))),
        refit=replace(config.refit, tokens=tokens["refit"]),
        evaluation=replace(config.evaluation, tokens=judged_on),
    )


def _fitted(corpus: Corpus, counts: dict[str, int], held_out: bool) -> dict[str, int] | None:
    """The largest share of `counts` for which there is text, in whole sequences; None if there is not one for each."""
    length, purposes = corpus.sequence_length, sum(count > 0 for count in counts.values())
    wanted = {purpose: -(-count // length) for purpose, count in counts.items()}
    spare = sum(wanted.values()) - purposes  # sequences beyond the first of each purpose
    there = corpus.available(spare + purposes, held_out)

    def scaled(kept: int) -> dict[str, int]:
        sequences = {name: 1 + (count - 1) * kept // max(spare, 1) if count else 0 for name, count in wanted.items()}
        return {name: min(length * count, counts[name]) for name, count in sequences.items()}

    def too_much(kept: int) -> bool:
        return any(needed > present for needed, present in zip(corpus.needed(scaled(kept)), there, strict=True))

    kept = bisect_left(range(spare + 1), True, key=too_much) - 1
    return None if kept < 0 else scaled(kept)


def draw_texts(corpus: Corpus, config: RunConfig) -> dict[str, Drawn]:
    """The further texts that models are judged on. Raises `UsageError` if one cannot be read or is too short."""
    return {text: corpus.draw_beside_counted(text, config.evaluation.tokens) for text in config.evaluation.texts}
