"""A simulated accelerator: a device of its own on a CPU build of torch, as strict as a GPU, which counts waits for it.

Its tensors hold data in the host's memory and say that they are on the device `simulated`. They refuse to compute with
tensors of the CPU, as those of CUDA do. Every operation for which the host would have to wait for a GPU is counted with
the line of darwinlm that asked for it. Kernels are those of the CPU, so results are equal to the last bit.

With DARWINLM_TEST_DEVICE=cuda in the environment, the same functions serve a real GPU, and torch counts.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import darwinlm

NAME = "simulated"
DEVICE = os.environ.get("DARWINLM_TEST_DEVICE", NAME)  # what `--device` is given in tests

_SOURCE = os.path.dirname(darwinlm.__file__)

aten = torch.ops.aten
# Operations whose result's size depends on values, or that look at values: a GPU's host must wait for these.
_WAITS = {
    aten._local_scalar_dense,  # item(), float(), int(), bool(), `if tensor:`
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
    aten._linalg_check_errors,  # of torch.linalg.cholesky and inv; the functions in `_ex` do not check
    aten.linalg_eigh,
    aten._linalg_eigh,
}
_MOVES = {aten._to_copy, aten.copy_}
_INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class DeviceMismatchError(RuntimeError):
    """An operation mixed tensors of the device with tensors of the CPU."""


class Synchronisations(Counter[str]):
    """How often the host waited for the device, by operation and line of darwinlm: `item fitness.py:12`."""

    def note(self, operation: str) -> None:
        """Count one, asked for by the innermost frame of darwinlm."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_SOURCE):
            frame = frame.f_back
        where = "elsewhere" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self[f"{operation} {where}"] += 1


class Memory:
    """Counts the bytes that tensors hold on the device: those of a storage once, however many tensors view it."""

    def __init__(self) -> None:
        self._tensors: Counter[int] = Counter()  # by the address of their storage
        self._live = self._most = 0

    def hold(self, held: torch.Tensor) -> None:
        """A tensor is made, whose data is `held`."""
        storage = held.untyped_storage()
        if not self._tensors[storage.data_ptr()]:
            self._live += storage.nbytes()
            self._most = max(self._most, self._live)
        self._tensors[storage.data_ptr()] += 1

    def release(self, held: torch.Tensor) -> None:
        """A tensor is gone, whose data is `held`."""
        storage = held.untyped_storage()
        self._tensors[storage.data_ptr()] -= 1
        if not self._tensors[storage.data_ptr()]:
            self._live -= storage.nbytes()
            del self._tensors[storage.data_ptr()]

    def begin(self) -> None:
        """Forget the most that was held so far."""
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._most = self._live

    @property
    def most(self) -> int:
        """The most bytes that were held at a time since `begin`."""
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else self._most


MEMORY = Memory()


@contextmanager
def accelerator() -> Iterator[Synchronisations]:
    """Make the device usable, as `DEVICE`, in a `with` block, which gets the count of synchronisations in it."""
    with _cuda() if DEVICE == "cuda" else _simulated() as counted:
        yield counted


