"""Which versions of transformers load an export, and what works there. Writes the table of docs/export.md.

    python benchmarks/compatibility.py --versions 5.0.0 5.12.1 5.14.0 5.23.0

Every version gets a virtual environment of its own, which borrows torch from this one. There darwinlm cannot be
imported. What an export gives is compared with the dense model whose pruned weights are zero. Results go to
RESULTS-compatibility.md beside this file, and the table into docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

VERSIONS = ("5.0.0", "5.12.1", "5.14.0", "5.23.0")
RESULTS = Path(__file__).with_name("RESULTS-compatibility.md")
PAGE = Path(__file__).parents[1] / "docs" / "export.md"
MARK = "<!-- benchmarks/compatibility.py -->\n"  # before the table in PAGE, and after
NEW_TOKENS = 32
TOLERANCE = 1e-3  # of the largest logit
PROMPT = "The history of the Roman Empire begins with"
OTHER_PROMPT = "Water boils at a temperature of"
QUESTIONS = [
    ("The capital of France is", ["Paris", "a fish"]),
    ("Two and two make", ["four", "blue"]),
    ("Snow is", ["white", "loud"]),
    ("The opposite of hot is", ["cold", "seven"]),
]


def observe(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Logits and tokens of a model: what an export and the zero-masked dense model must agree in."""
    ids = batch["ids"]

    def greedy(token_ids: Any = ids, **options: Any) -> Any:
        options = {"attention_mask": torch.ones_like(token_ids)} | options
        return model.generate(
            token_ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options
        )

    def logits(kind: str) -> Any:
        model.set_attn_implementation(kind)
        heeded = {each.config._attn_implementation for each in attentions(model) if hasattr(each, "config")}
        if not heeded <= {kind}:
            raise ValueError(f"{kind} was asked for, {heeded} is used")
        return model(ids).logits

    padded = {"token_ids": batch["padded"], "attention_mask": batch["mask"]}
    return {
        "logits, sdpa": lambda: logits("sdpa"),
        "logits, eager": lambda: logits("eager"),
        "greedy with cache": lambda: greedy(),
        "greedy without cache": lambda: greedy(use_cache=False),
        "left-padded batch": lambda: greedy(**padded),
        "static cache": lambda: greedy(cache_implementation="static"),
        "left-padded batch, static cache": lambda: greedy(**padded, cache_implementation="static"),
        "beam search": lambda: greedy(num_beams=3),
    }


def attentions(model: Any) -> list[Any]:
    """The attentions of an export; of a model that does not describe its layers none."""
    path = getattr(model.config, "layer_parts", {}).get("attention", "no such module")
    found = [module for name, module in model.named_modules() if name.endswith(f".{path}")]
    return [module for module in found if next(module.parameters(), None) is not None]


def compare(found: Any, expected: Any) -> str:
    """What a cell of the table says: how far logits are off, or how many new tokens agree."""
    if found.is_floating_point():
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise ValueError(f"{difference:.1e} of the largest logit")
        return f"{difference:.0e}"
    agreed = int((found == expected)[:, -NEW_TOKENS:].sum())
    if found.shape != expected.shape or agreed != expected[:, -NEW_TOKENS:].numel():
        raise ValueError(f"{agreed} of {expected[:, -NEW_TOKENS:].numel()} tokens")
    return f"{agreed} of {agreed} tokens"


# Runs in the virtual environment of a version.


