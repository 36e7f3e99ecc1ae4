"""What the first token of a sequence and the token between documents are worth: perplexity, and the first token's share
of the Hessians, on SmolLM2-135M-Instruct, whose tokenizer adds no BOS. Held-out articles, sequences of 512."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from darwinlm.data.corpus import is_held_out
from darwinlm.data.documents import read_documents
from darwinlm.database.calibrate import calibrate
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint

LENGTH = 512
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def packed(documents: list[list[int]], separator: list[int], first: list[int], sequences: int) -> Tensor:
    stream = [token for ids in documents for token in [*ids, *separator]]
    text = LENGTH - len(first)
    body = torch.tensor(stream[: sequences * text]).view(sequences, text)
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(sequences, -1), body], dim=1)


def first_token_shares(checkpoint: Checkpoint, ids: Tensor) -> dict[str, float]:
    statistics = calibrate(checkpoint, ids, batch_size=8, device=torch.device("cpu"))
    return {unit.unit.name: unit.first_token for unit in statistics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    sequences = parser.parse_args().sequences
    with TemporaryDirectory() as directory:
        checkpoint = find_checkpoint("smollm2-135m", Path(directory))
        tokenizer: Any = checkpoint.tokenizer
        texts = [text for text in read_documents("vital-wiki") if text.strip() and is_held_out(text)]
        documents = tokenizer(texts[:150], add_special_tokens=False)["input_ids"]
        model = checkpoint.load(torch.float32, torch.device("cpu"))
        ids = {token: [tokenizer.convert_tokens_to_ids(token)] for token in TOKENS} | {"none": []}
        print("perplexity, without a first token of its own, by the token between documents")
        for name in (*TOKENS, "none"):
            found = perplexity_and_kl({"dense": model}, packed(documents, ids[name], [], sequences))
            print(f"{name:14} {found['dense'].perplexity:.3f}")
        print("documents apart by <|endoftext|>: perplexity, and the first token's share of a unit's Hessian")
        for name in ("none", *TOKENS):
            sample = packed(documents, ids["<|endoftext|>"], ids[name], sequences)
            found = perplexity_and_kl({"dense": model}, sample)["dense"].perplexity
            shares = first_token_shares(checkpoint, sample)
            most = max(shares, key=shares.__getitem__)
            print(f"{name:14} {found:.3f}  median {median(shares.values()):.2%}, most {shares[most]:.1%} ({most})")


if __name__ == "__main__":
    main()
