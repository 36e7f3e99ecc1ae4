"""The frozen types that stages pass to each other, and the names of tensor dimensions.

Nothing here needs torch, for which the command line does not wait. Dimensions, as named in annotations and docstrings:

    d_in      input columns of a consumer (query heads x head_dim, or MLP channels)
    d_out     output rows of a consumer (the model's hidden size)
    kept      input columns of a consumer that survive at some level
    sequences, length   token blocks and their length
    tokens    sequences x length
    vocab     vocabulary entries
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["attention", "mlp", "mixer"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "mixer")
Structure = Literal["kv_group", "balanced", "head"]
MetricName = Literal["kl", "top-k-kl", "perplexity"]
LossTokens = Literal["assistant", "all"]
FileType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]  # of a GGUF file
MovesName = Literal["priced", "within_kinds"]


class DarwinError(ValueError):
    """A failure that one sentence explains to the user: what was expected, found, and to be done. Exit code 1."""


class UsageError(DarwinError):
    """An argument that cannot be used. Exit code 2."""


@dataclass(frozen=True)
class Producer:
    """Output rows of a module that feed a unit's structures.

    Structure `s` reads the rows from `start + g * width` up to `start + (g + 1) * width`, where `g = s // readers`:
    `readers` consecutive structures share rows, as query heads share a KV head. A fused projection is described by
    several producers with one `module`, in the order of their rows. A module that is not linear is kept whole, and some
    of its outputs are selected.
    """

    module: str
    start: int
    width: int
    readers: int = 1


@dataclass(frozen=True)
class Unit:
    """The attention, the MLP or the mixer of one decoder block, which a genome gives one level.

    A mixer (linear attention, a short convolution, a state-space layer) is a single structure and leaves as a whole.

    Attributes:
        name: unique, and usable as a file name, for example `block-03-attention`.
        consumer: the linear module that reads the structures (`o_proj`, `down_proj`, the output projection of a mixer),
            by its path in the model.
        producers: the rows of modules that write the structures.
        structure_width: columns of the consumer that belong to one structure.
        structures: the number of structures.
        structure_parameters: parameters that leave the model with one structure.
        fixed_parameters: parameters that leave the model only with the whole unit (its norms, the consumer's bias).
        readers: the number of consecutive structures that form a group and share rows (of K and V).
        shared_parameters: parameters of a group's shared rows. They leave the model with the group's last structure.
        in_turns: whether groups lose structures in turns, so that their sizes differ by one at most.
        lost: the number of structures that an earlier pruning has removed, which `structures` does not count.
    """

    name: str
    block: int
    kind: Kind
    consumer: str
    producers: tuple[Producer, ...]
    structure_width: int
    structures: int
    structure_parameters: int
    fixed_parameters: int
    readers: int = 1
    shared_parameters: int = 0
    in_turns: bool = False
    lost: int = 0

    @property
    def groups(self) -> int:
        """The number of groups of structures that share rows."""
        return self.structures // self.readers

    @property
    def uneven(self) -> bool:
        """Whether groups can differ in size at a level."""
        return self.readers > 1 and self.groups > 1 and not self.in_turns

    def parameters(self, removed: int) -> int:
        """Parameters of the unit after `removed` structures have left it.

        If the unit is `uneven`, this is an upper bound: a number does not say which groups are empty, so the remaining
        structures are taken to be spread over as many groups as possible.
        """
        remaining = self.structures - removed
        if not remaining:
            return 0
        shared = min(self.groups, remaining) * self.shared_parameters
        return remaining * self.structure_parameters + shared + self.fixed_parameters


@dataclass(frozen=True)
class Genome:
    """A level for every unit, in the order of the model's units. Hashable."""

    levels: tuple[int, ...]

    def replace(self, changes: dict[int, int]) -> Genome:
        """The same genome with the unit at each index in `changes` at a new level."""
        return Genome(tuple(changes.get(i, level) for i, level in enumerate(self.levels)))


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of one decoder block. 0 query heads mean no attention; 0 intermediate channels mean no MLP.

    Attributes:
        mixer: whether it has a mixer, such as linear attention, in place of attention or beside it.
    """

    query_heads: int
    key_value_heads: int
    intermediate: int
    mixer: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing is left of the block, which then computes nothing."""
        return not (self.query_heads or self.intermediate or self.mixer)


@dataclass(frozen=True)
class SelectionStage:
    """One stage of selection (Algorithm 1): train each candidate, score it, keep the best.

    Attributes:
        survivors: the number of candidates that the stage keeps.
        fitness_tokens: the number of tokens on which fitness is measured.
        training_tokens: the number of tokens on which each candidate has been trained, including earlier stages; 0
            for no training.
    """

    survivors: int
    fitness_tokens: int
    training_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """One line of a search's history.

    Attributes:
        fitness: the fitness of the parent after selection; lower is better.
        scored: the number of distinct offspring, or of start genomes in generation 0.
        origin: where the parent comes from: the name of a start genome, the kind of mutation, or `parent` if it is
            that of the generation before.
        stage_fitness: the best fitness after each stage of selection.
        fitness_tokens, training_tokens: the number of tokens on which candidates were scored and trained, summed over
            candidates.
        starts: in generation 0, the fitness of every start genome by name, without those that diverged.
    """

    generation: int
    fitness: float
    genome: Genome
    scored: int
    seconds: float
    origin: str = ""
    stage_fitness: tuple[float, ...] = ()
    fitness_tokens: int = 0
    training_tokens: int = 0
    starts: dict[str, float] = field(default_factory=dict, hash=False)


Curve = tuple[tuple[int, float], ...]
"""Points of a curve: a generation, and a value that was measured on its parent."""


@dataclass(frozen=True)
class SearchResult:
    """The best genome of a search, its fitness (by default KL(dense || model) in nats a token), and its history."""

    best: Genome
    fitness: float
    history: tuple[Generation, ...]
