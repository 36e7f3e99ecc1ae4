"""SmolLM2-135M pruned by what others wrote, beside a run of ours: the same text, no more parameters.

darwinlm compress smollm2-135m --data vital-wiki --out RUN --target params=0.8
python benchmarks/rivals.py RUN OUT      # resumes

Torch-Pruning 1.6.1 and optipfair 0.4.2 run as they come, in an environment of their own that borrows torch and
transformers from this one, on eager attention (Torch-Pruning cannot trace sdpa with grouped queries). Each prunes the
run's dense model in float32; the ratio that it is given is the least, of ten bisections, that leaves it no more
parameters than the run's model has. Those that use text get all that the run was calibrated on. Nothing is trained
after pruning; of ours, the stitched genome is listed without its refit too. Seconds are those of one pruning.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from search import open_bench
from time_to_kl import texts
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from darwinlm import load
from darwinlm.commands.run_directory import Run
from darwinlm.data.corpus import read_corpus
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.size import parameter_count
from darwinlm.report import tables

PACKAGES = ("torch_pruning==1.6.1", "optipfair==0.4.2", "click")
BISECTIONS = 10
Prune = Callable[[Any, float, Tensor], PreTrainedModel]
# What each cannot do, found by trying it on this model (9 heads, 3 KV heads, tied embeddings).
BY_HAND = "trace sdpa; set sizes in config and attentions; keep tied ends one matrix (all mended here)"
WIDTH = "prune attentions or the hidden size"


def torch_pruning(
    model: Any, ratio: float, text: Tensor, *, heads: bool, hidden: bool, taylor: bool = False
) -> PreTrainedModel:
    """As its LLM example does, which prunes all of it by norms of groups: MLPs, and heads and the hidden size.

    Args:
        taylor: by the first-order importance that the package has too.
    """
    tp: Any = import_module("torch_pruning")
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    if taylor:
        importance = tp.importance.GroupTaylorImportance()
        for ids in text.split(1):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    attentions = [layer.self_attn for layer in model.model.layers]
    counts: dict[Any, int] = {}
    for attention in attentions if heads else ():
        counts[attention.q_proj] = model.config.num_attention_heads
        counts[attention.k_proj] = counts[attention.v_proj] = model.config.num_key_value_heads
    whole = [] if heads else [linear for at in attentions for linear in (at.q_proj, at.k_proj, at.v_proj)]
    widths = {} if hidden else {layer.mlp.gate_proj: ratio for layer in model.model.layers}
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=text[:1, :8],
        forward_fn=lambda model, ids: model(ids, use_cache=False).logits,  # it cannot follow a cache
        importance=importance,
        pruning_ratio=ratio if hidden else 0.0,
        pruning_ratio_dict=widths,
        ignored_layers=[model.lm_head, *whole],
        num_heads=counts,
        prune_num_heads=heads,
        prune_head_dims=False,
        head_pruning_ratio=ratio if heads else 0.0,
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    return with_sizes(model)


def with_sizes(model: Any) -> PreTrainedModel:
    """What Torch-Pruning leaves to its user: sizes in the config and in the attentions, and one matrix at both ends."""
    config, layer = model.config, model.model.layers[0]
    config.hidden_size, config.intermediate_size = model.lm_head.in_features, layer.mlp.gate_proj.out_features
    config.num_attention_heads = layer.self_attn.q_proj.out_features // config.head_dim
    config.num_key_value_heads = layer.self_attn.k_proj.out_features // config.head_dim
    for block in model.model.layers:
        attention = block.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    if config.tie_word_embeddings:  # it prunes the two alike, but leaves a copy in each
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def optipfair_mlp(model: Any, ratio: float, text: Tensor, *, calibrated: bool) -> PreTrainedModel:
    """The same share of every MLP, by the range of weights, alone or with the norms of activations."""
    given = {"dataloader": batches(text)} if calibrated else {}
    package: Any = import_module("optipfair")
    return package.prune_model(model, "MLP_GLU", "MAW", 100 * ratio, show_progress=False, **given)


def optipfair_depth(model: Any, ratio: float, text: Tensor) -> PreTrainedModel:
    """The blocks that turn the stream least on the text, as its documentation does it."""
    package: Any = import_module("optipfair")
    count = max(round(ratio * model.config.num_hidden_layers), 1)
    importance = package.analyze_layer_importance(model, batches(text), show_progress=False)
    least = sorted(importance, key=importance.__getitem__)[:count]
    return package.prune_model(model, "DEPTH", layer_indices=least, show_progress=False)


def optipfair_both(model: Any, ratio: float, text: Tensor) -> PreTrainedModel:
    """The same share of the blocks, then of every MLP that is left, in its documentation's order."""
    return optipfair_mlp(optipfair_depth(model, ratio, text), ratio, text, calibrated=True)


