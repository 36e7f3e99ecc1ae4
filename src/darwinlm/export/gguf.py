"""Export to a GGUF file, which llama.cpp and programs built on it (Ollama, LM Studio) load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Precision
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from darwinlm.export.gguf_vocabulary import add_vocabulary
from darwinlm.export.verify import verify_gguf
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import find_family, head_dim
from darwinlm.model.pruned import block_sizes_of, family_of
from darwinlm.model.reading import skeleton
from darwinlm.model.shards import WEIGHTS, read_index
from darwinlm.runtime.files import new_file
from darwinlm.types import BlockSizes, DarwinError, UsageError

FileType = Literal["f32", "f16", "bf16", "q8_0"]
PRECISIONS = {"f32": Precision.F32, "f16": Precision.F16, "bf16": Precision.BF16, "q8_0": Precision.Q8_0}
STUB_CHANNELS = 32  # of an MLP of zeros, where a block has none: llama.cpp computes wrong logits without one
QUANTISED_ROWS = 4096  # that are quantised at a time, to bound memory
# For these, llama.cpp rotates pairs of neighbouring rows of a head, and transformers rows of its two halves.
PERMUTED = ("llama", "deci")
GRAPHS = ("llama", "mistral", "qwen2", "qwen3")  # families whose tensors can be written so far


def export_gguf(directory: Path, out: Path, file_type: FileType = "f16", verify: bool = True) -> Path:
    """Write a model directory, pruned or dense, as a GGUF file with its tokenizer and chat template.

    A model whose blocks all have the same sizes gets its native architecture. Others get `deci`, which has sizes for
    each block, or, where heads have norms (Qwen3), `openelm`. Vectors stay float32. Matrices that Q8_0 cannot hold,
    because the length of their rows is not a multiple of 32, become float16. Tensors are read and written one by one.

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
    model = _Model(config)
    model.check()
    with _open_weights(directory) as weights, new_file(file) as partial_file:
        writer = gguf.GGUFWriter(partial_file, model.architecture)
        try:
            _add_settings(writer, model, name, file_type)
            add_vocabulary(writer, tokenizer, config.vocab_size)
            tensors = list(_tensors(model, weights))
            digests = _write(writer, tensors, PRECISIONS[file_type])
        finally:
            writer.close()
        if verify:
            verify_gguf(partial_file, digests)
    return file