def check(directory: Path, inputs: Path, out: Path, version: str) -> None:
    """Write a cell for every check as JSON."""
    sys.meta_path.insert(0, Blocked())
    import transformers
    from transformers import AutoModelForCausalLM

    if transformers.__version__ != version:
        raise ValueError(f"expected transformers {version}, found {transformers.__version__}")

    def load(path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
        return model.eval()

    batch = torch.load(inputs)
    cells: dict[str, str] = {}
    model: Any = load(directory)

    def saved_again() -> str:
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            return compare(load(Path(saved))(batch["ids"]).logits, batch["expected"]["logits, sdpa"])

    with torch.no_grad():
        for name, run in observe(model, batch).items():
            cells[name] = _cell(lambda run=run, name=name: compare(run(), batch["expected"][name]))
        cells["save and load again"] = _cell(saved_again)
    cells["attention weights of every layer"] = _cell(lambda: attention_weights(load(directory), batch["ids"]))
    cells["continuous batching"] = _cell(lambda: continuous(load(directory), batch["ids"]))
    cells["sequence classification"] = _cell(lambda: classifier(directory, batch["ids"]))
    cells["gradient checkpointing"] = _cell(lambda: checkpointed(load(directory), batch))
    cells["LoRA on all-linear (PEFT)"] = _cell(lambda: lora(load(directory), batch["ids"]))
    cells["lm-eval by path"] = _cell(lambda: _lm_eval(directory, batch["lm_eval"]))
    out.write_text(json.dumps(cells))


class Blocked:
    """An export must load without darwinlm."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "darwinlm":
            raise ImportError("darwinlm is blocked")


def _cell(run: Callable[[], str]) -> str:
    try:
        return run()
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"


def attention_weights(model: Any, ids: Any) -> str:
    """Whether `output_attentions` has an entry for every layer, of as many heads as the layer has."""
    model.set_attn_implementation("eager")
    found = [weights.shape[1] for weights in model(ids, output_attentions=True).attentions]
    layers = [model.config.layer(index) for index in range(model.config.num_hidden_layers)]
    expected = [0 if "attention" in getattr(layer, "skip", ()) else layer.num_attention_heads for layer in layers]
    if found != expected:
        raise ValueError(f"{found} heads where {expected} are expected")
    return f"{len(found)} of {len(found)} layers"


def continuous(model: Any, ids: Any) -> str:
    """That continuous batching, whose cache has one size for all layers, is refused and not silently wrong."""
    try:
        model.generate_batch(inputs=ids.tolist(), progress_bar=False)
    except NotImplementedError:
        return "refused"
    raise ValueError("it is not refused")


def classifier(directory: Path, ids: Any) -> str:
    """That a classifier starts from the decoder of the export."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    options = {"trust_remote_code": True, "dtype": torch.float32}
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3, **options).eval()
    decoder: Any = AutoModel.from_pretrained(directory, **options).eval()
    with torch.no_grad():
        expected = model.score(decoder(ids).last_hidden_state[:, -1])
        return compare(model(ids).logits, expected)


def gradient(model: Any, ids: Any) -> Any:
    """Gradient of the embedding, through every block."""
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return model.get_input_embeddings().weight.grad


def checkpointed(model: Any, batch: dict[str, Any]) -> str:
    older_name = "gradient_checkpointing_enable"  # deprecated in transformers 5.23
    getattr(model, "activation_checkpointing_enable", getattr(model, older_name))()
    calls: list[int] = []
    for module in attentions(model):
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradient(model, batch["ids"])
    if len(calls) != 2 * len(attentions(model)):  # forward, and again for the way back
        raise ValueError(f"{len(attentions(model))} attentions were run {len(calls)} times")
    difference = ((found - batch["gradient"]).abs().max() / batch["gradient"].abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(f"gradient is {difference:.1e} of the largest off")
    return f"{difference:.0e}"


def lora(model: Any, ids: Any) -> str:
    peft: Any = import_module("peft")
    kinds = {"Conv1D", *(cls.__name__ for cls in (torch.nn.Linear, *torch.nn.Linear.__subclasses__()))}
    linears = sum(type(module).__name__ in kinds for module in model.base_model.modules())
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    adapters = sum(name.endswith("lora_A") for name, _ in adapted.named_modules())
    if adapters != linears:
        raise ValueError(f"{adapters} adapters for {linears} linear layers")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = adapted(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not losses[-1] < losses[0]:
        raise ValueError(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    adapted.eval()
    logits = adapted(ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-2, rtol=1e-3)
    return f"{adapters} of {linears} train, merge"


def _lm_eval(directory: Path, expected: list[float]) -> str:
    found = lm_eval_scores(f"pretrained={directory},trust_remote_code=True,dtype=float32")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-2, rtol=1e-3)
    return "same scores"


def lm_eval_scores(model: Any) -> list[float]:
    """Log-likelihood of every answer in a small local task, by lm-evaluation-harness.

    Args:
        model: its `model_args`, or a model of its class.
    """
    lm_eval: Any = import_module("lm_eval")
    tasks: Any = import_module("lm_eval.tasks")
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
        data = Path(folder, "data.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "darwinlm_tiny",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": folder},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        }
        given = {"model": "hf", "model_args": model} if isinstance(model, str) else {"model": model}
        options = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0}
        found = lm_eval.simple_evaluate(**given, **options, tasks=[task], task_manager=tasks.TaskManager())
    samples = sorted(found["samples"]["darwinlm_tiny"], key=lambda sample: sample["doc_id"])
    return [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]


# Runs here.


