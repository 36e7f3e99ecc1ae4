"""KL of any models, also of trained ones, on held-out texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.data.corpus import Corpus
from darwinlm.data.packing import as_sequences
from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.losses.metrics import divergence
from darwinlm.search.fitness import BATCH_TOKENS

WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2_valid.txt"


def judged_texts(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int
) -> dict[str, Int[Tensor, "_ length"]]:
    """Two texts that no run sees, of so many tokens each: held-out articles, and WikiText-2's validation text."""
    wikitext: Tensor = tokenizer(WIKITEXT.read_text(), return_tensors="pt").input_ids[0, :tokens]
    return {
        "articles": corpus.draw_held_out(tokens),
        "WikiText-2": as_sequences(wikitext, length, tokenizer),
    }


class HeldOut:
    """Measures the mean KL divergence of models from the dense model on several texts, in nats a token.

    Hidden states are computed in the models' own precision. Each text is a tensor of token ids, `[sequences, length]`.
    """

    @torch.no_grad()
    def __init__(self, dense: PreTrainedModel, texts: Mapping[str, Int[Tensor, "_ length"]]):
        self._logits = Logits.of(dense)
        self._batches = {
            name: [
                (ids, divergence(hidden_states(dense, ids).flatten(0, 1), self._logits))
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
