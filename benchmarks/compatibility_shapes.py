"""The checks of compatibility.py on tiny exports, one for each shape of block, against the stock class of each version.

An attention and an MLP are missing in each. The oracle is the dense model whose pruned weights are zero, which the
stock class of that version computes. A check that the stock class itself fails is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compatibility import (
    Blocked,
    attention_weights,
    checkpointed,
    classifier,
    compare,
    continuous,
    gradient,
    lora,
    observe,
)

SHAPES = (
    "llama-gqa", "qwen2", "gemma3", "phi3", "olmo2", "glm4", "smollm3", "starcoder2", "phi", "opt-mha", "gpt2-mha",
    "gpt_neox-mha", "falcon-mqa", "falcon-fused-gqa", "bloom-mha", "mpt-mha",
)  # fmt: skip

OWN = ("attention weights of every layer", "continuous batching")  # which ask what only an export has


def prepare(root: Path) -> None:
    """Write a directory for each shape: `export`, `oracle`, and what is asked of both."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import pruned

    for shape in SHAPES:
        directory, config = root / shape, pruned.tiny.CONFIGS[shape]
        for name, value in list(vars(config).items()):
            if "drop" in name and isinstance(value, float):  # or gradients would differ by chance
                setattr(config, name, 0.0)
        pruned.tiny.write_checkpoint(directory / "dense", shape)
        case = pruned.prune(directory / "dense", directory / "database", "head" if "mqa" in shape else "kv_group")
        genome = case.genomes()[-2]
        pruned.write_export(case, genome, directory / "export")
        oracle = pruned.zero_masked(case.dense, case.database, genome)
        state = oracle.state_dict()
        for path, module in oracle.named_modules():
            if getattr(module, "stored_transposed", False):
                state[f"{path}.weight"] = state[f"{path}.weight"].T.contiguous()
        oracle.save_pretrained(directory / "oracle", state_dict=state)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(4, pruned.tiny.VOCAB, (2, 9), generator=draw)  # no special tokens
        mask = torch.ones_like(ids)
        ids[1, :4], mask[1, :4] = 3, 0
        torch.save({"ids": ids[:1], "padded": ids, "mask": mask}, directory / "inputs.pt")


def check(root: Path, out: Path) -> None:
    """Write a cell for every shape as JSON. Runs in the virtual environment of a version."""
    sys.meta_path.insert(0, Blocked())
    import transformers

    transformers.logging.set_verbosity_error()
    cells = {}
    for shape in SHAPES:
        passed, failed, left_out = check_shape(root / shape)
        cells[shape] = f"{len(passed)} of {len(passed) + len(failed)}"
        reasons = {reason: [name for name in failed if failed[name] == reason] for reason in failed.values()}
        for reason, names in reasons.items():
            cells[shape] += f"; **{', '.join(names) if len(names) < 4 else 'the others'}**: {reason}"
        cells[shape] += f" ({', '.join(left_out)}: stock class neither)" if left_out else ""
        print(f"{shape}: {cells[shape]}", file=sys.stderr, flush=True)
    out.write_text(json.dumps(cells))


def check_shape(directory: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """The checks that an export passes, those that it fails with the reason, and those that the stock class fails."""
    batch = torch.load(directory / "inputs.pt")
    passed, failed, left_out = [], {}, []
    for name, run in checks(directory, batch).items():
        try:
            run(directory / "export")
            passed.append(name)
        except Exception as error:
            reason = f"{type(error).__name__} {' '.join(str(error).split())[:120]}"
            if name not in OWN and fails(lambda run=run: run(directory / "oracle")):
                left_out.append(name)
            else:
                failed[name] = reason
    return passed, failed, left_out


def fails(run: Callable[[], Any]) -> bool:
    """Whether something raises."""
    try:
        run()
    except Exception:
        return True
    return False


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def checks(directory: Path, batch: dict[str, Any]) -> dict[str, Callable[[Path], Any]]:
    """By name, what is done with the export, and if that fails with the oracle."""
    sdpa = load(directory / "oracle")._supports_sdpa
    names = [name for name in observe(None, batch) if sdpa or "sdpa" not in name]
    auto_map = json.loads((directory / "export" / "config.json").read_text())["auto_map"]
    grads = {"gradient": torch.zeros(())}

    def seen(path: Path, name: str) -> str:
        with torch.no_grad():
            found, expected = (observe(load(each), batch)[name]() for each in (path, directory / "oracle"))
        return compare(found, expected)

    def saved(path: Path) -> str:
        again = path.parent / f"{path.name}-saved"
        load(path).save_pretrained(again)
        with torch.no_grad():
            return compare(load(again)(batch["ids"]).logits, load(path)(batch["ids"]).logits)

    def checkpointing(path: Path) -> str:
        grads["gradient"] = gradient(load(directory / "oracle"), batch["ids"])
        return checkpointed(load(path), batch | grads)

    found: dict[str, Callable[[Path], Any]] = {name: lambda path, name=name: seen(path, name) for name in names}
    found |= {
        "save and load again": saved,
        "attention weights of every layer": lambda path: attention_weights(load(path), batch["ids"]),
        "gradient checkpointing": checkpointing,
        "LoRA on all-linear (PEFT)": lambda path: lora(load(path), batch["ids"]),
    }
    if "AutoModelForSequenceClassification" in auto_map:
        found["sequence classification"] = lambda path: classifier(path, batch["ids"])
    return found | {"continuous batching": lambda _: continuous(load(directory / "export"), batch["ids"])}


if __name__ == "__main__":
    check(Path(sys.argv[1]), Path(sys.argv[2]))