def prepare(root: Path) -> tuple[Path, Path]:
    """An uneven SmolLM2 with an attention and an MLP gone, and what the zero-masked dense model gives."""
    from smollm2 import Kept, dense_smollm2, export, masked

    checkpoint, dense = dense_smollm2(root)
    draw = random.Random(0)
    kept = [
        Kept(
            () if index == 9 else tuple(sorted(draw.sample(range(3), draw.randint(1, 3)))),
            () if index == 17 else tuple(sorted(draw.sample(range(1536), 32 * draw.randint(16, 48)))),
        )
        for index in range(dense.config.num_hidden_layers)
    ]
    tokenizer: Any = checkpoint.tokenizer
    tokenizer.padding_side = "left"
    padded = tokenizer([PROMPT, OTHER_PROMPT], return_tensors="pt", padding=True)
    batch: dict[str, Any] = {
        "ids": tokenizer(PROMPT, return_tensors="pt")["input_ids"],
        "padded": padded["input_ids"],
        "mask": padded["attention_mask"],
    }
    oracle = masked(dense, kept)
    with torch.no_grad():
        batch["expected"] = {name: run() for name, run in observe(oracle, batch).items()}
    directory = export(checkpoint, dense, kept, root / "export", None)
    wrapper: Any = import_module("lm_eval.models.huggingface").HFLM
    batch["lm_eval"] = lm_eval_scores(wrapper(pretrained=oracle, tokenizer=tokenizer))
    batch["gradient"] = gradient(oracle, batch["ids"])
    torch.save(batch, root / "inputs.pt")
    return directory, root / "inputs.pt"


def make_environment(root: Path, version: str) -> Path:
    """Python of a virtual environment with this version of transformers."""
    path = root / version
    python = path / "bin" / "python"
    if python.exists():
        return python
    venv.create(path, with_pip=True)
    site = path / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    wanted = [f"transformers=={version}", "peft", "lm-eval"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--environments", type=Path, help="a directory in which virtual environments are kept")
    parser.add_argument("--check", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        directory, inputs, out, version = arguments.check
        check(Path(directory), Path(inputs), Path(out), version)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    columns: dict[str, dict[str, str]] = {}
    shapes: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="darwinlm-compatibility-") as scratch:
        root = Path(scratch)
        import compatibility_shapes

        compatibility_shapes.prepare(root / "shapes")
        directory, inputs = prepare(root)
        for version in arguments.versions:
            python = make_environment(arguments.environments or root, version)
            out = root / f"{version}.json"
            command = [python, "-P", __file__, "--check", directory, inputs, out, version]
            environment = os.environ | {"HF_MODULES_CACHE": str(root / f"modules-{version}")}
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if result.returncode:
                print(result.stderr[-3000:], file=sys.stderr)
                columns[version] = {"logits, sdpa": f"FAILS: {result.stderr.strip().splitlines()[-1][:100]}"}
            else:
                columns[version] = json.loads(out.read_text())
            print(f"{version}: {columns[version]}", flush=True)
            command = [python, compatibility_shapes.__file__, root / "shapes", out]
            subprocess.run(command, env=environment, check=True)
            shapes[version] = json.loads(out.read_text())
    write(columns, shapes)


def table(columns: dict[str, dict[str, str]], corner: str) -> list[str]:
    """The lines of a table, with a column for each version."""
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    return [
        f"| {corner} | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {name} | " + " | ".join(cells.get(name, "") for cells in columns.values()) + " |" for name in names),
    ]


def write(columns: dict[str, dict[str, str]], shapes: dict[str, dict[str, str]]) -> None:
    lines = [
        "# Which versions of transformers load an export",
        "",
        f"SmolLM2-135M, uneven, one attention and one MLP gone, against the zero-masked dense model. {date.today()}, "
        f"{platform.machine()}, torch {torch.__version__}: `python benchmarks/compatibility.py --versions "
        f"{' '.join(columns)}`",
        "",
        *table(columns, "transformers"),
        "",
        "Tiny exports of every shape of block, an attention and an MLP gone: how many of the checks above pass,",
        "but for lm-eval's, against the zero-masked model in the stock class of that version.",
        "",
        *table(shapes, "shape"),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    publish()


def publish() -> None:
    """Copy the tables of the results into docs/export.md."""
    tables = RESULTS.read_text().split("\n\n", 2)[2]
    before, _, after = PAGE.read_text().split(MARK)
    PAGE.write_text(MARK.join((before, tables, after)))


if __name__ == "__main__":
    main()
