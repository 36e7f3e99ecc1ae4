"""Settings of training, and of recipes that prune and train in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from darwinlm.config.checks import (
    LARGEST,
    expect,
    expect_count,
    expect_counts,
    expect_named,
    expect_positive,
    expect_seed,
)
from darwinlm.config.own import OwnConfig
from darwinlm.config.run import (
    CalibrationConfig,
    DatabaseConfig,
    EvaluationConfig,
    RefitConfig,
    SearchConfig,
    ServingConfig,
)
from darwinlm.types import LossTokens


@dataclass(frozen=True)
class StreamConfig:
    """Training text: which documents are kept, and the length of the sequences that they are packed into."""

    sequence_length: int = 1024
    """Tokens in a training sequence: the context."""
    score_column: str | None = None
    """Column of a score by which documents are kept, language_score of FineWeb-Edu for instance."""
    min_score: float = 0.0
    """Documents with a lower score are left out."""

    def __post_init__(self) -> None:
        expect_counts(self, "stream", sequence_length=2)
        scored = self.score_column is not None or not self.min_score
        expect(scored, "stream.min_score", "--stream.score-column with it", f"{self.min_score:g} alone")


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation: how the teacher's distribution enters the loss."""

    weight: float = 1.0
    """Share of KL(teacher || model) in the loss; the rest is cross-entropy. At 0 it serves evaluation alone."""
    temperature: float = 1.0
    """Temperature that softens both distributions; the KL divergence is multiplied by its square."""
    top_k: int = 0
    """Largest logits of the teacher that are kept on disk for each token; 0 runs the teacher beside the model."""

    def __post_init__(self) -> None:
        expect(0 <= self.weight <= 1, "distillation.weight", "0 to 1", self.weight)
        expect_positive(self, "distillation", "temperature")
        expect_counts(self, "distillation", top_k=0)


