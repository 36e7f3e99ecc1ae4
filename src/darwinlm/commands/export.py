"""An export in another form: `darwinlm export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from darwinlm.commands.compress import run
from darwinlm.commands.frontier import find_size
from darwinlm.commands.run_directory import FRONTIER_SETTINGS, Run, explain_failures, find_export
from darwinlm.config.run import ExportConfig
from darwinlm.export.card import stubbed_card
from darwinlm.export.gguf import export_gguf
from darwinlm.export.hf import export_hf
from darwinlm.export.verify import Expected
from darwinlm.export.vllm import check_vllm, tensor_parallel_sizes, zero_stubs
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes_of
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count
from darwinlm.runtime.files import check_new
from darwinlm.runtime.progress import say
from darwinlm.types import UsageError


def export(path: Path, verify: bool = True, target: str | None = None) -> Path:
    """The model directory that a user means by a run, or by itself. A run that has found its genome is stitched now.

    Args:
        target: of a frontier, the size, which is searched first if it is new.

    Raises:
        UsageError: if there is no model there, and no run with a genome, or if a size is named of what has only one.
        DarwinError: if the run's database lacks a unit, which only `darwinlm compress` measures again.
    """
    if (path / FRONTIER_SETTINGS).is_file():
        path = find_size(path, target).path
    elif target is not None:
        raise UsageError(f"--target: expected a frontier, found {path}, which has one size; leave --target out")
    this = Run(path)
    if this.searched and not this.exported.exists():
        this.check_database()
        run(replace(this.config, out=str(path), verify=verify), until="export")
    return find_export(path)


def export_command(config: ExportConfig, source: str, out: str) -> None:
    """Write the model of a run, or a model directory, in the form that `config` names, and print where it is.

    Raises:
        UsageError: as `export` and `convert`.
        DarwinError: as `export` and `convert`.
    """
    with explain_failures(f"the export to {out}", "--no-verify needs half as much"):
        print(export_model(source, out, config))


def export_model(source: str | Path, out: str | Path, config: ExportConfig | None = None) -> Path:
    """Write the model of a run, or a model directory, in another form, and return where it is.

    Args:
        config: the form; a directory for transformers if not given.

    Raises:
        UsageError: as `export` and `convert`.
        DarwinError: as `export` and `convert`.
    """
    config = ExportConfig() if config is None else config
    check_new(Path(out), directory=config.format == "hf")  # before a model is stitched
    return convert(export(Path(source), config.verify, config.target), Path(out), config)


def convert(directory: Path, out: Path, config: ExportConfig) -> Path:
    """Write the model in `directory`, pruned or dense, to `out` in the form that `config` describes.

    Returns:
        The directory or GGUF file.

    Raises:
        UsageError: if `out` exists already, the model has no such form, or there is no tokenizer beside it.
        DarwinError: if weights are missing or damaged, or the export does not give the same logits in a fresh process.
    """
    if config.format == "gguf":
        return export_gguf(directory, out, "f16" if config.type == "auto" else config.type, config.verify)
    check_new(out)  # before the model is read
    tokenizer = Checkpoint(directory).tokenizer
    model = load(directory)
    expected = Expected.of(model) if config.verify else None
    card = directory / "README.md"
    written = zero_stubs(model) if config.compat == "vllm" else model
    sizes = block_sizes_of(written)
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {directory.absolute().name}\n"
    if sizes != block_sizes_of(model):
        text = stubbed_card(text, parameter_count(written))
    export_hf(written, sizes, tokenizer, out, text, expected, directory)
    for refusal in check_vllm(out):
        say(f"vLLM would refuse this export: {refusal}")
    _, *parallel = tensor_parallel_sizes(sizes)
    among = f"among {', '.join(map(str, parallel))}" if parallel else "in no way among several"
    say(f"tensor parallelism: the sizes of every block can be split {among} devices")
    return out
