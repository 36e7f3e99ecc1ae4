"""An export in another form: `darwinlm export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from darwinlm.commands.compress import run
from darwinlm.commands.frontier import find_size
from darwinlm.commands.run_directory import FRONTIER_SETTINGS, SETTINGS, Run, explain_failures, find_export
from darwinlm.config.files import read_settings
from darwinlm.config.frontier import FrontierConfig
from darwinlm.config.run import ExportConfig, RunConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.data.packing import check_ids
from darwinlm.export.anymodel import as_anymodel
from darwinlm.export.card import ANYMODEL, STUBBED
from darwinlm.export.gguf import export_gguf, libgguf
from darwinlm.export.gguf_precision import QUANTISED
from darwinlm.export.groups import group_note
from darwinlm.export.hf import export_hf
from darwinlm.export.importance import mean_squares
from darwinlm.export.ollama import write_modelfile
from darwinlm.export.verify import Expected
from darwinlm.export.vllm import check_vllm, tensor_parallel_sizes, zero_stubs
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes_of
from darwinlm.model.reading import load
from darwinlm.model.size import parameter_count
from darwinlm.runtime.device import resolve_device
from darwinlm.runtime.files import check_new
from darwinlm.runtime.progress import say
from darwinlm.types import UsageError

LENGTH = 512  # tokens in a sequence on which importance is measured


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
    directory = export(Path(source), config.verify, config.target)
    return convert(directory, Path(out), _with_text(config, Path(source)))


def _with_text(config: ExportConfig, source: Path) -> ExportConfig:
    """The form, with a run's own text where none is given."""
    settings = next((file for file in (SETTINGS, FRONTIER_SETTINGS) if (source / file).is_file()), None)
    if config.type not in QUANTISED or config.data is not None or settings is None:
        return config
    kind = RunConfig if settings == SETTINGS else FrontierConfig
    return replace(config, data=read_settings(source / settings, kind).data)


def _importance(directory: Path, config: ExportConfig) -> Mapping[str, Tensor] | None:
    """The importance of the weights of a file of few bits, on the first tokens of a text, if there is one."""
    if config.type not in QUANTISED:
        return None
    libgguf()
    if config.data is None:
        say(f"{config.type}: no text is given, so all weights count the same; --data measures their importance")
        return None
    checkpoint = Checkpoint(directory)
    positions = getattr(checkpoint.config, "max_position_embeddings", None) or LENGTH
    corpus = read_corpus(config.data, checkpoint.tokenizer, min(LENGTH, positions), 0)
    (token_ids,) = corpus.draw(importance=config.tokens).values()
    check_ids(token_ids, checkpoint.config.vocab_size)
    device = resolve_device("auto")
    model: Any = load(directory)
    return mean_squares(model.to(device), token_ids)


def convert(directory: Path, out: Path, config: ExportConfig) -> Path:
    """Write the model in `directory`, pruned or dense, to `out` in the form that `config` describes.

    Returns:
        The directory or GGUF file.

    Raises:
        UsageError: if `out` exists already, the model has no such form, or there is no tokenizer beside it.
        DarwinError: if weights are missing or damaged, or the export does not give the same logits in a fresh process.
    """
    if config.format == "gguf":
        kind = "f16" if config.type == "auto" else config.type
        file = export_gguf(directory, out, kind, config.verify, _importance(directory, config))
        write_modelfile(file, Checkpoint(directory))
        return file
    check_new(out)  # before the model is read
    tokenizer = Checkpoint(directory).tokenizer
    model = load(directory)
    expected = Expected.of(model, Checkpoint(directory).whole) if config.verify else None
    card = directory / "README.md"
    written = zero_stubs(model) if config.compat == "vllm" else model
    sizes = block_sizes_of(written)
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {directory.absolute().name}\n"
    if sizes != block_sizes_of(model):
        text += STUBBED.format(parameters=parameter_count(written))
    any_model = config.compat == "anymodel"
    if any_model:
        text += ANYMODEL
    export_hf(written, sizes, tokenizer, out, text, expected, directory, as_anymodel if any_model else None)
    for refusal in [] if any_model else check_vllm(out):
        say(f"vLLM would refuse this export: {refusal}")
    _, *parallel = tensor_parallel_sizes(sizes)
    among = f"among {', '.join(map(str, parallel))}" if parallel else "in no way among several"
    say(f"tensor parallelism: the sizes of every block can be split {among} devices")
    say(group_note(written))
    return out
