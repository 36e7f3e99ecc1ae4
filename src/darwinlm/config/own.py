"""Settings of what the dense model writes itself."""

from __future__ import annotations

from dataclasses import dataclass

from darwinlm.config.checks import expect, expect_counts


@dataclass(frozen=True)
class OwnConfig:
    """Own text: how the dense model writes what `self` means in --data. It is written once and kept."""

    tokens: int | None = None
    """Tokens of each such text, prompts included; if not given, what the stages take of it, and a quarter more."""
    answer_tokens: int = 512
    """Most tokens of an answer, or of a text that begins with nothing."""
    temperature: float = 1.0
    """Temperature of the sampling; 0 takes the likeliest token at every step."""
    top_p: float = 1.0
    """Share of the probability that tokens are sampled from, the likeliest first."""
    batch_size: int = 32
    """Texts that are written at a time."""

    def __post_init__(self) -> None:
        expect_counts(self, "own", tokens=1, answer_tokens=1, batch_size=1)
        expect(0 <= self.temperature <= 10, "own.temperature", "a number from 0 to 10", self.temperature)
        expect(0 < self.top_p <= 1, "own.top_p", "a share above 0, at most 1", self.top_p)
