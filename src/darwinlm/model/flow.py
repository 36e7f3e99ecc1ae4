"""What flows where in a block of a decoder, found by running it once on the meta device.

Nothing here knows a family. Every module with weights marks its output with its own path, every operation hands the
marks of its inputs on, and transformers' attention function is replaced by one that notes what it is given.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from darwinlm.model.frame import LENGTH, is_handed_on

STREAM, ATTENDED = "the residual stream", "the attention function"
GIVEN = "what the block is given of each token"  # beside the stream, such as embeddings of its own
HANDED_ON = "what an earlier block hands on"  # such as its keys and values
PROBE = "darwinlm"  # the name under which transformers finds the attention function that takes notes

Marks = frozenset[str]


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


def trace(block: nn.Module, width: int, call: Mapping[str, Any], given: frozenset[str], handed: dict[str, Any]) -> Flow:
    """Run a copy of a block on the meta device and return what flows where.

    Args:
        width: of the residual stream.
        call: the keyword arguments that the block is called with.
        given: those that depend on what the tokens are.
        handed: what the blocks before it have handed on; what this one does is added.

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
    arguments |= {name: type(each)(handed) for name, each in call.items() if is_handed_on(each)}
    with torch.no_grad(), _attention_function(block, tracer.attend), tracer:
        tracer.mark(states, frozenset([STREAM]))
        tracer.mark(list(handed.values()), frozenset([HANDED_ON]))
        tracer.mark([arguments[name] for name in given if _is_of_channels(arguments[name])], frozenset([GIVEN]))
        output = block(states, **arguments)
    tracer.flow.output = tracer.marks(output)
    for each in arguments.values():
        if is_handed_on(each):
            handed |= each.data
    floats = {name: each for name, each in arguments.items() if isinstance(each, Tensor) and each.is_floating_point()}
    tracer.flow.biases = tuple(name for name, each in floats.items() if each.dim() in (3, 4) and each.shape[-3] > 1)
    return tracer.flow


def _is_of_channels(value: Any) -> bool:
    """Whether a value is numbers for each token, `[1, length, channels]`."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] == (1, LENGTH)


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
    others = ("head_dim", "sliding_window")
    widths = [name for name, value in numbers.items() if value == width and name not in (*queries, *keys, *others)]
    return tuple(queries), tuple(keys), tuple(sorted(widths))