def batches(text: Tensor) -> list[dict[str, Tensor]]:
    """As optipfair takes text."""
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in text.split(4)]


RIVALS: dict[str, tuple[Prune, str]] = {
    "Torch-Pruning, its LLM example": (
        lambda *given: torch_pruning(*given, heads=True, hidden=True),
        f"{BY_HAND}; prune query heads but by threes",
    ),
    "Torch-Pruning, MLP and hidden size": (lambda *given: torch_pruning(*given, heads=False, hidden=True), BY_HAND),
    "Torch-Pruning, MLP": (lambda *given: torch_pruning(*given, heads=False, hidden=False), BY_HAND),
    "Torch-Pruning, MLP by Taylor": (
        lambda *given: torch_pruning(*given, heads=False, hidden=False, taylor=True),
        BY_HAND,
    ),
    "optipfair, MLP by weights": (lambda *given: optipfair_mlp(*given, calibrated=False), WIDTH),
    "optipfair, MLP by weights and activations": (lambda *given: optipfair_mlp(*given, calibrated=True), WIDTH),
    "optipfair, least important blocks": (optipfair_depth, f"{WIDTH}; reach every size by blocks alone"),
    "optipfair, blocks and MLP": (optipfair_both, f"{WIDTH}; choose how much of which (the same share here)"),
}


def prune(name: str, dense: PreTrainedModel, parameters: int, text: Tensor) -> tuple[PreTrainedModel, float]:
    """The largest model of a rival that has no more parameters, and the seconds that pruning it took.

    How many parameters are left does not depend on text, so a sequence does to find the ratio.
    """
    low, high, fits = 0.0, 1.0, None
    refusal = f"no ratio leaves {parameters:,} parameters"
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        try:
            count = parameter_count(RIVALS[name][0](copy.deepcopy(dense), ratio, text[:1]))
        except Exception as error:  # a rival may refuse to leave so little
            high, refusal = ratio, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if count <= parameters:
            fits = high = ratio
        else:
            low = ratio
    if fits is None:
        raise ValueError(refusal)
    began = time.perf_counter()
    model = RIVALS[name][0](dense, fits, text)
    seconds = time.perf_counter() - began
    assert parameter_count(model) <= parameters
    return model, seconds


def stock(model: PreTrainedModel, ids: Tensor) -> str:
    """Whether `save_pretrained` writes what `from_pretrained` reads, with the same logits."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        try:
            model.save_pretrained(directory)
            again: Any = AutoModelForCausalLM.from_pretrained(directory)
            difference = (again(ids).logits - model(ids).logits).abs().max().item()  # pyright: ignore[reportCallIssue]
        except Exception as error:  # whatever transformers stumbles over
            return f"no: {str(error).strip().splitlines()[-1].strip()[:90]}"
    return "yes" if difference < 1e-3 else f"no: logits differ by {difference:.2g}"


def measure(models: dict[str, PreTrainedModel], on: dict[str, Tensor]) -> dict[str, Any]:
    """Perplexity and KL of the second model, the first being the dense one."""
    _, name = models
    found = {text: perplexity_and_kl(models, ids)[name] for text, ids in on.items()}
    return {text: [quality.perplexity, quality.kl] for text, quality in found.items()}


def rival(name: str, inputs: Path, out: Path) -> None:
    """In the environment of the rivals: prune, measure, write."""
    given = torch.load(inputs)
    dense: Any = load(Path(given["dense"]), "float32")
    dense.set_attn_implementation("eager")
    line: dict[str, Any] = {"name": name}
    try:
        model, line["seconds"] = prune(name, copy.deepcopy(dense), given["parameters"], given["calibration"])
        line |= {"parameters": parameter_count(model), **measure({"dense": dense, name: model}, given["texts"])}
        line["stock"] = stock(model, given["calibration"][:1, :64])
    except Exception as error:
        line["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    out.write_text(json.dumps(line))


def ours(run: Run, inputs: Path, python: Path) -> list[dict[str, Any]]:
    """The dense model, the run's export, and its genome as the database has it."""
    given = torch.load(inputs)
    bench, _ = open_bench(run.path, torch.float32)
    dense, stock = bench.stitcher.dense, loads(run.exported, python)
    models: dict[str, Any] = {"dense": dense, "darwinlm, without refit": bench.stitcher.stitch(run.genome)}
    if run.config.refit.tokens:
        models["darwinlm"] = load(run.exported, "float32")
    lines = []
    for name, model in models.items():
        found = measure({"": dense, name: model}, given["texts"])
        loaded = stock if name == "darwinlm" else "-"
        lines.append({"name": name, "parameters": parameter_count(model), "stock": loaded, **found})
    return lines


