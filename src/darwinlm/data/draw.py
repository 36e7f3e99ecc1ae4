"""The text of a run, drawn for each of its stages."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from darwinlm.config.run import RunConfig, SearchConfig, Stage
from darwinlm.data.corpus import Corpus, scramble


def draw_tokens(
    corpus: Corpus, config: RunConfig, until: Stage = "report"
) -> dict[str, Int[Tensor, "sequences length"]]:
    """Disjoint tokens for each stage up to `until`. Raises `UsageError` if there is too little text."""
    stages, wanted = config.search.stages, {"calibration": config.calibration.tokens}
    if until != "database":
        wanted["search"] = max(stage.fitness_tokens for stage in stages)
        wanted["training"] = max(stage.training_tokens for stage in stages)
    if until in ("database", "search"):
        return corpus.draw(**wanted)
    drawn = corpus.draw(**wanted, refit=config.refit.tokens)
    return drawn | {"evaluation": corpus.draw_held_out(config.evaluation.tokens)}


def scored_text(text: Int[Tensor, "sequences length"], config: SearchConfig) -> Int[Tensor, "sequences length"]:
    """What candidates are scored on, of the text that was drawn for the search."""
    return text if config.metric == "perplexity" else scramble(text, config.scrambled)


def draw_texts(corpus: Corpus, config: RunConfig) -> dict[str, Int[Tensor, "_ length"]]:
    """The further texts that models are judged on. Raises `UsageError` if one cannot be read or is too short."""
    return {text: corpus.draw_beside(text, config.evaluation.tokens) for text in config.evaluation.texts}