class _Model:
    """The description of a model in a GGUF file, which precedes its weights."""

    def __init__(self, config: PreTrainedConfig):
        self.config: Any = config
        self.name = family_of(config)
        if self.name not in GRAPHS:
            found = f"{self.name}, of which no tensors can be written yet"
            raise _refused(
                f"a model of one of the families {', '.join(GRAPHS)}", found, "use the Hugging Face directory"
            )
        self.family = find_family(skeleton(config))
        self.sizes: Sequence[BlockSizes] = block_sizes_of(config)
        self.head_dim = head_dim(config)
        self.architecture = self._architecture()

    def _architecture(self) -> str:
        first = self.sizes[0]
        alike = len(set(self.sizes)) == 1 and first.intermediate
        if self.name in ("llama", "mistral"):
            return "llama" if alike else "deci"
        if self.name == "qwen2":  # llama.cpp may take the hidden size as the width of all heads together
            return "qwen2" if alike and first.query_heads * self.head_dim == self.config.hidden_size else "deci"
        return "qwen3" if alike else "openelm"

    @property
    def rope(self) -> dict[str, Any]:
        """The settings of the rotary embedding: `rope_type`, `rope_theta` and the parameters of that type."""
        return self.config.rope_parameters

    def check(self) -> None:
        """Raise `UsageError` with the reason if llama.cpp has no graph that computes this model."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        positions = config.max_position_embeddings
        if window and "sliding_attention" in kinds and window < positions:
            raise _refused(
                f"full attention over its {positions} positions", f"a sliding window of {window}",
                "use the Hugging Face directory, or, for texts of that length, a copy whose config.json says "
                f"sliding_window null and max_position_embeddings {window}",
            )  # fmt: skip
        if config.hidden_act != "silu":
            raise _refused("the activation silu", config.hidden_act, "use the Hugging Face directory")
        if self.rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refused("rotary embedding of whole heads", "of a part", "use the Hugging Face directory")
        if self.rope["rope_type"] not in ("default", "linear", "llama3"):
            rope_type = f"rope_type {self.rope['rope_type']}"
            raise _refused("default, linear or llama3 rotary embedding", rope_type, "use the Hugging Face directory")
        if self.architecture == "openelm" and not (config.tie_word_embeddings and self.rope["rope_type"] == "default"):
            difference = "others" if config.tie_word_embeddings else "an output embedding of its own"
            raise _refused(
                "tied embeddings and default rotary embedding in an uneven Qwen3, whose heads have norms", difference,
                "use the Hugging Face directory, or a genome whose blocks are all alike",
            )  # fmt: skip
        for index, block in enumerate(self.sizes):
            if block.query_heads and block.query_heads % block.key_value_heads:
                heads = f"{block.query_heads} for {block.key_value_heads} in block {index}"
                raise _refused("as many query heads for every KV head", heads, "prune by KV groups")
        if not self.sizes[0].query_heads:
            raise _refused("attention in the first block", "none", "choose a genome that keeps it")


def _refused(expected: str, found: str, cure: str) -> UsageError:
    return UsageError(f"llama.cpp cannot run this model: expected {expected}, found {found}; {cure}")


class _Weights:
    """The tensors of a model directory, each of which is read only when it is used."""

    def __init__(self, shards: dict[str, Any]):
        self.shards = shards

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it. Raises `DarwinError` if it is missing."""
        if name not in self.shards:
            raise DarwinError(f"expected a tensor {name}, found none; the directory is incomplete, export it again")
        return tuple(self.shards[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Read a tensor, in the precision in which it is stored."""
        return self.shards[name].get_tensor(name)


@contextmanager
def _open_weights(directory: Path) -> Iterator[_Weights]:
    index = read_index(directory)
    files = [WEIGHTS] if index is None else sorted(set(index.values()))
    with ExitStack() as stack:
        shards: dict[str, Any] = {}
        for file in files:
            try:
                shard = stack.enter_context(safe_open(directory / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise DarwinError(f"{directory / file} cannot be read ({error}); export the model again") from None
            shards |= dict.fromkeys(shard.keys(), shard)
        yield _Weights(shards)


def _add_settings(writer: gguf.GGUFWriter, model: _Model, name: str, file_type: str) -> None:
    config, sizes = model.config, model.sizes
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_description("pruned by darwinlm")
    kind = "ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(sizes))
    stub = 1 if model.architecture == "openelm" else 0  # head of zeros, where a block has no attention
    heads = [(block.query_heads or stub, block.key_value_heads or stub) for block in sizes]
    channels = [block.intermediate or STUB_CHANNELS for block in sizes]
    per_block = model.architecture in ("deci", "openelm")
    writer.add_head_count([query for query, _ in heads] if per_block else heads[0][0])
    writer.add_head_count_kv([key_value for _, key_value in heads] if per_block else heads[0][1])
    writer.add_feed_forward_length(channels if per_block else channels[0])
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope["rope_theta"])
    if model.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope["factor"])


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file. Its shape is known beforehand, its values are made only when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _tensors(model: _Model, weights: _Weights) -> Iterator[_Tensor]:
    family = model.family
    yield _stored("token_embd.weight", weights, f"{family.embedding}.weight")
    yield _stored("output_norm.weight", weights, f"{family.final_norm}.weight")
    if not model.config.tie_word_embeddings:
        yield _stored("output.weight", weights, f"{family.output_embedding}.weight")
    if model.rope["rope_type"] == "llama3":
        yield _Tensor("rope_freqs.weight", (model.head_dim // 2,), partial(_rope_factors, model.config))
    for index, block in enumerate(model.sizes):
        yield from _attention(model, weights, index, block)
        yield from _mlp(model, weights, index, block)


def _attention(model: _Model, weights: _Weights, index: int, block: BlockSizes) -> Iterator[_Tensor]:
    family, hidden = model.family, model.config.hidden_size
    source, target = family.block(index), f"blk.{index}"
    if not block.query_heads:
        if model.architecture == "openelm":
            yield _constant(f"{target}.attn_norm.weight", (hidden,), 1.0)
            yield _constant(f"{target}.attn_qkv.weight", (3 * model.head_dim, hidden), 0.0)
            for name in ("attn_q_norm", "attn_k_norm"):
                yield _constant(f"{target}.{name}.weight", (model.head_dim,), 1.0)
            yield _constant(f"{target}.attn_output.weight", (hidden, model.head_dim), 0.0)
        return
    yield _stored(f"{target}.attn_norm.weight", weights, f"{source}.{family.attention_norms[0]}.weight")
    inputs = [f"{source}.{name}" for name in (family.query, family.key, family.value)]
    if model.architecture == "openelm":
        names = [f"{name}.weight" for name in inputs]
        rows = sum(weights.shape(name)[0] for name in names)
        yield _Tensor(f"{target}.attn_qkv.weight", (rows, hidden), partial(_stacked, weights, names))
    else:
        heads = (block.query_heads, block.key_value_heads, None)
        for name, path, count in zip(("attn_q", "attn_k", "attn_v"), inputs, heads, strict=True):
            permuted = count if model.architecture in PERMUTED else None
            yield from _linear(f"{target}.{name}", weights, path, permuted)
    if model.architecture in ("qwen3", "openelm"):
        for name in ("q_norm", "k_norm"):
            yield _stored(f"{target}.attn_{name}.weight", weights, f"{source}.{family.attention}.{name}.weight")
    yield from _linear(f"{target}.attn_output", weights, f"{source}.{family.attention_output}")


def _mlp(model: _Model, weights: _Weights, index: int, block: BlockSizes) -> Iterator[_Tensor]:
    family, hidden = model.family, model.config.hidden_size
    source, target = family.block(index), f"blk.{index}"
    if not block.intermediate:
        yield _constant(f"{target}.ffn_norm.weight", (hidden,), 1.0)
        yield _constant(f"{target}.ffn_gate.weight", (STUB_CHANNELS, hidden), 0.0)
        yield _constant(f"{target}.ffn_up.weight", (STUB_CHANNELS, hidden), 0.0)
        yield _constant(f"{target}.ffn_down.weight", (hidden, STUB_CHANNELS), 0.0)
        return
    yield _stored(f"{target}.ffn_norm.weight", weights, f"{source}.{family.mlp_norms[0]}.weight")
    for name, path in zip(("ffn_gate", "ffn_up"), family.mlp_inputs, strict=True):
        yield from _linear(f"{target}.{name}", weights, f"{source}.{path}")
    yield from _linear(f"{target}.ffn_down", weights, f"{source}.{family.mlp_output}")


def _linear(name: str, weights: _Weights, path: str, permuted_heads: int | None = None) -> Iterator[_Tensor]:
    yield _stored(f"{name}.weight", weights, f"{path}.weight", permuted_heads)
    if f"{path}.bias" in weights:
        yield _stored(f"{name}.bias", weights, f"{path}.bias", permuted_heads)


def _stored(name: str, weights: _Weights, source: str, permuted_heads: int | None = None) -> _Tensor:
    shape = weights.shape(source)
    if permuted_heads is None:
        return _Tensor(name, shape, partial(weights.read, source))
    return _Tensor(name, shape, lambda: _permuted(weights.read(source), permuted_heads))


def _constant(name: str, shape: tuple[int, ...], value: float) -> _Tensor:
    return _Tensor(name, shape, partial(torch.full, shape, value))


def _stacked(weights: _Weights, names: Sequence[str]) -> Tensor:
    return torch.cat([weights.read(name) for name in names])


def _permuted(tensor: Tensor, heads: int) -> Tensor:
    """Return rows in the order in which llama.cpp rotates them: 0, d/2, 1, d/2 + 1 and so on of each head."""
    rows, *rest = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(rows, *rest)


def _rope_factors(config: Any) -> Tensor:
    """Return the factors by which llama.cpp divides the rotary frequencies, `[head_dim / 2]`."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    dimension = head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dimension, 2, dtype=torch.float64) / dimension)
    return (plain / scaled.double()).float()


def _write(writer: gguf.GGUFWriter, tensors: Sequence[_Tensor], precision: Precision) -> dict[str, str]:
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


def _precision_of(tensor: _Tensor, precision: Precision) -> Precision:
    if len(tensor.shape) == 1:
        return Precision.F32
    fits = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[precision][0] == 0
    return precision if fits else Precision.F16


def _encoded(tensor: _Tensor, precision: Precision) -> np.ndarray:
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
