"""The problem that every allocator solves: choose a genome over a database and within a budget."""

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
    """A dense model, its database, and the budget that a genome must fit.

    Attributes:
        stitcher: holds the dense model, its family and the database.
        uniform: the uniform genome of the budget.
        fitness: scores genomes, for allocators that try some.
        token_ids: the text of the search, for allocators that measure the dense model.
        calibration: the text that the database was measured on, for allocators that train.
        config: what a search may spend.
        seed: seeds everything random that an allocator does.
        state: a directory in which an allocator may keep what it resumes from.
    """

    stitcher: Stitcher
    budget: Budget
    uniform: Genome
    fitness: Scorer
    token_ids: Int[Tensor, "sequences length"]
    calibration: Int[Tensor, "_ length"]
    config: SearchConfig
    seed: int
    state: Path

    @property
    def length(self) -> int:
        """The tokens in a sequence."""
        return self.token_ids.shape[1]

    @property
    def scored_tokens(self) -> int:
        """The tokens that an allocator of another paper may score genomes on: as many as our search scores on."""
        return scored_tokens(self.budget.grid, self.config, self.length)


def scored_tokens(grid: Grid, config: SearchConfig, length: int) -> int:
    """Return the tokens that our search scores genomes on without training, including its start.

    Args:
        length: tokens in a sequence.
    """
    return start_tokens(grid, config) + config.generations * config.generation_tokens(length)


def mask_tokens(grid: Grid, config: SearchConfig, length: int) -> int:
    """Return the tokens that masks are learned on.

    By default they take as long as our search: a forward and a backward pass over a token take about as long as scoring
    three tokens.
    """
    return scored_tokens(grid, config, length) // 3 if config.mask_tokens is None else config.mask_tokens


Allocator = Callable[[Problem], Genome]
"""A function that returns a genome within the budget of a problem, or raises `UsageError` if it finds none."""
