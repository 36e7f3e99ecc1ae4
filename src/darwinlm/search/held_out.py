"""KL of a search's parents on texts that it never saw: does what it gains on its own tokens hold elsewhere?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.database.stitch import Stitcher
from darwinlm.losses.logits import Logits
from darwinlm.losses.metrics import Divergence
from darwinlm.runtime.files import read_record, write_record
from darwinlm.runtime.progress import track
from darwinlm.search.fitness import BATCH_TOKENS
from darwinlm.types import Curve, Generation

POINTS = 8  # of a curve, at most


TOKENS = 4096  # of each text


class HeldOut:
    """Mean KL divergence of models from a dense one on several texts, in nats a token, in the models' precision."""

    def __init__(self, dense: PreTrainedModel, texts: Mapping[str, Int[Tensor, "_ length"]]):
        self._batches = {
            name: [
                (ids, Divergence.of(dense, ids))
                for ids in text.to(dense.device).split(max(1, BATCH_TOKENS // text.shape[1]))
            ]
            for name, text in texts.items()
        }

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        head = Logits(model)
        return {
            name: sum(
                dense.total(model.get_decoder()(ids, use_cache=False).last_hidden_state.flatten(0, 1), head)
                for ids, dense in batches
            )
            / sum(dense.tokens for _, dense in batches)
            for name, batches in self._batches.items()
        }


def curves(
    stitcher: Stitcher,
    history: Sequence[Generation],
    texts: Mapping[str, Int[Tensor, "_ length"]],
    file: Path,
) -> dict[str, Curve]:
    """A curve for each text: generations, and the KL of their parents with the database's weights.

    Of the generations that found a better genome a few are taken, the first and the last among them. `file` keeps what
    is found, and a later call only reads it.
    """
    if file.exists():
        return {name: tuple(map(tuple, curve)) for name, curve in read_record(file)["curves"].items()}
    better = [line for i, line in enumerate(history) if i == 0 or line.genome != history[i - 1].genome]
    count = min(POINTS, len(better))
    points = [better[round(i * (len(better) - 1) / max(count - 1, 1))] for i in range(count)]
    held_out = HeldOut(stitcher.dense, {name: text[: -(-TOKENS // text.shape[1])] for name, text in texts.items()})
    found = [held_out(stitcher.stitch(line.genome)) for line in track(points, "curves", count)]
    drawn = {name: tuple((line.generation, at[name]) for line, at in zip(points, found, strict=True)) for name in texts}
    write_record(file, {"curves": drawn}, {"genomes": [line.genome.levels for line in points]})
    return drawn
