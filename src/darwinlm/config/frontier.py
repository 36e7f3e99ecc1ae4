"""Settings of `darwinlm frontier`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from darwinlm.config.checks import expect, expect_counts, expect_named, expect_seed, expect_size
from darwinlm.config.evaluation import TasksConfig
from darwinlm.config.own import OwnConfig
from darwinlm.config.run import (
    STARTS,
    CalibrationConfig,
    DatabaseConfig,
    EvaluationConfig,
    GuardConfig,
    LatencyConfig,
    RefitConfig,
    SearchConfig,
    ServingConfig,
)
from darwinlm.types import FileType, LossTokens


@dataclass(frozen=True)
class FrontierConfig(TasksConfig):
    """Frontier: a model at each of several sizes over one database."""

    model: str
    """A hub id, a directory, a .gguf file, or smollm2-135m."""
    data: str
    """Text: as for darwinlm compress. Its held-out documents are what models are judged on."""
    out: str
    """Directory of the frontier. The same command resumes it; sizes and tasks can be added later."""
    targets: tuple[str, ...] = ()
    """Sizes, each as for darwinlm compress --target; if none are given, --sizes of them from --from to --to."""
    sizes: int = 8
    """Number of sizes."""
    largest: float = 0.95
    """The share of the dense model's parameters that the largest model keeps."""
    smallest: float = 0.4
    """The share that the smallest model keeps."""
    formats: tuple[FileType, ...] = ()
    """Types of GGUF files, such as q8_0 q4_k_m, in which every size and the dense model are judged as well."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the searches; auto is bfloat16 where the device is fast at it. Models are judged in their own."""
    keep_attention: bool = False
    """Let no block lose all of its attention, which vLLM wants."""
    fit_data: bool = False
    """Scale the stages' tokens down to the text that there is, instead of refusing too little of it."""
    memory: str | None = None
    """Memory of the device that the searches may use, such as 24GB; what a GPU has, if not given."""
    loss_tokens: LossTokens = "assistant"
    """Of chats in the text, the tokens that count in fitness, refit, training and evaluation: those that the assistant
    wrote, or all. Of other text, all do."""
    own: OwnConfig = field(default_factory=OwnConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    search: SearchConfig = field(default_factory=lambda: SearchConfig(generations=10))
    guard: GuardConfig = field(default_factory=GuardConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_named(self, "model", "data", "out")
        expect_seed(self.seed)
        expect_size(self.memory, "memory")
        expect_counts(self, "", sizes=1)
        expect(self.search.start in STARTS, "search.start", " or ".join(STARTS), repr(self.search.start))
        known = get_args(FileType)
        expect({*self.formats} <= {*known}, "formats", f"some of {', '.join(known)}", self.formats)
        sane = 0 < self.smallest < self.largest < 1
        expect(sane, "from", "shares of the dense model with 1 > --from > --to > 0", (self.largest, self.smallest))

    @property
    def wanted(self) -> tuple[str, ...]:
        """The targets, each once; where none are given, shares of the parameters at equal distances."""
        if self.targets:
            return tuple(dict.fromkeys(self.targets))
        step = (self.largest - self.smallest) / max(self.sizes - 1, 1)
        shares = (round(self.largest - number * step, 4) for number in range(self.sizes))
        return tuple(f"params={share:g}" for share in shares)
