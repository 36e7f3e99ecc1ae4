"""The models of a frontier in types of GGUF files: how many bytes each takes, and what is left of its quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.commands.judging import Cells, Judge
from darwinlm.commands.work import Work
from darwinlm.export.gguf import libgguf
from darwinlm.export.gguf_graphs import Description
from darwinlm.export.gguf_precision import QUANTISED
from darwinlm.export.gguf_twin import twin
from darwinlm.export.hf import export_hf
from darwinlm.export.importance import mean_squares
from darwinlm.model.families import block_sizes
from darwinlm.model.reading import load
from darwinlm.report.comparison import DENSE, Cell, InFormat
from darwinlm.runtime.progress import say
from darwinlm.runtime.scratch import scratch_directory
from darwinlm.types import DarwinError, FileType, Genome


def check_formats(work: Work, formats: Sequence[FileType]) -> None:
    """Raise `UsageError` if llama.cpp cannot run the dense model, or the package for few bits is missing."""
    if formats:
        Description(work.checkpoint.config)
    if {*formats} & {*QUANTISED}:
        libgguf()


def in_formats(
    work: Work,
    judge: Judge,
    cells: Cells,
    cell: Cell,
    find_model: Callable[[], PreTrainedModel],
    formats: Sequence[FileType],
) -> Cell:
    """The cell with what its model is in each of `formats`; those that it has are not measured again.

    A type of file that a size cannot have says why, and the others go on.
    """
    left: list[FileType] = [each for each in formats if each not in cell.formats]
    if not left:
        return cell
    with scratch_directory("formats") as scratch:
        written = cell.method != DENSE
        directory = _written(work, cell, find_model(), scratch / "model") if written else work.checkpoint.path
        importance = _importance(work, directory) if {*left} & {*QUANTISED} else {}
        for each in left:
            say(f"frontier: {cell.method} in {each}")
            held = _judged(judge, directory, each, importance)
            cell = cells.keep(replace(cell, formats={**cell.formats, each: held}))
    return cell


def _importance(work: Work, directory: Path) -> Mapping[str, Tensor]:
    """How much the channels of a written model matter, on the search's text."""
    model: Any = load(directory)
    return mean_squares(model.to(work.device), work.tokens["search"])


def _written(work: Work, cell: Cell, model: PreTrainedModel, out: Path) -> Path:
    """The model as a directory, unproven, to be read once."""
    sizes = block_sizes(work.grid, Genome(cell.levels), work.checkpoint.config)
    return export_hf(model, sizes, work.checkpoint.tokenizer, out, "", origin=work.checkpoint.path)


def _judged(judge: Judge, directory: Path, kind: FileType, importance: Mapping[str, Tensor]) -> InFormat:
    try:
        model, size = twin(directory, kind, importance)
    except DarwinError as error:
        say(f"frontier: {error}")
        return InFormat(refused=str(error))
    quality = judge.quality_of(model.to(judge.dense.device, judge.dense.dtype))
    return InFormat(size, quality.perplexity, quality.kl)
