"""What flows where in a decoder, found by running it once: its frame on zeros, one block on the meta device.

Nothing here knows a family. Every module with weights marks its output with its own path, every operation hands the
marks of its inputs on, and transformers' attention function is replaced by one that notes what it is given.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from darwinlm.types import UsageError

STREAM, ATTENDED = "the residual stream", "the attention function"
PROBE = "darwinlm"  # the name under which transformers finds the attention function that takes notes
LENGTH = 4  # tokens

Marks = frozenset[str]


@dataclass(frozen=True)
class Frame:
    """What a decoder has around its blocks, by paths in the model.

    Attributes:
        returns_more: whether blocks return a tuple, of which the hidden states are the first.
        calls: what each block is called with beside the hidden states, by the names of its arguments.
    """

    backbone: str
    embedding: str
    blocks: str
    final_norm: str
    output_embedding: str
    returns_more: bool
    calls: tuple[dict[str, Any], ...]


@dataclass
class Flow:
    """What each module of a block reads. Paths are relative to the block.

    Attributes:
        reads: for every module with weights, whose outputs reach it without passing through another such module, in
            the order of calls.
        widths: the width of its input.
        output: whose outputs reach the output of the block.
        attention: the module that calls the attention function, None if none does.
        inputs: whose outputs reach the query, the key and the value.
        heads: the numbers of query heads and KV heads.
        head_widths: the widths of a head of query, key and value.
        biases: the arguments of the block that hold something for each head.
        named: the names of the arguments with which a module is called.
        seconds: what reaches the second argument of a module, where that has no name and the shape of the first.
        sums: what reaches the states that a module has returned.
        values: what every module has returned, the block under the empty path.
    """

    reads: dict[str, Marks] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    output: Marks = frozenset()
    attention: str | None = None
    inputs: tuple[Marks, ...] = ()
    heads: tuple[int, int] = (0, 0)
    head_widths: tuple[int, ...] = ()
    biases: tuple[str, ...] = ()
    named: dict[str, frozenset[str]] = field(default_factory=dict)
    seconds: dict[str, Marks] = field(default_factory=dict)
    sums: dict[str, Marks] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def readers(self, path: str) -> set[str]:
        """The modules that read the output of a module."""
        return {reader for reader, marks in self.reads.items() if path in marks}


def find_frame(model: PreTrainedModel) -> Frame:
    """Run a model's decoder on zeros, with recorders in place of its blocks. The model may be on the meta device.

    Raises:
        UsageError: if it has no list of blocks that are called in turn, each with hidden states and arguments that have
            names, or no one final norm after them.
    """
    paths = {module: path for path, module in model.named_modules()}
    name, decoder = type(model).__name__, model.get_decoder()
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [(path, m) for path, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists or not paths.get(decoder):
        raise UsageError(
            f"cannot prune {name}: expected a decoder with a list of {count} blocks, found none; "
            "darwinlm prunes models of one decoder"
        )
    inner, blocks = lists[0]
    root = paths[decoder]
    recorders, after, reason = _run(decoder, f"{root}.{inner}", blocks, returns_more=False)
    returns_more = bool(reason) or any(recorder.wrong for recorder in recorders)
    if returns_more:
        recorders, after, reason = _run(decoder, f"{root}.{inner}", blocks, returns_more)
    if reason:
        raise UsageError(f"cannot prune {name}: its decoder cannot be run block by block ({reason})")
    for index, recorder in enumerate(recorders):
        if len(recorder.calls) != 1:
            raise UsageError(
                f"cannot prune {root}.{inner}.{index}: expected a block that runs once for each token, found "
                f"{len(recorder.calls)} runs; darwinlm prunes models whose blocks run in turn"
            )
    if len(after) != 1:
        raise UsageError(
            f"cannot prune {name}: expected one final norm after its blocks, found {', '.join(after) or 'none'}"
        )
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    return Frame(
        backbone=root,
        embedding=paths[embedding],
        blocks=f"{root}.{inner}",
        final_norm=f"{root}.{after[0]}",
        output_embedding=paths.get(output, "") if output is not None else "",
        returns_more=returns_more,
        calls=tuple(recorder.calls[0] for recorder in recorders),
    )


def _run(
    decoder: nn.Module, path: str, blocks: nn.ModuleList, returns_more: bool
) -> tuple[list[Recorder], list[str], str]:
    """Run a decoder on zeros with recorders, and return them, the modules that ran after them, and why it failed."""
    recorders = [Recorder(f"{path}.{index}", block, returns_more) for index, block in enumerate(blocks)]
    memo: dict[int, Any] = {id(blocks): nn.ModuleList(recorders)}
    for parameter in set(decoder.parameters()) - set(blocks.parameters()):
        memo[id(parameter)] = nn.Parameter(_zeros(parameter), requires_grad=False)
    memo |= {id(buffer): _zeros(buffer) for buffer in decoder.buffers() if buffer.is_meta}
    copied: Any = copy.deepcopy(decoder, memo).cpu().eval()
    after: list[str] = []
    for name, module in copied.named_children():
        module.register_forward_hook(partial(_note_after, name, recorders, after))
    try:
        with torch.no_grad(), torch.device("cpu"):
            copied(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    except UsageError:
        raise
    except Exception as error:
        return recorders, after, (str(error).splitlines() or [type(error).__name__])[0]
    return recorders, after, ""


def by_name(block: nn.Module, unnamed: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """What a block is called with beside the hidden states, by the names of its arguments."""
    names = list(inspect.signature(block.forward).parameters)[1:]
    return dict(zip(names, unnamed, strict=False)) | dict(named)


def trace(block: nn.Module, width: int, call: Mapping[str, Any]) -> Flow:
    """Run a copy of a block on the meta device and return what flows where.

    Args:
        width: of the residual stream.
        call: the keyword arguments that the block is called with.

    Raises:
        RuntimeError, and what else a module may raise: if the block cannot run on the meta device.
    """
    memo: dict[int, Any] = {}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in block.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    block = copy.deepcopy(block, memo).eval()
    precision = next((parameter.dtype for parameter in block.parameters()), torch.float32)
    tracer = _Tracer(block)
    states = torch.empty(1, LENGTH, width, dtype=precision, device="meta")
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(call))
    with torch.no_grad(), _attention_function(block, tracer.attend), tracer:
        tracer.mark(states, frozenset([STREAM]))
        output = block(states, **arguments)
    tracer.flow.output = tracer.marks(output)
    floats = {name: each for name, each in arguments.items() if isinstance(each, Tensor) and each.is_floating_point()}
    tracer.flow.biases = tuple(name for name, each in floats.items() if each.dim() in (3, 4) and each.shape[-3] > 1)
    return tracer.flow


def _zeros(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape, which take no memory."""
    return torch.zeros((), dtype=like.dtype, device="cpu").expand(like.shape)


