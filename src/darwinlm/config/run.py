"""Settings: a frozen dataclass for each stage, which serves the command line, YAML and Python alike.

The text below a field is its help on the command line. Every class raises `UsageError`, which names the flag, for a
value that makes no sense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from darwinlm.config.checks import (
    LARGEST,
    MOST,
    expect,
    expect_count,
    expect_counts,
    expect_level,
    expect_named,
    expect_one_size,
    expect_positive,
    expect_seed,
    expect_size,
)
from darwinlm.config.own import OwnConfig
from darwinlm.types import FileType, LossTokens, MetricName, MovesName, SelectionStage, Structure

Stage = Literal["database", "search", "export", "report"]
STARTS = ("sensitivity", "uniform")  # anything else is the file of an earlier genome


@dataclass(frozen=True)
class CalibrationConfig:
    """Calibration: the text that the dense model is measured on."""

    tokens: int = 131_072
    """Calibration tokens."""
    sequence_length: int = 512
    """Tokens in a sequence, for calibration, search and evaluation."""
    batch_size: int = 8
    """Sequences in one forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the dense model's forward pass; bfloat16 is faster where the device is. Sums are float32."""
    loss_tokens: LossTokens = "all"
    """Of chats in the text, the tokens whose activations are summed: all, or those from which the assistant's next
    token is predicted."""

    def __post_init__(self) -> None:
        expect_counts(self, "calibration", tokens=1, sequence_length=2, batch_size=1)


