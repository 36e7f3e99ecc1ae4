"""What every allocator is given: they are ways to choose a genome, over one database and within one budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from darwinlm.config.run import SearchConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.genome import Grid
from darwinlm.search.budget import Budget
from darwinlm.search.fitness import Scorer
from darwinlm.search.sensitivity import start_tokens
from darwinlm.types import Genome


@dataclass(frozen=True)
class Problem:
    """A dense model, its database, and how small it is to become.

    Attributes:
        stitcher: has the dense model, its family and the database.
        even: the uniform genome of the budget.
        fitness: scores genomes, for allocators that try some.
        token_ids: text of the search, for those that measure the dense model.
        calibration: text that the database was measured on, for those that train.
        config: what a search may spend.
        state: a directory in which an allocator may keep what it resumes from.
    """

    stitcher: Stitcher
    budget: Budget
    even: Genome
    fitness: Scorer
    token_ids: Int[Tensor, "sequences length"]
    calibration: Int[Tensor, "_ length"]
    config: SearchConfig
    seed: int
    state: Path

    @property
    def scored_tokens(self) -> int:
        """What rivals that search may spend."""
        return scored_tokens(self.budget.grid, self.config)


def scored_tokens(grid: Grid, config: SearchConfig) -> int:
    """Tokens that our search scores on, untrained, its start included."""
    return start_tokens(grid, config) + config.generations * config.generation_tokens


def mask_tokens(grid: Grid, config: SearchConfig) -> int:
    """Tokens that masks are learned on; a token forwards and backwards takes as long as about three scored ones."""
    return scored_tokens(grid, config) // 3 if config.mask_tokens is None else config.mask_tokens


Allocator = Callable[[Problem], Genome]
"""Returns a genome that fits the problem's budget. Raises `UsageError` if it knows of none."""
