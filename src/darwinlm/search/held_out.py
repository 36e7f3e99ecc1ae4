"""KL of a search's parents on held-out texts, which shows whether gains on the search's tokens carry over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from darwinlm.data.corpus import Drawn, fingerprint
from darwinlm.database.stitch import Stitcher
from darwinlm.losses.logits import Logits
from darwinlm.losses.metrics import divergence
from darwinlm.model.blocks import Blocks
from darwinlm.runtime.files import as_json, read_record, write_record
from darwinlm.runtime.progress import track
from darwinlm.search.fitness import BATCH_TOKENS
from darwinlm.search.lockstep import Lockstep
from darwinlm.types import Curve, DarwinError, Generation, Genome

POINTS = 8  # the most that a curve has
TOKENS = 4096  # that are taken of each text


def curves(
    stitcher: Stitcher,
    blocks: Blocks,
    history: Sequence[Generation],
    uniform: Genome,
    texts: Mapping[str, Drawn],
    file: Path,
) -> tuple[dict[str, Curve], dict[str, float]]:
    """Return, by text, the KL divergence of the parents of some generations as a curve, and that of `uniform`.

    All are untrained, and run through the dense model's `blocks` in lockstep. Only generations that improved on the
    parent are considered; at most `POINTS` of them are measured, among them the first and the last. The results are
    kept in `file`, which a later call only reads.
    """
    better = [line for i, line in enumerate(history) if i == 0 or line.genome != history[i - 1].genome]
    count = min(POINTS, len(better))
    points = [better[round(i * (len(better) - 1) / max(count - 1, 1))] for i in range(count)]
    # By content, not by name: the names of texts in memory are paths within the run, which may be moved.
    contents = [fingerprint(*text) for text in texts.values()]
    provenance = {"genomes": [line.genome.levels for line in points], "texts": contents}
    if file.exists():
        record = read_record(file, "curves")
        if record["provenance"] != as_json(provenance):
            raise DarwinError(f"{file} is of another search: delete it, and the same command measures the curves again")
        if "uniform" in record:  # 0.2.0 did not measure it
            result = {name: tuple(map(tuple, curve)) for name, curve in zip(texts, record["curves"], strict=True)}
            return result, dict(zip(texts, record["uniform"], strict=True))
    short = [_beginning(text) for text in texts.values()]
    by_text = dict(
        zip(texts, divergences(stitcher, blocks, [uniform, *(line.genome for line in points)], short), strict=True)
    )
    result = {
        name: tuple((line.generation, of_genome[line.genome]) for line in points) for name, of_genome in by_text.items()
    }
    beside = {name: of_genome[uniform] for name, of_genome in by_text.items()}
    write_record(file, {"curves": list(result.values()), "uniform": list(beside.values())}, provenance)
    return result, beside


def _beginning(text: Drawn) -> Drawn:
    """As many sequences of a text as have about `TOKENS`."""
    count = -(-TOKENS // text.ids.shape[1])
    return Drawn(text.ids[:count], None if text.counts is None else text.counts[:count])


@torch.no_grad()
def divergences(
    stitcher: Stitcher, blocks: Blocks, genomes: Sequence[Genome], texts: Sequence[Drawn]
) -> list[dict[Genome, float]]:
    """Return, for each text, the mean KL divergence of each genome's model from the dense one, in nats a token."""
    counts = [torch.ones_like(ids, dtype=torch.bool) if marks is None else marks for ids, marks in texts]
    cut = [ids.split(max(1, BATCH_TOKENS // ids.shape[1])) for ids, _ in texts]
    marked = [rows for marks in counts for rows in marks.split(max(1, BATCH_TOKENS // marks.shape[1]))]
    batches = [batch.to(stitcher.dense.device) for of_text in cut for batch in of_text]
    lockstep = Lockstep(stitcher, blocks, batches, kept_on=torch.device("cpu"))
    logits, dense = Logits.of(stitcher.dense), stitcher.grid.dense()
    sums: list[dict[Genome, float]] = [{} for _ in batches]
    for index in track(range(len(batches)), "curves", len(batches)):
        last: dict[Genome, Tensor] = {}
        for wave in lockstep.hidden([(genome, index) for genome in {dense: 0, **dict.fromkeys(genomes)}]):
            last |= {genome: states[marked[index].to(states.device)] for (genome, _), states in wave.items()}
        reference = divergence(last.pop(dense), logits)
        sums[index] = dict(zip(last, reference.totals(list(last.values()), logits), strict=True))
    means, first = [], 0
    for of_text, marks in zip(cut, counts, strict=True):
        parts, first = sums[first : first + len(of_text)], first + len(of_text)
        tokens = max(1, int(marks.sum()))
        means.append({genome: sum(part[genome] for part in parts) / tokens for genome in parts[0]})
    return means
