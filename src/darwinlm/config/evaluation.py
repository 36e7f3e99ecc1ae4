"""Settings of `darwinlm evaluate` and `darwinlm compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from darwinlm.config.checks import expect_count, expect_counts, expect_named, expect_seed
from darwinlm.config.own import OwnConfig
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, EvaluationConfig, SearchConfig
from darwinlm.types import LossTokens, UsageError


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks: the questions that models are asked."""

    tasks: str | None = None
    """Tasks of lm-eval, with commas between them."""
    tasks_path: str | None = None
    """Directory of task files (YAML) for lm-eval."""
    tasks_data: str | None = None
    """Directory of .jsonl files (arc_easy, boolq, gsm8k, ifeval, logi_qa, piqa, winogrande) that stand in for the hub's
    questions."""
    shots: int | None = None
    """Examples before each question of --tasks; by default as many as each task says."""
    limit: int | None = None
    """Largest number of questions of each task, for a quick try."""
    chat_template: bool = False
    """Ask tasks through the model's chat template, each example a turn."""
    batch_size: int = 8
    """Questions, and prompts of --chat, at a time."""

    def __post_init__(self) -> None:
        expect_counts(self, "", shots=0, limit=1, batch_size=1)


@dataclass(frozen=True)
class EvaluateConfig(TasksConfig):
    """Evaluation of one or several models by one protocol."""

    model: str
    """A run directory, a training's, an export, or a dense model as for darwinlm compress."""
    data: str | None = None
    """Text for perplexity: as for darwinlm compress, several with commas, each measured by itself. wikitext2 and c4
    are their own test and validation text."""
    against: str | None = None
    """The dense model, from which KL divergence and agreement of continuations are measured."""
    beside: str | None = None
    """Other models to measure in the same way, with commas between them."""
    suite: Literal["darwinlm"] | None = None
    """The paper's protocol: nine tasks with its shots and its choice of acc or acc_norm."""
    generation: bool = False
    """Write greedy continuations, and measure how much they repeat and how often the dense model agrees."""
    draft: bool = False
    """Let the dense model write with the model as its draft: the tokens that it accepts, and its speed."""
    draft_tokens: int = 5
    """Tokens that a draft writes at a time."""
    out: str | None = None
    """File for the results as JSON."""
    chat: str | None = None
    """Chats (a .jsonl or .parquet file, or a datasets id) whose first turns each model answers: how long its answers
    are, how many of them are cut off, and how much they repeat."""
    chat_prompts: int = 64
    """Prompts of --chat, at most."""
    answer_tokens: int = 512
    """Tokens of an answer, at most."""
    loss_tokens: LossTokens = "assistant"
    """Of chats in the text, the tokens that count: those that the assistant wrote, or all. Of other text, all do."""
    documents: Literal["held-out", "all"] = "held-out"
    """Of the text: the tenth that darwinlm never calibrates, searches or trains on, or all of it."""
    tokens: int = 524_288
    """Tokens of each text, at most."""
    window: int = 1024
    """Tokens in a window of text that a model sees at a time."""
    stride: int | None = None
    """Tokens from one window to the next; by default a whole window. A smaller stride gives tokens more context and
    takes longer."""
    positions: int | Literal["context"] | None = None
    """Tell loss and KL also by position, in windows of that many tokens, or as many as the model has positions
    (context)."""
    continuation_tokens: int = 64
    """New tokens in each continuation."""
    prompts: tuple[str, ...] = (
        "The capital of France is",
        "Water boils at",
        "The Roman Empire was",
        "Photosynthesis is the process by which",
        "In 1969, the first people",
        "To make bread, first",
        "The main difference between a virus and a bacterium is",
        "Once upon a time, there was",
    )
    """Beginnings that each model continues."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is that of each checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_named(self, "model")
        expect_counts(self, "", tokens=2, window=2, stride=1, continuation_tokens=1, draft_tokens=1)
        expect_counts(self, "", chat_prompts=1, answer_tokens=1)
        if self.draft and self.against is None:
            raise UsageError("--draft is for the dense model: expected --against, found none; name it")
        if self.positions is not None and self.positions != "context":
            expect_count(self.positions, "positions", 2, 1 << 24)
        if self.positions is not None and self.data is None:
            raise UsageError("--positions is of text: expected --data, found none; name some")
        if self.stride is not None and self.stride > self.window:
            raise UsageError(
                f"--stride: expected at most the --window of {self.window}, found {self.stride}; a longer one would "
                "leave text out"
            )
        if not all(self.prompts):
            raise UsageError("--prompts: expected prompts of at least one word, found an empty one; leave it out")

    @property
    def asks_for_something(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self.data or self.tasks or self.suite or self.generation or self.draft or self.chat)


@dataclass(frozen=True)
class CompareConfig(TasksConfig):
    """Comparison of allocators at several sizes, over one database."""

    model: str
    """A hub id, a directory, a .gguf file, or smollm2-135m."""
    data: str
    """Text: as for darwinlm compress. Its held-out documents are what models are judged on."""
    out: str
    """Directory of the comparison. The same command resumes it; methods, targets and tasks can be added later."""
    methods: tuple[str, ...] = ()
    """Allocators by name (`darwinlm.rivals.methods.METHODS`); if none are given, all that train nothing."""
    targets: tuple[str, ...] = ("params=0.9", "params=0.8", "params=0.7", "params=0.6", "params=0.5")
    """Shares of the dense model's parameters that are kept."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the searches and of the tasks; auto is bfloat16 where the device is fast at it. Perplexity, KL and
    speed are measured in the model's own."""
    loss_tokens: LossTokens = "assistant"
    """Of chats in the text, the tokens that count in fitness, refit, training and evaluation: those that the assistant
    wrote, or all. Of other text, all do."""
    own: OwnConfig = field(default_factory=OwnConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_named(self, "model", "data", "out")
        expect_seed(self.seed)
        if not self.targets:
            raise UsageError("--targets: expected at least one size, found none; give one, such as params=0.8")


@dataclass(frozen=True)
class SpeedConfig:
    """Speed: what is timed."""

    batch: int = 1
    """Sequences at a time."""
    prompt_tokens: int = 512
    """Tokens in each prompt."""
    new_tokens: int = 32
    """Tokens written after each prompt."""
    repeats: int = 5
    """Timings of each model; the median counts."""

    def __post_init__(self) -> None:
        expect_counts(self, "", batch=1, prompt_tokens=1, new_tokens=1, repeats=1)
