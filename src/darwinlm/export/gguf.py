"""Export to a GGUF file, which llama.cpp and programs built on it (Ollama, LM Studio) load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Precision
from jaxtyping import Float
from torch import Tensor

from darwinlm.export.gguf_graphs import Description
from darwinlm.export.gguf_precision import MIXES, OUTPUT, QUANTISED, fitting
from darwinlm.export.gguf_tensors import Weights, Written, tensors
from darwinlm.export.gguf_vocabulary import add_vocabulary
from darwinlm.export.verify import verify_gguf
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime.files import new_file
from darwinlm.runtime.progress import say
from darwinlm.types import DarwinError, FileType, UsageError

QUANTISED_ROWS = 4096  # that are quantised at a time, to bound memory


def export_gguf(
    directory: Path,
    out: Path,
    file_type: FileType = "f16",
    verify: bool = True,
    importance: Mapping[str, Float[Tensor, " d_in"]] | None = None,
) -> Path:
    """Write a model directory, pruned or dense, as a GGUF file with its tokenizer and chat template.

    A model whose blocks all have the same sizes gets its native architecture. Others get one that has sizes for each
    block, or, where none computes them (`GRAPHS`), the native one with zeros for what a block lacks. Vectors stay
    float32. Types of few bits are llama.cpp's mixes (`MIXES`); where the rows of a matrix are no multiple of 256, which
    K-quants want, or of 32, which all want, it takes more bits, and the export says of how many weights that is true.
    Tensors are read and written one by one.

    Args:
        directory: an export that `export_hf` wrote, or a dense checkpoint.
        out: the file, named `*.gguf`; or a directory, in which it is named after that directory and `file_type`.
        verify: whether a fresh process reads the file and compares its tensors before it gets its name.
        importance: of every input channel of linear modules, by path: what weighs the errors of few bits.

    Returns:
        The path of the file, which appears whole or not at all.

    Raises:
        UsageError: if `out` exists, or if the directory holds no model that llama.cpp can run unchanged.
        DarwinError: if weights are missing, damaged or too large for `file_type`, if the disk is full, or if the
            written file does not hold the tensors.
    """
    if file_type not in get_args(FileType):
        raise UsageError(f"expected one of {', '.join(get_args(FileType))}, found {file_type!r}; choose one of them")
    if file_type in QUANTISED:
        libgguf()
    name = out.stem if out.suffix == ".gguf" else out.absolute().name
    file = out if out.suffix == ".gguf" else out / f"{name}-{file_type.upper()}.gguf"
    if not (directory / "config.json").is_file():
        raise UsageError(f"no model in {directory}: expected config.json in it; name an export or a model directory")
    checkpoint = Checkpoint(directory)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    checkpoint.check_head()
    model = Description(config)
    if model.zeros and not model.graph.per_block:
        say(
            f"{file.name}: llama.cpp has one size for all blocks of a {model.name}, so {model.zeros} heads and "
            "channels are written as zeros; a genome whose blocks are all alike has none"
        )
    with new_file(file) as partial_file:
        writer = gguf.GGUFWriter(partial_file, model.graph.name)
        try:
            _add_settings(writer, model, name, file_type)
            add_vocabulary(writer, tokenizer, config.vocab_size)
            written = list(tensors(model, Weights(checkpoint)))
            chosen = precisions(written, file_type, len(model.room))
            digests = _write(writer, written, chosen, importance or {})
        finally:
            writer.close()
        if verify:
            verify_gguf(partial_file, digests)
    return file


def _add_settings(writer: gguf.GGUFWriter, model: Description, name: str, file_type: str) -> None:
    config, graph = model.config, model.graph
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_description("pruned by darwinlm")
    kind = "ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(model.positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(model.room))
    sizes = zip(*((room.query_heads, room.key_value_heads, room.intermediate) for room in model.room), strict=True)
    methods = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for add, counts in zip(methods, map(list, sizes), strict=True):
        add(counts if graph.per_block else counts[0])
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    (writer.add_layer_norm_eps if graph.layer_norms else writer.add_layer_norm_rms_eps)(model.epsilon)
    for method, field in graph.fields:
        getattr(writer, method)(getattr(config, field))
    for method, field in graph.options:
        getattr(writer, method)(getattr(config, field, None) or 0)
    if graph.slopes:
        writer.add_max_alibi_bias(8.0)  # the exponent of the steepest slope, in transformers always
    if model.clip:
        writer.add_clamp_kqv(model.clip)
    if graph.rotated:
        _add_positions(writer, model)


def _add_positions(writer: gguf.GGUFWriter, model: Description) -> None:
    rope = model.rope()
    part = 1.0 if model.graph.by_kind else rope.get("partial_rotary_factor", 1.0)  # there, factors say which part
    writer.add_rope_dimension_count(int(model.head_dim * part))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if model.graph.windows:
        writer.add_sliding_window(min(model.config.sliding_window, model.positions))
        if model.graph.by_kind:
            _add_kinds(writer, model)
        else:
            writer.add_sliding_window_pattern(model.period(model.graph))
        writer.add_rope_freq_base_swa(model.rope("sliding_attention")["rope_theta"])


def _add_kinds(writer: gguf.GGUFWriter, model: Description) -> None:
    """What differs between full attention and that with a window."""
    width = model.widths.get("sliding_attention", model.head_dim)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in model.kinds])
    writer.add_key_length_swa(width)
    writer.add_value_length_swa(width)
    writer.add_rope_dimension_count_swa(width)


def precisions(tensors: Sequence[Written], file_type: str, blocks: int) -> list[Precision]:
    """The precision of every tensor; the user is told of those whose rows do not fit the type that was asked for."""
    mix, tied = MIXES[file_type], not any(tensor.name == OUTPUT for tensor in tensors)
    wanted = [Precision.F32 if len(tensor.shape) == 1 else mix.of(tensor.name, blocks, tied) for tensor in tensors]
    chosen = [
        precision if len(tensor.shape) == 1 else fitting(precision, tensor.shape[-1])
        for tensor, precision in zip(tensors, wanted, strict=True)
    ]
    wider = [tensor for tensor, *both in zip(tensors, wanted, chosen, strict=True) if both[0] != both[1]]
    if wider:
        share = sum(int(np.prod(tensor.shape)) for tensor in wider) / sum(int(np.prod(t.shape)) for t in tensors)
        pruned = any("ffn_down" in tensor.name for tensor in wider)
        cure = "; --database.granularity 256 makes MLPs that fit" if pruned else ""
        say(f"{file_type}: {share:.0%} of the weights are in rows whose width it cannot hold, and take more bits{cure}")
    return chosen


def _write(
    writer: gguf.GGUFWriter,
    tensors: Sequence[Written],
    chosen: Sequence[Precision],
    importance: Mapping[str, Tensor],
) -> dict[str, str]:
    """Write all of the file, and return the SHA-256 of every tensor's bytes by its name."""
    for tensor, stored in zip(tensors, chosen, strict=True):
        size = bytes_in(tensor, stored)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    digests = {}
    for tensor, stored in zip(tensors, chosen, strict=True):
        values = encoded(tensor, stored, importance.get(tensor.source))
        digests[tensor.name] = hashlib.sha256(values.data).hexdigest()
        try:
            writer.write_tensor_data(values)
        except OSError as error:  # the message from numpy has no reason, only a number of bytes
            raise DarwinError(
                f"expected room for the whole file, found that {tensor.name} could not be written ({error}); "
                "free some of the disk or choose another place"
            ) from None
    return digests


