"""The KL of a search's parents on other texts equals that of whole logits in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from darwinlm.data.corpus import Drawn
from darwinlm.model.blocks import InHostMemory, Resident
from darwinlm.runtime.files import read_record, write_record
from darwinlm.search import held_out as module
from darwinlm.search.held_out import curves
from darwinlm.types import Generation
from pruned import prune, token_ids


def test_a_few_better_genomes_are_judged_on_every_text(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = prune(checkpoints["llama-gqa"], tmp_path / "database")
    stitcher, genomes = pruned.stitcher, pruned.genomes()[:5]
    monkeypatch.setattr(module, "POINTS", 3)
    monkeypatch.setattr(module, "TOKENS", 64)  # two sequences
    monkeypatch.setattr(module, "BATCH_TOKENS", 32)  # of which one is a batch
    order = [0, 0, 1, 2, 2, 3, 3, 4, 4]
    history = [Generation(number, 1.0, genomes[i], 1, 0.0) for number, i in enumerate(order)]
    some = torch.arange(2 * token_ids(4, 2).shape[1]).view(2, -1) % 3 == 0
    texts = {"one": Drawn(token_ids(3, 4), None), "other": Drawn(token_ids(4, 2), some)}
    blocks = Resident(stitcher.dense, stitcher.family)
    measured, beside = curves(stitcher, blocks, history, genomes[4], texts, tmp_path / "curves.json")
    assert list(measured) == list(beside) == ["one", "other"]
    for name, (ids, counts) in texts.items():
        assert [generation for generation, _ in measured[name]] == [0, 3, 7]
        judged = [(order[generation], divergence) for generation, divergence in measured[name]]
        for number, divergence in [*judged, (4, beside[name])]:
            models = (stitcher.dense, stitcher.stitch(genomes[number]))
            log_p, log_q = (model(ids[:2]).logits.double().log_softmax(-1) for model in models)
            divergences = (log_p.exp() * (log_p - log_q)).sum(-1)
            expected = (divergences if counts is None else divergences[counts]).mean().item()
            assert divergence == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(module, "Lockstep", None)  # kept curves are not measured again
    assert curves(stitcher, blocks, history, genomes[4], texts, tmp_path / "curves.json") == (measured, beside)


def test_a_search_that_found_nothing_better_has_one_point(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pruned = prune(checkpoints["llama-gqa"], tmp_path / "database")
    history = [Generation(number, 1.0, pruned.genomes()[0], 1, 0.0) for number in range(3)]
    blocks = InHostMemory.of(pruned.stitcher.dense, pruned.stitcher.family, torch.device("cpu"))
    texts, file = {"text": Drawn(token_ids(3, 2), None)}, tmp_path / "curves.json"
    measured, beside = curves(pruned.stitcher, blocks, history, pruned.genomes()[0], texts, file)
    assert [generation for generation, _ in measured["text"]] == [0]
    assert beside["text"] == measured["text"][0][1]
    record = read_record(file)
    write_record(file, {"curves": record["curves"]}, record["provenance"])  # as 0.2.0 left it
    assert curves(pruned.stitcher, blocks, history, pruned.genomes()[0], texts, file) == (measured, beside)