@dataclass(frozen=True)
class TrainingConfig:
    """Training: AdamW without weight decay, linear warm-up, then a cosine to zero."""

    learning_rate: float = 1e-4
    """Highest learning rate."""
    warmup_steps: int = 50
    """Steps until the highest learning rate is reached."""
    batch_size: int = 128
    """Sequences in a step, over all processes; gradients are accumulated to reach it."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of one process."""
    max_gradient_norm: float = 1.0
    """Norm to which longer gradients are clipped."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the products; weights that train are float32. auto is bfloat16 where the device is fast at it."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer over the processes (FSDP2), block by block."""
    lora_rank: int = 0
    """Rank of low-rank adapters to train, which are merged at the end; 0 trains all weights."""
    lora_alpha: float = 16.0
    """Scale of the adapters, divided by their rank."""
    log_every: int = 10
    """Steps between two lines of the loss."""
    evaluate_every: int = 100
    """Steps between two evaluations on held-out text."""
    save_every: int = 100
    """Steps between two checkpoints. The last two are kept."""
    evaluation_tokens: int = 16_384
    """Held-out tokens for perplexity and KL divergence."""
    report_to: tuple[str, ...] = ()
    """Also report to these: tensorboard, wandb, trackio and others that transformers knows."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "micro_batch_size", "log_every", "evaluate_every", "save_every", "evaluation_tokens")
        expect_counts(self, "training", warmup_steps=0, lora_rank=0, **dict.fromkeys(counts, 1))
        expect_positive(self, "training", "learning_rate", "max_gradient_norm", "lora_alpha")
        expect(not (self.fsdp and self.lora_rank), "training.lora_rank", "0 with --training.fsdp", self.lora_rank)
        whole = self.save_every % self.log_every == 0  # else a resumed run would average its losses differently
        expect(whole, "training.save_every", f"a multiple of --training.log-every {self.log_every}", self.save_every)


@dataclass(frozen=True)
class TrainConfig:
    """Training of a model: what determines its result, and where it goes."""

    model: str
    """A run directory, an export, or a dense model as for darwinlm compress."""
    data: str
    """Text: as for darwinlm compress, and directories or patterns (shards/*.parquet) of .jsonl or .parquet files."""
    out: str
    """Directory of the training. The same command resumes it."""
    tokens: int = 10_000_000
    """Tokens to train on, rounded up to whole steps."""
    teacher: str | None = None
    """The dense model, whose distribution is learned and from which the KL divergence is reported."""
    skip: int = 0
    """Tokens to skip at the beginning of the text, which an earlier training has seen."""
    seed: int = 0
    """Order of the sequences, and everything else that is random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda."""
    cache: str | None = None
    """Directory for tokens and the teacher's logits, which many runs can share; OUT/cache by default."""
    verify: bool = True
    """Load the export in a fresh process without darwinlm and compare its logits."""
    loss_tokens: LossTokens = "assistant"
    """Of chats in the text, the tokens that count in loss and evaluation: those that the assistant wrote, or all. Of
    other text, all do."""
    own: OwnConfig = field(default_factory=OwnConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        expect_named(self, "model", "data", "out")
        expect_counts(self, "", tokens=1, skip=0)
        expect_seed(self.seed)
        expect_more_than_warm_up(self.steps, self.training)
        if self.teacher is None:
            alone = DistillationConfig(weight=self.distillation.weight)
            expect(self.distillation == alone, "distillation", "--teacher with its settings", "none")
            expect(self.distillation.weight in (0, 1), "distillation.weight", "--teacher with it", "none")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return steps_of(self.tokens, self.training, self.stream)


def steps_of(tokens: int, training: TrainingConfig, stream: StreamConfig) -> int:
    """Return the optimizer steps that take at least so many tokens."""
    return -(-tokens // (training.batch_size * stream.sequence_length))


def expect_more_than_warm_up(steps: int, training: TrainingConfig) -> None:
    """Raise `UsageError` if a training would end before its warm-up."""
    expected = f"fewer than the {steps:,} steps that the tokens make"
    expect(training.warmup_steps < steps, "training.warmup_steps", expected, training.warmup_steps)


@dataclass(frozen=True)
class GradualStage:
    """One pruning and the training after it."""

    target_level: float
    """Uniform level, out of database.levels of the dense model, whose size the pruned model must not exceed."""
    tokens: int
    """Tokens to train on after the pruning; 0 trains nothing."""

    def __post_init__(self) -> None:
        expect_count(self.tokens, "stages", 0, LARGEST["tokens"], " tokens")


@dataclass(frozen=True)
class GradualConfig:
    """A recipe: a model pruned and trained, in one stage or several."""

    model: str
    """The dense model, as for darwinlm compress. It teaches, and trainings are judged beside it; a later search is
    judged beside the model that the stage before it trained."""
    data: str
    """Text: as for darwinlm compress."""
    out: str
    """Directory of all stages. The same command resumes it."""
    stages: tuple[GradualStage, ...] = ()
    """Target level and training tokens of each stage; the levels rise. If none is given, there is one stage, to half of
    database.levels, with 10 billion tokens."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda."""
    cache: str | None = None
    """Directory for tokens and the teacher's logits of all stages; OUT/cache by default."""
    verify: bool = True
    """Load each export in a fresh process without darwinlm and compare its logits."""
    loss_tokens: LossTokens = "assistant"
    """Of chats in the text, the tokens that count in fitness, refit, training and evaluation: those that the assistant
    wrote, or all. Of other text, all do."""
    own: OwnConfig = field(default_factory=OwnConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        expect_named(self, "model", "data", "out")
        if not self.stages:
            object.__setattr__(self, "stages", (GradualStage(self.database.levels / 2, 10_000_000_000),))
        levels = [stage.target_level for stage in self.stages]
        within = all(0 < level < self.database.levels for level in levels)
        rising = levels == sorted(set(levels))
        expected = f"levels that rise between 0 and {self.database.levels}"
        expect(within and rising, "stages", expected, levels)
        expect_seed(self.seed)
        for stage in self.stages:
            if stage.tokens:
                expect_more_than_warm_up(steps_of(stage.tokens, self.training, self.stream), self.training)


@dataclass(frozen=True)
class PlanConfig:
    """What the target of a plan is for."""

    serving: ServingConfig = field(default_factory=ServingConfig)