def bytes_in(tensor: Written, precision: Precision) -> int:
    """The bytes that a tensor takes in a precision."""
    elements, size = gguf.GGML_QUANT_SIZES[precision]
    return int(np.prod(tensor.shape)) // elements * size


def encoded(tensor: Written, precision: Precision, importance: Tensor | None) -> np.ndarray:
    """The values of a tensor as a file holds them in a precision.

    Raises:
        DarwinError: if they are too large for it.
    """
    values = tensor.make()
    if precision is Precision.BF16:
        return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if precision is Precision.F16:
        half = values.half()
        if not torch.isfinite(half).all():
            raise DarwinError(
                f"expected weights of at most 65504 in {tensor.name}, found larger ones, which float16 cannot hold; "
                "choose bf16 or f32"
            )
        return half.contiguous().numpy()
    if precision is Precision.F32:
        return values.float().contiguous().numpy()
    parts = [part.float().contiguous().numpy() for part in values.split(QUANTISED_ROWS)]
    if precision is Precision.Q8_0:  # which is rounding alone
        return np.concatenate([gguf.quants.quantize(part, precision) for part in parts])
    weights = None if importance is None else _of_columns(tensor, importance)
    return np.concatenate([libgguf().quantize_rows(part, int(precision), weights) for part in parts])


def _of_columns(tensor: Written, importance: Tensor) -> np.ndarray:
    """The importance of a tensor's columns, of which none is without any: a block of zeros could not be scaled."""
    spread = importance[None] if tensor.columns is None else tensor.columns(importance[None])
    row = spread[0].float()
    return row.clamp(min=max(1e-4 * float(row.mean()), 1e-30)).contiguous().numpy()


def libgguf() -> Any:
    """The package that makes few bits of weights. Raises `UsageError` if it is not installed."""
    try:
        return import_module("libgguf")
    except ImportError:
        raise UsageError(
            "GGUF files of few bits want the package libgguf: pip install '.[quant]' in a clone of darwinlm"
        ) from None
