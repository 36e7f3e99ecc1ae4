"""A guard against candidates whose answers do not end, which perplexity and KL do not see."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from darwinlm.config.run import GuardConfig
from darwinlm.evaluation.answering import answer
from darwinlm.evaluation.prompts import chat_prompts
from darwinlm.runtime import parallel
from darwinlm.runtime.progress import say
from darwinlm.search.fitness import Fitness
from darwinlm.types import Genome

BATCH = 8  # answers that are written at a time


class Guard:
    """Says whether a candidate, untrained, may win: whether too many of its greedy answers are cut off at the limit.

    Too many are more than the dense model's by more than `config.share`, and more than the parent's: a search whose
    start rambles goes on, and does not get worse.

    Args:
        prompts: token ids, as `guard_prompts` gives them.
    """

    def __init__(
        self,
        fitness: Fitness,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        config: GuardConfig,
    ):
        self.config = config
        self._fitness = fitness
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._shares: dict[Genome, float] = {}

    def passes(self, genome: Genome, parent: Genome | None = None) -> bool:
        """Whether a candidate may take its parent's place, or begin the search; all processes take part."""
        allowed = self.share(self._fitness.stitcher.grid.dense()) + self.config.share
        if self.share(genome) <= allowed:
            return True
        return parent is not None and self.share(genome) <= self.share(parent)

    def share(self, genome: Genome) -> float:
        """The share of a candidate's answers that are cut off. The first process writes them, once."""
        if genome not in self._shares:
            self._shares[genome] = float(parallel.from_first(lambda: repr(self._measured(genome))))
        return self._shares[genome]

    def _measured(self, genome: Genome) -> float:
        model = self._fitness.model(genome)
        found = answer(model, self._tokenizer, self._prompts, self.config.tokens, BATCH).share_cut_off
        whose = "the dense model's" if genome == self._fitness.stitcher.grid.dense() else "a candidate's"
        say(f"guard: {found:.0%} of {whose} answers are cut off at {self.config.tokens} tokens")
        return found


def guard_prompts(config: GuardConfig, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig) -> list[list[int]]:
    """Return the prompts of the guard that a run asks for; none if it asks for no guard. Raises as `chat_prompts`."""
    if config.chat is None:
        return []
    return chat_prompts(config.chat, tokenizer, model, config.prompts, config.tokens, "guard.chat")
