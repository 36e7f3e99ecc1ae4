"""KL of a search's parents on held-out texts, which shows whether gains on the search's tokens carry over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.data.corpus import fingerprint
from darwinlm.database.stitch import Stitcher
from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.losses.metrics import Divergence
from darwinlm.runtime.files import as_json, read_record, write_record
from darwinlm.runtime.progress import track
from darwinlm.search.fitness import BATCH_TOKENS
from darwinlm.types import Curve, DarwinError, Generation, Genome

POINTS = 8  # the most that a curve has
TOKENS = 4096  # that are taken of each text


class HeldOut:
    """Measures the mean KL divergence of models from the dense model on several texts, in nats a token.

    Hidden states are computed in the models' own precision. Each text is a tensor of token ids, `[sequences, length]`.
    """

    @torch.no_grad()
    def __init__(self, dense: PreTrainedModel, texts: Mapping[str, Int[Tensor, "_ length"]]):
        self._logits = Logits.of(dense)
        self._batches = {
            name: [
                (ids, Divergence(hidden_states(dense, ids).flatten(0, 1)))
                for ids in text.split(max(1, BATCH_TOKENS // text.shape[1]))
            ]
            for name, text in texts.items()
        }

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the divergence on each text. The model shares the dense one's output embedding, as all stitched do."""
        return {
            name: sum(
                dense.totals([hidden_states(model, ids).flatten(0, 1)], self._logits)[0] for ids, dense in batches
            )
            / sum(ids.numel() for ids, _ in batches)
            for name, batches in self._batches.items()
        }


def curves(
    stitcher: Stitcher,
    history: Sequence[Generation],
    uniform: Genome,
    texts: Mapping[str, Int[Tensor, "_ length"]],
    file: Path,
) -> tuple[dict[str, Curve], dict[str, float]]:
    """Return, by text, the KL divergence of the parents of some generations as a curve, and that of `uniform`.

    All are stitched and untrained. Only generations that improved on the parent are considered; at most `POINTS` of
    them are measured, among them the first and the last. The results are kept in `file`, which a later call only reads.
    """
    better = [line for i, line in enumerate(history) if i == 0 or line.genome != history[i - 1].genome]
    count = min(POINTS, len(better))
    points = [better[round(i * (len(better) - 1) / max(count - 1, 1))] for i in range(count)]
    # By content, not by name: the names of texts in memory are paths within the run, which may be moved.
    contents = [fingerprint(text) for text in texts.values()]
    provenance = {"genomes": [line.genome.levels for line in points], "texts": contents}
    if file.exists():
        record = read_record(file, "curves")
        if record["provenance"] != as_json(provenance):
            raise DarwinError(f"{file} is of another search: delete it, and the same command measures the curves again")
        if "uniform" in record:  # 0.2.0 did not measure it
            result = {name: tuple(map(tuple, curve)) for name, curve in zip(texts, record["curves"], strict=True)}
            return result, dict(zip(texts, record["uniform"], strict=True))
    held_out = HeldOut(stitcher.dense, {name: text[: -(-TOKENS // text.shape[1])] for name, text in texts.items()})
    genomes = [uniform, *(line.genome for line in points)]
    beside, *divergences = [held_out(stitcher.stitch(genome)) for genome in track(genomes, "curves", len(genomes))]
    measured = list(zip(points, divergences, strict=True))
    result = {name: tuple((line.generation, by_text[name]) for line, by_text in measured) for name in texts}
    write_record(file, {"curves": list(result.values()), "uniform": list(beside.values())}, provenance)
    return result, beside
