"""What the evaluation of models side by side holds, counted from shapes before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from darwinlm.evaluation.quality import CHUNK

FLOAT = 4  # bytes of float32
LOGITS = 4  # tensors of a chunk's logits: of two models, as they are made and as log-probabilities
STREAMS = 4  # tensors as wide as the stream in a block's forward pass: the stream, its norm, its sum, and an output


def evaluation_bytes(parameters: Sequence[int], config: PretrainedConfig, length: int, each: int) -> int:
    """Return the bytes of models, and of the pass of one of them over a sequence with the logits of a chunk.

    Args:
        parameters: of each model, embeddings included.
        config: of the dense model.
        length: tokens in a sequence.
        each: bytes of a weight.
    """
    width = STREAMS * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    return each * (sum(parameters) + length * width) + LOGITS * FLOAT * min(CHUNK, length) * config.vocab_size
