"""The text of a run, drawn for each of its stages."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from darwinlm.config.run import RunConfig, SearchConfig, Stage
from darwinlm.data.corpus import Corpus, scramble
from darwinlm.runtime.progress import say
from darwinlm.types import SelectionStage, UsageError


def draw_tokens(
    corpus: Corpus, config: RunConfig, until: Stage = "report"
) -> dict[str, Int[Tensor, "sequences length"]]:
    """Disjoint tokens for each stage up to `until`. Raises `UsageError` if there is too little text."""
    counts = _token_counts(config)
    if until == "database":
        return corpus.draw(calibration=counts["calibration"])
    if until == "search":
        return corpus.draw(**{purpose: counts[purpose] for purpose in ("calibration", "search", "training")})
    return corpus.draw(**counts) | {"evaluation": corpus.draw_held_out(config.evaluation.tokens)}


def _token_counts(config: RunConfig) -> dict[str, int]:
    """The tokens that each stage takes from the documents that are not held out, in the order of the stages."""
    stages = config.search.stages
    return {
        "calibration": config.calibration.tokens,
        "search": max(stage.fitness_tokens for stage in stages),
        "training": max(stage.training_tokens for stage in stages),
        "refit": config.refit.tokens,
    }


def fit_to_text(corpus: Corpus, config: RunConfig) -> RunConfig:
    """The settings with every stage's tokens scaled down, by one factor, to the text that there is.

    Stages take whole sequences, at least one each. The counts do not depend on how far a run goes, so that all commands
    on one directory agree on them.

    Raises:
        UsageError: if there is less text than a sequence for each stage, and one that is held out.
    """
    length, counts = corpus.sequence_length, _token_counts(config)
    wanted = {purpose: -(-tokens // length) for purpose, tokens in counts.items()}
    whole, stages = sum(wanted.values()), sum(tokens > 0 for tokens in counts.values())
    # A mixture rounds up for each stage and source.
    rounding = stages if len(corpus.sources) > 1 else 0
    there, held_out = corpus.available(whole + rounding, held_out=False), -(-config.evaluation.tokens // length)
    judged = corpus.available(held_out, held_out=True)
    if there - rounding < stages or judged < 1:
        raise UsageError(
            f"--fit-data: expected a sequence of {length} tokens for each of {stages} stages and one held out, found "
            f"{there} and {judged}; give more text or lower --calibration.sequence-length"
        )
    if there >= whole + rounding and judged >= held_out:
        return config
    share = min(1.0, (there - rounding - stages) / max(whole - stages, 1))
    tokens = {purpose: length * (1 + int((count - 1) * share)) if count else 0 for purpose, count in wanted.items()}
    tokens = {purpose: min(count, counts[purpose]) for purpose, count in tokens.items()}
    judged_on = min(config.evaluation.tokens, length * judged)
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


def scored_text(text: Int[Tensor, "sequences length"], config: SearchConfig) -> Int[Tensor, "sequences length"]:
    """What candidates are scored on, of the text that was drawn for the search."""
    return text if config.metric == "perplexity" else scramble(text, config.scrambled)


def draw_texts(corpus: Corpus, config: RunConfig) -> dict[str, Int[Tensor, "_ length"]]:
    """The further texts that models are judged on. Raises `UsageError` if one cannot be read or is too short."""
    return {text: corpus.draw_beside(text, config.evaluation.tokens) for text in config.evaluation.texts}
