"""The guard of the search, against what transformers writes for the same candidates."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from transformers import GenerationConfig

import chats
import runs
from darwinlm.commands import compress
from darwinlm.config.run import GuardConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import MANIFEST, Database
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.search.guard import guard_prompts
from darwinlm.types import Genome, UsageError
from test_answering import ENDS, alone, questions


def test_no_winner_rambles_more_than_the_dense_model_and_its_parent(text: Path, tmp_path: Path) -> None:
    model = chats.write_model(tmp_path / "model")
    GenerationConfig(eos_token_id=ENDS).save_pretrained(model)
    guard = GuardConfig(chat=str(questions(tmp_path / "chat.jsonl")), prompts=16, tokens=12, share=0.0)
    search = replace(runs.SHORT.search, start="uniform", generations=4, stages=runs.SHORT.search.stages[:1])
    config = runs.short(model, text, tmp_path / "run", search=search, seed=1)
    with pytest.raises(UsageError, match=r"no text at .*none\.jsonl: expected a file; check --guard\.chat"):
        compress.run(replace(config, guard=replace(guard, chat=str(tmp_path / "none.jsonl"))))
    run = compress.run(replace(config, guard=guard), until="search")
    checkpoint = Checkpoint(model)
    provenance = json.loads((run.database / MANIFEST).read_text())["provenance"]
    dense = load(model)
    stitcher = Stitcher(
        dense, checkpoint.family, Database(run.database, level_grid(checkpoint.units, 4, 8), provenance)
    )
    prompts = guard_prompts(guard, checkpoint.tokenizer, checkpoint.config)

    def share(genome: Genome) -> float:
        found = stitcher.stitch(genome)
        return fmean(len(alone(found, prompt, guard.tokens)) == guard.tokens for prompt in prompts)

    shares = [share(Genome(tuple(line["genome"]))) for line in runs.history(run.path)]
    allowed = fmean(len(alone(dense, prompt, guard.tokens)) == guard.tokens for prompt in prompts)
    assert 0 < allowed < 1
    for before, after in pairwise(shares):
        assert after <= max(before, allowed)
    assert len(set(shares)) > 1
