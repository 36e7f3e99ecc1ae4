"""What a search, the refit and a training will take, in floating-point operations of matrix products."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from darwinlm.allocate.sensitivity import measured_levels
from darwinlm.config import RefitConfig, SearchConfig
from darwinlm.genome import Grid, prunable_parameters
from darwinlm.types import Genome, SelectionStage


@dataclass(frozen=True)
class BlockRates:
    """Operations a second of a decoder block: forwards alone, and in training, forwards and backwards."""

    forward: float
    training: float


@dataclass(frozen=True)
class Work:
    """Operations, by the rate that they are done at."""

    forward: float
    training: float = 0.0

    def seconds(self, rates: BlockRates) -> float:
        """What it takes at these rates."""
        return self.forward / rates.forward + self.training / rates.training


@dataclass(frozen=True)
class SearchPlan:
    """Work that comes after the database, the scores of attention left out.

    Attributes:
        start: until the first generation.
        generations: of all of them; what mutants share with their parent is counted, though it is computed once.
        refit: of the searched and of the uniform model.
    """

    start: Work
    generations: Work
    refit: Work


def plan_search(
    parameters: int, config: PretrainedConfig, grid: Grid, even: Genome, search: SearchConfig, refit: RefitConfig
) -> SearchPlan:
    """Two operations a weight and token forwards; backwards two for the stream, and two for each weight that trains.

    Args:
        parameters: of the dense model, embeddings in.
        even: a genome of the size that is searched for.
    """
    blocks, pruned = (prunable_parameters(grid, genome) for genome in (grid.dense(), even))
    head = config.vocab_size * config.hidden_size
    # An embedding of its own multiplies nothing.
    dense = parameters - (0 if config.tie_word_embeddings else head)
    small = dense - blocks + pruned
    consumers = sum(
        (unit.structures - grid.removed[index][even.levels[index]]) * unit.structure_width * config.hidden_size
        for index, unit in enumerate(grid.units)
    )
    trained = consumers if search.trains == "consumers" else pruned
    teacher = dense if search.loss == "distillation" else 0
    scores, steps, scored, before = 0.0, 0.0, 0, 0
    candidates = search.offspring
    for stage in search.stages:
        again = stage.training_tokens > 0  # a candidate that has trained is another one
        scores += candidates * 2.0 * small * max(0, stage.fitness_tokens - (0 if again else scored))
        steps += candidates * (4.0 * small + 2.0 * trained) * (stage.training_tokens - before)
        candidates, scored, before = stage.survivors, stage.fitness_tokens, stage.training_tokens
    return SearchPlan(
        start=Work(_start(grid, dense, blocks, small, search) + 2.0 * teacher * before),
        generations=Work(search.generations * scores, search.generations * steps),
        refit=Work(2 * refit.tokens * 2.0 * dense, 2 * refit.tokens * (4.0 * small + 2.0 * consumers)),
    )


def _start(grid: Grid, dense: int, blocks: int, small: int, search: SearchConfig) -> float:
    """The dense model on all tokens, sensitivities with the dense prefix reused, and the starts in the last stage."""
    last: SelectionStage = search.stages[-1]
    operations, starts = 2.0 * dense * last.fitness_tokens, 1
    if search.start == "sensitivity":
        count, starts = 1 + max(unit.block for unit in grid.units), 2
        for index, unit in enumerate(grid.units):
            rest = dense - blocks * unit.block / count
            operations += 2.0 * rest * len(measured_levels(grid.highest(index))) * search.stages[0].fitness_tokens
    return operations + starts * 2.0 * small * last.fitness_tokens