class Recorder(nn.Module):
    """Takes the place of a block: records how it is called, and returns the hidden states unchanged."""

    def __init__(self, path: str, block: nn.Module, returns_more: bool):
        super().__init__()
        self.path = path
        self.returns_more = returns_more
        self.wrong = False  # whether it was given what is no hidden states, but one sequence of them
        self.block = [block]  # in a list, so that it is no submodule
        self.calls: list[dict[str, Any]] = []
        self.states: Tensor | None = None  # of the last call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self

    def forward(self, *unnamed: Any, **arguments: Any) -> Any:
        if not unnamed or not isinstance(unnamed[0], Tensor):
            raise UsageError(
                f"cannot prune {self.path}: expected a block that takes hidden states first, found "
                f"{type(unnamed[0]).__name__ if unnamed else 'none'}; convert the model to another family"
            )
        states, *others = unnamed
        self.states, self.wrong = states, states.dim() != 3
        self.calls.append(by_name(self.block[0], others, arguments))
        return (states, None) if self.returns_more else states


def _note_after(path: str, recorders: list[Recorder], after: list[str], *_: Any) -> None:
    if recorders[-1].calls:
        after.append(path)


class _Tracer(TorchDispatchMode):
    """Hands the marks of every operation's inputs on to its outputs."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.flow = Flow()
        self.paths = {module: path for path, module in block.named_modules()}
        self.running: list[str] = []  # the paths of the modules that are running, the innermost last
        self.products: list[
            tuple[Tensor, Tensor]
        ] = []  # of batches of matrices, what each is of, since the block began
        self.normalised = False  # whether the last product has gone through a softmax
        self.marked: dict[int, tuple[Tensor, Marks]] = {}  # with the tensor, whose id lives no longer than it does
        for path, module in block.named_modules():
            module.register_forward_pre_hook(partial(self._begin, path), with_kwargs=True)
            module.register_forward_hook(partial(self._keep, path))
            within = block.get_submodule(path.rpartition(".")[0])
            if is_selection(module) or (_owns_weights(module) and not is_selection(within)):
                module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
                module.register_forward_hook(partial(self._leave, path))

    def mark(self, value: Any, marks: Marks) -> None:
        """Replace the marks of every tensor in a value."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.marked[id(tensor)] = tensor, marks

    def marks(self, value: Any) -> Marks:
        """The marks of all tensors in a value."""
        known = (self.marked.get(id(tensor)) for tensor in tree_leaves(value) if isinstance(tensor, Tensor))
        return frozenset().union(*(found[1] for found in known if found))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.mark(output, self.marks((args, kwargs)))
        if self.flow.attention is None:
            self._watch(func, args, output)
        return output

    def _watch(self, func: Any, args: Any, output: Any) -> None:
        """Note an attention that is written out: a product of query and key, a softmax, and one with the value."""
        if func is torch.ops.aten._softmax.default:
            self.normalised = bool(self.products)
        elif func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.products.append(args[-2:])
            if self.normalised:
                (query, key), (_, value) = self.products[-2:]
                self._note((query, key, value), (len(query), len(query)))
                self.mark(output, frozenset([ATTENDED]))

    def _note(self, tensors: tuple[Tensor, Tensor, Tensor], heads: tuple[int, int]) -> None:
        """Note query, key and value; the key of a product is `[heads, width, length]`."""
        query, _, value = tensors
        self.flow.attention = self.running[-1]
        self.flow.inputs = tuple(self.marks(tensor) for tensor in tensors)
        self.flow.heads = heads
        self.flow.head_widths = query.shape[-1], query.shape[-1], value.shape[-1]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        """An attention function that computes nothing. Queries are `[sequences, heads, length, width]`."""
        self._note((query, key, value), (query.shape[1], key.shape[1]))
        self.flow.attention = self.paths[module]
        output = torch.empty(*query.transpose(1, 2).shape[:3], value.shape[-1], dtype=query.dtype, device="meta")
        self.mark(output, frozenset([ATTENDED]))
        return output, None

    def _enter(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        self.flow.reads[path] = self.flow.reads.get(path, frozenset()) | self.marks(tensors)
        self.flow.widths[path] = tensors[0].shape[-1]

    def _begin(self, path: str, _: nn.Module, args: Any, named: Any) -> None:
        self.running.append(path)
        self.flow.named[path] = frozenset(named)
        if len(args) > 1 and isinstance(args[1], Tensor) and args[1].shape == args[0].shape:
            self.flow.seconds[path] = self.marks(args[1])

    def _keep(self, path: str, _: nn.Module, __: Any, output: Any) -> None:
        self.running.pop()
        self.flow.values[path] = output
        self.flow.sums[path] = self.marks(output[0] if isinstance(output, tuple) else output)

    def _leave(self, path: str, _: nn.Module, __: Any, output: Any) -> None:
        self.mark(output, frozenset([path]))


@contextmanager
def _attention_function(block: nn.Module, function: Any) -> Iterator[None]:
    """Let the modules of a block, whose configs are its own, call this function for attention."""
    for module in block.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = PROBE
    ALL_ATTENTION_FUNCTIONS.register(PROBE, function)
    try:
        yield
    finally:
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping[PROBE]


def is_selection(module: nn.Module) -> TypeGuard[Any]:
    """Whether a module selects outputs of a norm over all heads: `Selected` of the stitcher, or of an export's code."""
    return type(module).__name__ == "Selected"


def _owns_weights(module: nn.Module) -> bool:
    """Whether a module applies vectors or matrices of its own; single numbers leave channels independent."""
    own = any(parameter.numel() > 1 for parameter in module.parameters(recurse=False))
    return own and not any(True for child in module.children() for _ in child.parameters())


def head_numbers(attention: nn.Module, width: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The attributes from which an attention's methods read its numbers of heads, and the width of all query heads."""
    read: set[str] = set()
    for cls in type(attention).__mro__:
        if issubclass(cls, nn.Module) and cls is not nn.Module:
            methods = inspect.getmembers(cls, inspect.isfunction)
            read |= {name for key, method in methods if key != "__init__" for name in method.__code__.co_names}
    queries: list[str] = []
    keys: list[str] = []
    for owner, prefix in ((attention, ""), (getattr(attention, "config", None), "config.")):
        if prefix and "config" not in read:
            continue
        for name in sorted(read):
            if name.endswith(("heads", "n_head")) and isinstance(getattr(owner, name, None), int):
                (keys if "key_value" in name or "kv" in name else queries).append(f"{prefix}{name}")
    numbers = {name: value for name, value in vars(attention).items() if name in read and isinstance(value, int)}
    widths = [name for name, value in numbers.items() if value == width and name not in (*queries, *keys, "head_dim")]
    return tuple(queries), tuple(keys), tuple(sorted(widths))
