"""Which causal language models of transformers darwinlm prunes, and at which step it refuses the others.

    python benchmarks/families.py [MODEL_TYPE ...]

Every model type gets a tiny random model, in a fork that may fail or hang. A stitched model passes if its logits equal
those of the dense model in which what was removed is zero; an export passes if it gives these logits again. It goes
through the types that are named, or all, and writes their rows of the table in RESULTS-families.md beside this file.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # whose oracle this is
from forked import attempt

import pruned
import wrappers
from darwinlm.config.run import DatabaseConfig, RefitConfig, RunConfig, SearchConfig
from darwinlm.database.stitch import repeat_shared
from darwinlm.export.verify import Expected
from darwinlm.model.families import block_sizes, find_family, find_units
from darwinlm.model.layers import head_counts, layer_config
from darwinlm.model.reading import load
from darwinlm.search.costs import parameter_costs
from darwinlm.search.evolution import evolve
from darwinlm.search.fitness import Fitness
from darwinlm.search.uniform import uniform
from darwinlm.training.refit import refit
from darwinlm.types import DarwinError, SelectionStage

RESULTS = Path(__file__).with_name("RESULTS-families.md")
UNMADE = "cannot be made tiny"
SECONDS = 120  # for one model
LARGEST = 20_000_000  # parameters of a model that counts as tiny
STEPS = ("units", "database", "stitch", "search", "refit", "export", "reload", "generate")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "dff": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "rotary_dim": 4,
    "init_std": 0.3,
    "initializer_range": 0.3,  # so that attention and logits are far from uniform
}
WINDOW = 8  # tokens, where the family has a window
TURNS = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
DELTA = TURNS | {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "global_head_dim": 32,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Fields without which a small model of the type cannot be built.
NEEDED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "falcon": {"head_dim": None},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 3,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": GEMMA4
    | {
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "gemma4_unified_text": GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    "deepseek_v3": {"head_dim": None},
    "youtu": {"head_dim": None},
    "helium": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "opt": {"word_embed_proj_dim": 64},
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | {"mlp_only_layers": [0, 1, 2, 3]},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "granitemoehybrid": MAMBA | TURNS | {"num_local_experts": 0, "shared_intermediate_size": 96},
    "olmo_hybrid": DELTA,
}
DENSE, HYBRID, STATES = "dense decoder", "hybrid", "state space or linear attention"
AROUND = "language model in another model"
TABLES = {
    DENSE: "",
    HYBRID: "Attention beside, or in turns with, linear attention, convolutions or state spaces.",
    AROUND: "Pruned in place; the export is the whole, and `tests/test_wrapped.py` compares its logits of images.",
}
ATTENTIONS = ("self_attn", "attn", "attention")
KINDS = {  # by a part of a module's path
    "mixture of experts": ("experts", "router", "block_sparse_moe"),
    STATES: ("mamba", "conv", "conv1d", "linear_attn", "mixer", "rg_lru", "time_shift"),
    "encoder with a causal mask": ("encoder.layer",),
    "attention to another model": ("encoder_attn", "crossattention", "cross_attn"),
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of a small model: the sizes are small, everything else is as the class has it."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    default.allow_global_per_layer_attribute_access = True
    fields = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    if getattr(default, "sliding_window", None):
        fields["sliding_window"] = WINDOW
    fields |= NEEDED.get(model_type, {})
    return config_class(**{name: value for name, value in fields.items() if value is not None})


def meta_model(model_type: str) -> PreTrainedModel:
    """A small model without weights."""
    config = tiny_config(model_type)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        return model_class(config)


def tiny_model(model_type: str) -> PreTrainedModel:
    """A small model with random norms and biases too."""
    outline = meta_model(model_type)
    size = sum(parameter.numel() for parameter in outline.parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters remain when all known sizes are small")
    torch.manual_seed(0)
    model = type(outline)(outline.config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in name or "ln_" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    pruned.tiny.draw_scalars(model)
    return model.requires_grad_(False)


def kind_of(model: PreTrainedModel) -> str:
    """What kind of model this is; one whose blocks have only attentions and MLPs is a dense decoder."""
    if model.config.is_encoder_decoder:
        return "encoder and decoder"
    if hasattr(model.config, "vision_config") or hasattr(model.config, "audio_config"):
        return "wrapper of several models"
    paths = [f".{name}." for name, _ in model.named_modules()]
    for kind, parts in KINDS.items():
        if any(f".{part}." in path for part in parts for path in paths):
            attention = any(f".{part}." in path for part in ATTENTIONS for path in paths)
            return HYBRID if kind == STATES and attention else kind
    return DENSE


def kind_of_config(config: PreTrainedConfig) -> str:
    """What kind of model a config is of that no small model is made of; what its fields tell."""
    if config.is_encoder_decoder:
        return "attention to another model"
    if any(name.startswith(("text_", "vision_", "decoder_")) for name in config.sub_configs):
        return "wrapper of several models"
    kinds = {
        r'"(\w*num_\w*experts": [1-9]|n_routed_experts")': "mixture of experts",
        r'"(state_size|mamba_\w+)"': "state space or linear attention",
    }
    text = config.to_json_string(use_diff=False)
    return next((kind for pattern, kind in kinds.items() if re.search(pattern, text)), UNMADE)


def steps(model: PreTrainedModel, directory: Path) -> Iterator[str]:
    """Take a model through all steps. Yields the name of each step that it has passed."""
    checkpoint_path = directory / "dense"
    model.save_pretrained(checkpoint_path)
    pruned.tiny.tokenizer().save_pretrained(checkpoint_path)
    checkpoint = pruned.Checkpoint(checkpoint_path)
    find_units(checkpoint.skeleton(), checkpoint.config)
    yield "units"
    alone = (
        head_counts(layer_config(checkpoint.config, 0))[1] == 1
    )  # a KV head, so that its group is the whole attention
    case = pruned.prune(checkpoint_path, directory / "database", "head" if alone else "kv_group")
    assert case.checkpoint.fingerprint
    yield "database"
    ids = pruned.token_ids(1) % (wrappers.IMAGE - 1)
    torch.testing.assert_close(case.dense(ids).logits, model(ids).logits)
    for genome in case.genomes():
        expected = pruned.zero_masked(case.dense, case.database, genome)(ids).logits
        torch.testing.assert_close(case.stitcher.stitch(genome)(ids).logits, expected, rtol=1e-4, atol=2e-4)
    yield "stitch"
    size = sum(parameter.numel() for parameter in case.dense.parameters())
    config = RunConfig("M", "D", "O", 1.5, database=DatabaseConfig(levels=pruned.CONFIG.levels))
    start, budget = uniform(case.database.grid, parameter_costs(case.database.grid, size), config, size)
    stages = (SelectionStage(survivors=2, fitness_tokens=64), SelectionStage(survivors=1, fitness_tokens=128))
    search = SearchConfig(generations=1, offspring=4, stages=stages)
    fitness = Fitness(case.stitcher, ids, ids, search)
    best = evolve({"uniform": start}, budget, fitness, search, 0, directory / "history.jsonl").best
    dense, last = case.database.grid.dense(), stages[-1]
    assert abs(fitness.score(dense, last)) < 1e-4, "the dense genome differs from the dense model"
    again = Fitness(case.stitcher, ids, ids, search)  # which has no traces of a parent
    assert abs(fitness.score(best, last, start) - again.score(best, last)) < 1e-4, "a trace changes a score"
    yield "search"
    settings = RefitConfig(tokens=ids.numel(), batch_size=3)
    refit(case.stitcher, best, pruned.token_ids(2), settings, directory / "refit.safetensors", {})
    yield "refit"
    for index, genome in enumerate((best, case.genomes()[-2])):  # in the second, an attention and an MLP are missing
        stitched = repeat_shared(case.stitcher.stitch(genome))
        sizes, out = block_sizes(case.database.grid, genome, case.dense.config), directory / f"export-{index}"
        tokenizer, expected = (
            pruned.tiny.tokenizer(),
            Expected.of(stitched, checkpoint.whole),
        )  # of a process without darwinlm
        pruned.export_hf(stitched, sizes, tokenizer, out, "", expected, checkpoint_path)
    yield "export"
    exported: Any = load(directory / "export-1", torch.float32)
    expected = pruned.zero_masked(case.dense, case.database, case.genomes()[-2])(ids).logits
    torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=2e-4)
    assert find_family(exported) == case.checkpoint.family
    find_units(exported, exported.config)
    yield "reload"
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    masked: Any = pruned.zero_masked(case.dense, case.database, case.genomes()[-2])
    for use in (True, False):
        found, wanted = (each.generate(ids, use_cache=use, **options) for each in (exported, masked))
        assert torch.equal(found, wanted), f"other tokens than those of the zero-masked model, use_cache={use}"
    yield "generate"


def examine(model_type: str, out: Path) -> int:
    """Write to `out` the kind of a model type, the steps that it passes, and why it passes no more."""
    found: dict[str, Any] = {"kind": kind_of_config(CONFIG_MAPPING[model_type]()), "passed": []}
    try:
        around = model_type in wrappers.CONFIGS
        kind = AROUND if around else kind_of(meta_model(model_type))
        model = wrappers.build(model_type) if around else tiny_model(model_type) if kind in TABLES else None
        found["kind"] = kind
        if model is not None:
            with tempfile.TemporaryDirectory() as directory:
                for step in steps(model, Path(directory)):
                    found["passed"].append(step)
                    out.write_text(json.dumps(found))
    except DarwinError as error:
        found["refused"] = str(error)
    except Exception as error:
        if found["kind"] in (UNMADE, *TABLES):
            found["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    out.write_text(json.dumps(found))
    return 0


def row(model_type: str, examine_it: Callable[[str, Path], int] = examine) -> dict[str, Any]:
    """What `examine` finds in a fork."""
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "found.json", Path(directory) / "log"
        ended = attempt(partial(examine_it, model_type, out), log, SECONDS)[0]
        found = json.loads(out.read_text()) if out.exists() else {"kind": UNMADE, "passed": []}
        if ended == "killed":
            found.setdefault("failed", f"not done after {SECONDS} seconds")
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {"type": model_type, "class": names.get(model_type, "")} | found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a column for each step, with the sentence where one is refused or fails."""
    lines = [f"| model type | class | {' | '.join(STEPS)} | refused, or failed |", "|---" * (len(STEPS) + 3) + "|"]
    for found in rows:
        marks = ["yes" if step in found["passed"] else "" for step in STEPS]
        sentence = found.get("refused") or (f"**fails**: {found['failed']}" if "failed" in found else "")
        lines.append(f"| `{found['type']}` | {found['class']} | {' | '.join(marks)} | {sentence.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def report(rows: list[dict[str, Any]]) -> str:
    """The tables of models that are pruned, and lists of all others."""
    text = f"# Families\n\ntransformers {transformers.__version__}, torch {torch.__version__}.\n\n"
    for kind, title in TABLES.items():
        found = [each for each in rows if each["kind"] == kind]
        counts = Counter(step for each in found for step in each["passed"])
        if not found:
            continue
        text += f"## {kind.capitalize()}\n\n{title} " if title else ""
        text += (
            f"{len(found)} {'dense decoders' if kind == DENSE else 'models'}; "
            + ", ".join(f"{step} {counts[step]}" for step in STEPS)
            + ".\n\n"
        )
        text += table(found) + "\n"
    text = text.removesuffix("\n")
    for kind in sorted({found["kind"] for found in rows} - TABLES.keys()):
        text += f"\n## {kind.capitalize()}\n\n"
        for found in rows:
            if found["kind"] == kind:
                reason = f": {found['failed']}" if "failed" in found else ""
                text += f"- `{found['type']}`{reason}\n"
    others = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    others -= {found["type"] for found in rows}
    text += "\n## Image and text, outside the causal models\n\nNot run: "
    return text + ", ".join(f"`{name}`" for name in sorted(others)) + ".\n"


def read_report(text: str) -> dict[str, dict[str, Any]]:
    """The rows that a report was written from, by model type."""
    rows: dict[str, dict[str, Any]] = {}
    kind = DENSE
    for line in text.splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ").lower()
        elif line.startswith("| `"):
            name, model_class, *marks, sentence = (cell.strip() for cell in line.strip("|").split("|"))
            found: dict[str, Any] = {"passed": [step for step, mark in zip(STEPS, marks, strict=True) if mark]}
            if sentence.startswith("**fails**: "):
                found["failed"] = sentence.removeprefix("**fails**: ")
            elif sentence:
                found["refused"] = sentence
            rows[name.strip("`")] = {"type": name.strip("`"), "class": model_class, "kind": kind} | found
        elif line.startswith("- `"):
            name, _, reason = line.removeprefix("- `").partition("`")
            failed = {"failed": reason.removeprefix(": ")} if reason else {}
            rows[name] = {"type": name, "class": "", "kind": kind, "passed": []} | failed
    return rows


def main() -> None:
    """Write the rows of the model types that are named, or of all."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = read_report(RESULTS.read_text()) if sys.argv[1:] else {}
    for name in sys.argv[1:] or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *wrappers.CONFIGS}):
        rows[name] = row(name)
        print(f"{name}: {json.dumps(rows[name])}", file=sys.stderr, flush=True)
    RESULTS.write_text(report([rows[name] for name in sorted(rows)]))


if __name__ == "__main__":
    main()