def loads(exported: Path, python: Path) -> str:
    """Whether a process without darwinlm loads an export, and with what."""
    for trust, answer in ((False, "yes"), (True, "with trust_remote_code")):
        call = f"from_pretrained({str(exported)!r}, trust_remote_code={trust})"
        code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.{call}"
        if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
            return answer
    return "no"


def prepare(run: Run, path: Path) -> None:
    """What every model is given."""
    config, tokenizer = run.config, find_checkpoint(run.config.model, run.path).tokenizer
    corpus = read_corpus(config.data, tokenizer, config.calibration.sequence_length, config.seed)
    given = {
        "dense": str(run.dense),
        "parameters": parameter_count(load(run.exported)),
        "calibration": corpus.draw(calibration=config.calibration.tokens)["calibration"],
        "texts": texts(config, run.path),
    }
    torch.save(given, path)


def environment(root: Path) -> Path:
    """Python of a virtual environment with the rivals; everything else is borrowed."""
    if not (root / "ready").exists():
        venv.create(root, with_pip=True)
        site = root / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        python = root / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (root / "ready").touch()
    return root / "bin" / "python"


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table, in Markdown."""
    titles = ["model", "parameters", "perplexity, articles", "KL", "perplexity, WikiText-2", "KL", "seconds"]
    titles += ["loads as stock", "cannot"]
    cells = []
    for line in lines:
        cannot = RIVALS[line["name"]][1] if line["name"] in RIVALS else "-"
        if "failed" in line:
            cells.append([line["name"], *[""] * 6, line["failed"], cannot])
        else:
            (one, kl_one), (two, kl_two) = line["articles"], line["wikitext"]
            figures = [f"{one:.2f}", f"{kl_one:.4f}", f"{two:.2f}", f"{kl_two:.4f}"]
            seconds = f"{line['seconds']:.0f}" if "seconds" in line else "-"
            cells.append([line["name"], f"{line['parameters']:,}", *figures, seconds, line["stock"], cannot])
    print(tables.markdown(titles, cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run on SmolLM2-135M")
    parser.add_argument("out", type=Path, help="keeps what was measured, and the environment")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out: Path = arguments.out
    inputs = out / "inputs.pt"
    if arguments.rival:
        rival(arguments.rival, inputs, out / f"{arguments.rival}.json")
        return
    out.mkdir(parents=True, exist_ok=True)
    run = Run.open(arguments.run)
    if not inputs.exists():
        prepare(run, inputs)
    python = environment(out / "environment")
    source = os.pathsep.join([str(Path(__file__).resolve().parents[1] / "src"), str(Path(__file__).parent)])
    for name in RIVALS:
        if not (out / f"{name}.json").exists():
            command = [python, __file__, str(arguments.run), str(out), "--rival", name]
            subprocess.run(command, env=os.environ | {"PYTHONPATH": source}, check=True)
    show([*(json.loads((out / f"{name}.json").read_text()) for name in RIVALS), *ours(run, inputs, python)])


if __name__ == "__main__":
    main()