@contextmanager
def _cuda() -> Iterator[Synchronisations]:
    """A real GPU, whose driver warns at every synchronisation."""
    counted, mode = Synchronisations(), torch.cuda.get_sync_debug_mode()
    show = warnings.showwarning

    def count(message: Any, *rest: Any, **others: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            counted.note("synchronisation")
        else:
            show(message, *rest, **others)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        with mock.patch.object(warnings, "showwarning", count):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield counted
            finally:
                torch.cuda.set_sync_debug_mode(mode)


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_HAS_BFLOAT16 = "transformers.training_args.is_torch_bf16_gpu_available"
_active: list[Synchronisations] = []  # the innermost `with` block's last


@contextmanager
def _simulated() -> Iterator[Synchronisations]:
    counted = Synchronisations()
    _active.append(counted)
    try:
        with _Constructors(), _Factories(), mock.patch.object(torch, "load", _load), mock.patch(_HAS_BFLOAT16):
            yield counted
    finally:
        _active.pop()


class Simulated(torch.Tensor):
    """A tensor on the device, whose data is `held` on the CPU."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Simulated:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, held: torch.Tensor):
        self.held = held
        MEMORY.hold(held)

    def __del__(self) -> None:
        MEMORY.release(self.held)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return _compute(function, arguments, keywords or {})

    @property
    def data(self) -> Any:
        """The tensor without its history."""
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Simulated) -> None:
        torch.Tensor.data.__set__(self, value)
        MEMORY.release(self.held)
        self.held = value.held
        MEMORY.hold(self.held)

    def tolist(self) -> Any:
        _count("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"cannot convert a tensor on {NAME} to numpy: copy it to the CPU first")

    def __getitem__(self, indices: Any) -> Any:
        """Lists of indices become tensors here, in any thread: torch makes them below where we look."""
        indices = indices if isinstance(indices, tuple) else (indices,)
        return super().__getitem__(
            tuple(torch.tensor(index).to(NAME) if isinstance(index, list) else index for index in indices)
        )

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # files hold what the CPU can read

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({self.held!r})"


class _Factories(TorchDispatchMode):
    """Sees what has no tensor to ask for its device, such as `torch.zeros(3, device=...)`."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return _compute(function, arguments, keywords or {})


class _Constructors(TorchFunctionMode):
    """Makes tensors from Python's numbers, which torch does below where `_Factories` looks."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        if function in (torch.tensor, torch.as_tensor) and _is_here(keywords.get("device")):
            del keywords["device"]
            learned = keywords.pop("requires_grad", False)  # which must be a leaf of the graph
            return function(*arguments, **keywords).to(NAME).requires_grad_(learned)
        if function is torch.Tensor.new_tensor and isinstance(arguments[0], Simulated):
            device = keywords.pop("device", NAME)
            return torch.tensor(arguments[1], **{"dtype": arguments[0].dtype} | keywords).to(device)
        return function(*arguments, **keywords)


def _compute(function: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
    """Run an operation on the data that is held, and wrap what it gives."""
    if function._can_decompose():  # in inference mode, torch leaves it to us to take operations apart
        with _Factories():
            return function.decompose(*arguments, **keywords)
    packet, leaves = function.overloadpacket, list(_leaves((arguments, keywords)))
    ours = [leaf for leaf in leaves if isinstance(leaf, Simulated)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Simulated)]
    device = keywords.get("device")
    here = _is_here(device) if device is not None else bool(ours)
    if packet is aten.copy_:
        here = isinstance(arguments[0], Simulated)
    if ours and packet not in _MOVES:
        _refuse_mixture(function, arguments, others)
    _note(packet, arguments, keywords, ours, here)
    plain = keywords | ({"device": torch.device("cpu")} if _is_here(device) else {})
    plain |= {"pin_memory": False} if plain.get("pin_memory") else {}
    written = {id(tensor.held): tensor for tensor in ours}  # in place, or into `out`: the same tensor comes back

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Simulated) or not here:
            return value
        return written[id(value)] if function._schema.is_mutable and id(value) in written else Simulated(value)

    # Views of ordinary tensors must be ordinary, which torch cannot tell for tensors that are only wrapped.
    with torch.inference_mode(False), torch.no_grad():
        return _map(wrapped, function(*_map(_held, arguments), **_map(_held, plain)))


def _refuse_mixture(function: Any, arguments: Any, others: list[torch.Tensor]) -> None:
    """Raise `DeviceMismatchError` where CUDA would: numbers in CPU tensors pass, and CPU indices of a GPU's tensor."""
    if function.overloadpacket in _INDEXES:
        others = [tensor for tensor in others if not any(tensor is index for index in arguments[1])]
    mixed = [tuple(tensor.shape) for tensor in others if tensor.dim()]
    if mixed:
        raise DeviceMismatchError(f"{function}: expected all tensors on {NAME}, found one on cpu of shape {mixed[0]}")


def _note(packet: Any, arguments: Any, keywords: dict[str, Any], ours: list[Simulated], here: bool) -> None:
    """Count the operation if the host would wait for it."""
    name = packet.__name__
    if packet in _MOVES:
        source = arguments[0] if packet is aten._to_copy else arguments[1]
        crosses = isinstance(source, Simulated) != here and (source.dim() or packet is aten._to_copy)
        blocks = not (keywords.get("non_blocking") or (packet is aten.copy_ and len(arguments) > 2 and arguments[2]))
        if crosses and blocks:
            _count("copy to the device" if here else "copy to the host")
    elif ours and packet in _INDEXES:
        masks = [index for index in arguments[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        cpu = [index for index in arguments[1] if isinstance(index, torch.Tensor) and not isinstance(index, Simulated)]
        filled = packet is not aten.index and arguments[2].numel() == 1  # by a mask, without its indices
        if cpu or (masks and not filled):
            _count("index" if masks else "copy to the device")
    elif ours and packet in _WAITS:
        _count("item" if packet is aten._local_scalar_dense else name)


def _count(operation: str) -> None:
    for counted in _active:
        counted.note(operation)


def _leaves(value: Any) -> Iterator[Any]:
    """What is in nested lists, tuples and dicts; torch's own function for it is several times slower."""
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """The same nest with each of its leaves replaced."""
    if isinstance(value, list | tuple):
        items = [_map(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Simulated) else value


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


_torch_load: Callable[..., Any] = torch.load


def _load(*arguments: Any, map_location: Any = None, **keywords: Any) -> Any:
    """`torch.load` for files whose tensors are wanted on the device."""
    wanted = not callable(map_location) and not isinstance(map_location, dict) and _is_here(map_location)
    loaded = _torch_load(*arguments, map_location="cpu" if wanted else map_location, **keywords)
    return _map(lambda leaf: leaf.to(NAME) if wanted and isinstance(leaf, torch.Tensor) else leaf, loaded)


_autocast = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")


def _register_autocast() -> None:
    """Products compute in the precision of `torch.autocast`; all else in that of its inputs."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(operation: Any) -> Callable[..., Any]:
        def low(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(torch.get_autocast_dtype(NAME)) if floating else value

        def compute(*arguments: Any, **keywords: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(key):
                return operation(*_map(low, arguments), **_map(low, keywords))

        return compute

    for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"):
        _autocast[0].impl(name, cast(getattr(aten, name)), "AutocastPrivateUse1")
    _autocast[1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


if DEVICE == NAME:
    # On import, before any test: the threads of autograd are started once, for the devices that there are by then.
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    _register_autocast()
