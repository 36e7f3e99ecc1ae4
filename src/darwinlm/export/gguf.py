"""Export to a GGUF file, which llama.cpp and programs built on it (Ollama, LM Studio) load."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Precision

from darwinlm.export.gguf_graphs import Description
from darwinlm.export.gguf_tensors import Weights, Written, tensors
from darwinlm.export.gguf_vocabulary import add_vocabulary
from darwinlm.export.verify import verify_gguf
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime.files import new_file
from darwinlm.runtime.progress import say
from darwinlm.types import DarwinError, UsageError

FileType = Literal["f32", "f16", "bf16", "q8_0"]
PRECISIONS = {"f32": Precision.F32, "f16": Precision.F16, "bf16": Precision.BF16, "q8_0": Precision.Q8_0}
QUANTISED_ROWS = 4096  # that are quantised at a time, to bound memory


def export_gguf(directory: Path, out: Path, file_type: FileType = "f16", verify: bool = True) -> Path:
    """Write a model directory, pruned or dense, as a GGUF file with its tokenizer and chat template.

    A model whose blocks all have the same sizes gets its native architecture. Others get one that has sizes for each
    block, or, where none computes them (`GRAPHS`), the native one with zeros for what a block lacks. Vectors stay
    float32. Matrices that Q8_0 cannot hold, because the length of their rows is not a multiple of 32, become float16.
    Tensors are read and written one by one.

    Args:
        directory: an export that `export_hf` wrote, or a dense checkpoint.
        out: the file, named `*.gguf`; or a directory, in which it is named after that directory and `file_type`.
        verify: whether a fresh process reads the file and compares its tensors before it gets its name.

    Returns:
        The path of the file, which appears whole or not at all.

    Raises:
        UsageError: if `out` exists, or if the directory holds no model that llama.cpp can run unchanged.
        DarwinError: if weights are missing, damaged or too large for `file_type`, if the disk is full, or if the
            written file does not hold the tensors.
    """
    if file_type not in get_args(FileType):
        raise UsageError(f"expected one of {', '.join(get_args(FileType))}, found {file_type!r}; choose one of them")
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
            digests = _write(writer, written, PRECISIONS[file_type])
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
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(model.room))
    sizes = zip(*((room.query_heads, room.key_value_heads, room.intermediate) for room in model.room), strict=True)
    methods = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for add, counts in zip(methods, map(list, sizes), strict=True):
        add(counts if graph.per_block else counts[0])
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    if graph.layer_norms:
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for method, field in graph.fields:
        getattr(writer, method)(getattr(config, field))
    _add_positions(writer, model)


def _add_positions(writer: gguf.GGUFWriter, model: Description) -> None:
    rope = model.rope()
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if model.graph.windows:
        writer.add_sliding_window(min(model.config.sliding_window, model.config.max_position_embeddings))
        writer.add_sliding_window_pattern(model.period(model.graph))
        writer.add_rope_freq_base_swa(model.rope("sliding_attention")["rope_theta"])


def _write(writer: gguf.GGUFWriter, tensors: Sequence[Written], precision: Precision) -> dict[str, str]:
    """Write all of the file, and return the SHA-256 of every tensor's bytes by its name."""
    chosen = [_precision_of(tensor, precision) for tensor in tensors]
    for tensor, stored in zip(tensors, chosen, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[stored]
        elements = int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), elements // block * size, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    digests = {}
    for tensor, stored in zip(tensors, chosen, strict=True):
        values = _encoded(tensor, stored)
        digests[tensor.name] = hashlib.sha256(values.data).hexdigest()
        try:
            writer.write_tensor_data(values)
        except OSError as error:  # the message from numpy has no reason, only a number of bytes
            raise DarwinError(
                f"expected room for the whole file, found that {tensor.name} could not be written ({error}); "
                "free some of the disk or choose another place"
            ) from None
    return digests


def _precision_of(tensor: Written, precision: Precision) -> Precision:
    if len(tensor.shape) == 1:
        return Precision.F32
    fits = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[precision][0] == 0
    return precision if fits else Precision.F16


def _encoded(tensor: Written, precision: Precision) -> np.ndarray:
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
    parts = values.split(QUANTISED_ROWS)
    return np.concatenate([gguf.quants.quantize(part.float().numpy(), precision) for part in parts])