@dataclass(frozen=True)
class DatabaseConfig:
    """Database: the levels that every unit gets, and how their weights are solved."""

    levels: int = 10
    """Levels of a unit, N; at level i it has lost i/N of its structures. Units with few structures have fewer."""
    structure: Structure = "kv_group"
    """The structure that attention loses: kv_group (a KV head with its query heads), balanced (one query head of every
    group), head (the paper's: any query head; its export repeats K and V for every query head that is left)."""
    granularity: int = 32
    """MLP channels are removed in multiples of this many."""
    divisible_by: int = 1
    """What every level's query heads, KV heads and channels are divisible by: 8 lets tensor parallelism use 2, 4 or 8
    devices. Units have fewer levels then; balanced keeps all KV heads and has the most."""
    damping: float = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it."""

    def __post_init__(self) -> None:
        expect_counts(self, "database", levels=1, granularity=1, divisible_by=1)
        expect_positive(self, "database", "damping")


@dataclass(frozen=True)
class SearchConfig:
    """Search: Algorithm 1."""

    start: str = "sensitivity"
    """The first parent: sensitivity (least summed sensitivity, by dynamic programming), uniform (the paper's), or the
    genome of an earlier search, a file as for --genome, that loses further levels at random units (gradual pruning)."""
    moves: MovesName = "priced"
    """How mutants differ from their parent: priced lets attention and MLPs trade levels by cost, within_kinds is the
    paper's level-switch mutation."""
    metric: MetricName = "kl"
    """The fitness: KL divergence from the dense model over all tokens or its likeliest, or log-perplexity."""
    top_k: int = 512
    """The likeliest tokens that top-k-kl distinguishes; all others count as one."""
    scrambled: float = 0.25
    """Share of each of the search's sequences, at its end, whose tokens are put in random order, for a model that is
    judged on one kind of text alone does badly on others. It does not apply to perplexity."""
    generations: int = 40
    """Generations of the evolution."""
    offspring: int = 16
    """Mutants of the parent in each generation."""
    stages: tuple[SelectionStage, ...] = (
        SelectionStage(survivors=8, fitness_tokens=1024),
        SelectionStage(survivors=4, fitness_tokens=2048),
        SelectionStage(survivors=2, fitness_tokens=4096),
        SelectionStage(survivors=1, fitness_tokens=8192),
    )
    """Rounds of selection within a generation: survivors, fitness tokens, and total training tokens so far. Survivors
    continue their training. Tokens are exact: whole sequences, then the beginning of the next one."""
    max_switches: int = 3
    """Largest number of level switches in one mutant."""
    learning_rate: float = 1e-5
    """Learning rate of the training before selection."""
    loss: Literal["cross-entropy", "distillation"] = "cross-entropy"
    """The loss of that training: cross-entropy with the text, or the divergence from the dense model."""
    trains: Literal["all", "consumers"] = "consumers"
    """Which weights of the blocks that training moves: those that read what was pruned (o_proj, down_proj), in a third
    of the memory and less time, or all, as in the paper."""
    mask_tokens: int | None = None
    """Calibration tokens on which sheared-llama, a method of darwinlm compare, learns its masks; if not given, a third
    of those that our search scores on: a token forwards and backwards takes as long as three forwards."""

    def __post_init__(self) -> None:
        expect_counts(self, "search", generations=0, offspring=1, max_switches=1, top_k=1, mask_tokens=1)
        expect(bool(self.start), "search.start", "sensitivity, uniform, or a file", "nothing")
        expect_positive(self, "search", "learning_rate")
        expect(0 <= self.scrambled <= 1, "search.scrambled", "a share between 0 and 1", self.scrambled)
        flag = "search.stages"
        expect(len(self.stages) > 0, flag, "at least one stage", "none")
        for stage in self.stages:
            for name, least in (("survivors", 1), ("fitness_tokens", 1), ("training_tokens", 0)):
                what = f" {name.replace('_', ' ')} in every stage"
                expect_count(getattr(stage, name), flag, least, LARGEST.get(name, MOST), what)
            predicts = self.metric != "perplexity" or stage.fitness_tokens > 1
            expect(predicts, flag, "at least 2 fitness tokens for perplexity", stage.fitness_tokens)
        survivors = [stage.survivors for stage in self.stages]
        falling = survivors == sorted(survivors, reverse=True)
        expect(falling, flag, "no more survivors than in the stage before", survivors)
        trained = [stage.training_tokens for stage in self.stages]
        expect(trained == sorted(trained), flag, "no fewer training tokens than in the stage before", trained)

    def added_tokens(self, length: int) -> list[int]:
        """For each stage, the tokens that it scores a candidate on beyond earlier stages, where none is trained.

        Whole sequences of `length` tokens are scored once; the beginning of a sequence is scored by itself.
        """
        added, scored = [], {0: 0}  # whole sequences by fitness tokens
        for stage in self.stages:
            sequences, rest = divmod(stage.fitness_tokens, length)
            new = max(0, sequences - max(scored.values())) * length
            added.append(0 if stage.fitness_tokens in scored else new + rest)
            scored[stage.fitness_tokens] = sequences
        return added

    def generation_tokens(self, length: int) -> int:
        """Tokens that the candidates of a generation are scored on where none is trained."""
        candidates = [self.offspring, *(stage.survivors for stage in self.stages)]
        return sum(count * added for count, added in zip(candidates, self.added_tokens(length), strict=False))


@dataclass(frozen=True)
class GuardConfig:
    """Guard: a bound on candidates whose answers do not end, which the search then passes over."""

    chat: str | None = None
    """Chats, as for --evaluation.chat, whose first turns a candidate answers before it may win a generation."""
    prompts: int = 16
    """Prompts, at most."""
    tokens: int = 128
    """Tokens of an answer, at most."""
    share: float = 0.1
    """How much larger the share of answers that are cut off may be than the dense model's, unless the parent's is."""

    def __post_init__(self) -> None:
        expect_counts(self, "guard", prompts=1, tokens=1)
        expect(0 <= self.share <= 1, "guard.share", "a share between 0 and 1", self.share)


@dataclass(frozen=True)
class LatencyConfig:
    """Latency: the forward pass that --target latency=... limits."""

    batch: int = 1
    """Sequences at a time."""
    tokens: int = 1
    """New tokens of each sequence: 1 is a step of decoding, many a prefill."""
    context: int = 512
    """Tokens of each sequence that are in the cache already."""
    repeats: int = 9
    """Alternating timings of every unit at every level; the median counts."""
    table: str | None = None
    """File of timings to use, search/latency.json of an earlier run on the same device, or its directory."""

    def __post_init__(self) -> None:
        expect_counts(self, "latency", batch=1, tokens=1, context=0, repeats=1)


@dataclass(frozen=True)
class ServingConfig:
    """Serving: how the model will be used, for --target memory=..., decode=... and prefill=...."""

    format: Literal["auto"] | FileType = "auto"
    """Form of the weights, by its name in a GGUF file; auto is that of the checkpoint. memory counts in it."""
    batch: int = 1
    """Sequences at a time."""
    context: int = 2048
    """Tokens of each sequence: in the cache for memory and decode, read at once for prefill."""

    def __post_init__(self) -> None:
        expect_counts(self, "serving", batch=1, context=1)


@dataclass(frozen=True)
class RefitConfig:
    """Refit: the searched model's weights learn the dense model's distribution."""

    tokens: int = 131_072
    """Tokens that neither calibration nor search has seen, for one pass; 0 keeps the database's weights."""
    learning_rate: float = 2e-4
    """Highest learning rate of AdamW."""
    batch_size: int = 1
    """Sequences in a step."""
    rank: int = 32
    """Rank of the update of matrices that are no consumers, which are trained whole; 0 trains consumers alone."""

    def __post_init__(self) -> None:
        expect_counts(self, "refit", tokens=0, batch_size=1, rank=0)
        expect_positive(self, "refit", "learning_rate")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out documents."""

    tokens: int = 16_384
    """Held-out tokens for perplexity and KL divergence."""
    texts: tuple[str, ...] = ()
    """Further texts to judge models on, such as [a.txt,b.jsonl]: each by itself, over as many tokens from its start.
    Documents that calibration, search or training may use are left out of them."""
    prompts: tuple[str, ...] = (
        "The capital of France is",
        "Water boils at",
        "The Roman Empire was",
    )
    """Beginnings that each model continues greedily."""
    continuation_tokens: int = 32
    """New tokens in each continuation."""
    chat: str | None = None
    """Chats (a .jsonl or .parquet file, or a datasets id) whose first turns models answer: whether the answers end."""
    chat_prompts: int = 32
    """Prompts of --evaluation.chat, at most."""
    answer_tokens: int = 256
    """Tokens of an answer, at most."""
    speed_tokens: int = 512
    """Prompt tokens of the prefill timing."""
    decode_tokens: int = 32
    """New tokens of the decode timing."""
    repeats: int = 5
    """Alternating timings of each model; the median counts."""

    def __post_init__(self) -> None:
        expect_counts(self, "evaluation", tokens=1, continuation_tokens=0, speed_tokens=1, decode_tokens=1, repeats=1)
        expect_counts(self, "evaluation", chat_prompts=1, answer_tokens=1)
        expect(all(self.prompts), "evaluation.prompts", "prompts of at least one word", list(self.prompts))
        once = all(self.texts) and len(set(self.texts)) == len(self.texts)
        expect(once, "evaluation.texts", "texts by name, each once", list(self.texts))


@dataclass(frozen=True)
class ExportConfig:
    """Export: the form that a model is written in."""

    format: Literal["hf", "gguf"] = "hf"
    """A directory for transformers and vLLM, or a file for llama.cpp, Ollama and LM Studio."""
    type: Literal["auto"] | FileType = "auto"
    """Precision of a GGUF file; auto is f16. A directory keeps that of the model."""
    data: str | None = None
    """Text, as for darwinlm compress, on which the importance of the weights of a GGUF file of six bits or less is
    measured; a run's own text if none is given."""
    tokens: int = 16_384
    """Tokens of that text."""
    target: str | None = None
    """Of a frontier: the size, as for darwinlm compress; one that it lacks is searched first, from its neighbours."""
    compat: Literal["none", "vllm", "anymodel"] = "none"
    """vllm: write small modules of zeros where a block has none, which vLLM wants. anymodel: write the form that is
    proposed for its AnyModel, which no release has and transformers does not load."""
    verify: bool = True
    """Load an hf export in a fresh process without darwinlm and compare its logits."""

    def __post_init__(self) -> None:
        fits = self.compat == "none" or self.format == "hf"
        expect(fits, "compat", "none for a GGUF file", self.compat)
        expect_counts(self, "", tokens=1)
        fits = self.type == "auto" or self.format == "gguf"
        expect(fits, "type", "none for a directory, which keeps the model's precision", self.type)


@dataclass(frozen=True)
class RunConfig:
    """A run: what determines its result, and where it goes."""

    model: str
    """A hub id, a directory, a .gguf file, or smollm2-135m."""
    data: str
    """Text or chats: fineweb-edu, wikitext2, c4, a datasets id, a .txt, .jsonl or .parquet file, vital-wiki,
    self (what the dense model writes) or self:SOURCE (its answers). SOURCE=WEIGHT,SOURCE=WEIGHT mixes."""
    out: str
    """Directory of the run. The same command resumes it."""
    target_level: float | None = None
    """Uniform level whose size the result must not exceed, out of database.levels; need not be whole. Without a target,
    half of database.levels."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the search; auto is bfloat16 where the device is fast at it."""
    genome: str | None = None
    """Genome to use without search or budget: search/result.json of another run, or a JSON list of levels."""
    target: str | None = None
    """The size of the result: params, flops (a token), kv-cache (bytes a token), memory (weights and cache) or latency,
    as the share of the dense model that is kept (params=0.6) or an amount (params=4.7B, memory=3GB, latency=20ms), or
    the speed decode or prefill (decode=20tok/s, decode=1.5x). The result stays below it, by less than 1 %. Several have
    commas between them, and all are kept: memory=3GB,decode=20tok/s."""
    keep_attention: bool = False
    """Let no block lose all of its attention, which vLLM wants."""
    fit_data: bool = False
    """Scale the stages' tokens down to the text that there is, instead of refusing too little of it."""
    verify: bool = True
    """Load the export in a fresh process without darwinlm and compare its logits."""
    reuse: str | None = None
    """Another run, whose database of the same model, text and settings is used instead of a new one."""
    memory: str | None = None
    """Memory of the device that the search may use, such as 24GB; what a GPU has, if not given."""
    report_to: tuple[str, ...] = ()
    """Trackers for the figures of search and refit: tensorboard, trackio, wandb or others that are installed."""
    loss_tokens: LossTokens = "assistant"
    """Of chats in the text, the tokens that count in fitness, refit, training and evaluation: those that the assistant
    wrote, or all. Of other text, all do."""
    own: OwnConfig = field(default_factory=OwnConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        expect_named(self, "model", "data", "out")
        expect_seed(self.seed)
        expect_size(self.memory, "memory")
        expect_one_size(self.target, self.target_level)
        if self.target_level is not None:
            expect_level(self.target_level, self.database.levels)

    @property
    def level(self) -> float:
        """The uniform level of the result's size, where there is no `target`."""
        return self.database.levels / 2 if self.target_level is None else self.target_level


# What `darwinlm demo` runs: a quarter of a small real model's prunable parameters, in minutes on two cores.
DEMO = RunConfig(
    model="smollm2-135m",
    data="vital-wiki",
    out="runs/demo",
    target_level=3.0,
    calibration=CalibrationConfig(tokens=32_768),
    database=DatabaseConfig(levels=12),
    search=SearchConfig(generations=6),
    refit=RefitConfig(tokens=0),
)
