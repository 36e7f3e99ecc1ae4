"""Runs in the environment of four_bit.py: quantises a model, loads what was written, and compares logits.

Arguments: the dense model, the model, where to write, a file of texts, and the columns in a group.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS, PROMPT = 24, 32


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@torch.no_grad()
def log_probs(model: Any, sequences: torch.Tensor) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0].float().log_softmax(-1) for ids in sequences]


def divergence(dense: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """KL(dense || other) in nats a token."""
    sums = [(p.exp() * (p - q)).sum(-1).double().mean() for p, q in zip(dense, other, strict=True)]
    return torch.stack(sums).mean().item()


def quantise(directory: Path, out: Path, sequences: torch.Tensor, group: int) -> None:
    compressor: Any = import_module("llmcompressor")
    modifiers: Any = import_module("llmcompressor.modifiers.gptq")
    formats: Any = import_module("compressed_tensors.quantization")
    datasets: Any = import_module("datasets")
    weights = formats.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = formats.QuantizationScheme(targets=["Linear"], weights=weights)
    model = load(directory)
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in sequences]
    compressor.oneshot(
        model=model,
        recipe=modifiers.GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        dataset=datasets.Dataset.from_list(rows),
        num_calibration_samples=len(rows),
        max_seq_length=sequences.shape[1],
        pipeline="basic",  # a pruned layer may lack a part, which what traces layers one by one does not expect
        trust_remote_code_model=True,
    )
    model.save_pretrained(out, save_compressed=True)
    for file in directory.glob("*token*"):
        shutil.copyfile(file, out / file.name)


def main() -> None:
    dense, model, out, texts = map(Path, sys.argv[1:5])
    drawn = torch.load(texts)
    wanted = log_probs(load(dense), drawn["evaluation"])
    found: dict[str, Any] = {"kl": divergence(wanted, log_probs(load(model), drawn["evaluation"]))}
    quantise(model, out, drawn["calibration"], int(sys.argv[5]))
    quantised = load(out)
    found["kl at 4 bits"] = divergence(wanted, log_probs(quantised, drawn["evaluation"]))
    prompt = drawn["evaluation"][:1, :PROMPT]
    quantised.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(prompt)}
    tokens = quantised.generate(prompt, **options)[0, PROMPT:].tolist()
    found |= {"prompt": prompt[0].tolist(), "tokens": tokens}
    found["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
