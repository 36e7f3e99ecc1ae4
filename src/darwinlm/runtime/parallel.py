"""Work shared by several processes: their ranks, sums over all of them, and one clear message if one of them dies.

All functions work in a single process too, where there is nothing to exchange. Several processes are started by
`torchrun --nproc-per-node N -m darwinlm`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from darwinlm.runtime.locking import holding, locked_directory
from darwinlm.runtime.progress import silence
from darwinlm.types import DarwinError, UsageError

FAILURES = "darwinlm/failures"  # key of the number of processes of a run that have failed
GRACE = 2.0  # seconds that a process which fails later gives the first one to report why
TIMEOUT = timedelta(days=7)  # one process may write text for days; one that has died is noticed at once


class PeerLostError(DarwinError):
    """Another process of the run has ended; if it could, it has reported why."""


def processes() -> int:
    """The number of processes that share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def neighbours() -> int:
    """The number of these processes that run on this machine and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that prints messages and writes the files that are common to all."""
    return rank() == 0


def owner(block: int) -> int:
    """The rank of the process that eliminates a block's structures."""
    return block % processes()


def is_mine(block: int) -> bool:
    """Whether this process eliminates the block's structures."""
    return owner(block) == rank()


@contextmanager
def together() -> Iterator[None]:
    """Connect this process to the others that torchrun has started, if any, for the length of a `with` block.

    If one process fails, all of them end. One reports why: the one that failed or, if it could not, another. The one
    that failed does not close the group, for which NCCL would wait for the others: its program has to end by `leave`.

    Raises:
        PeerLostError: if another process died without reporting why.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, this_rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    # Gloo beside NCCL: a collective on the host is one that the host waits for.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=this_rank, world_size=world, timeout=TIMEOUT)
    before = signal.signal(signal.SIGTERM, _end_on_signal)
    try:
        with nullcontext() if first() else silence():
            yield
        wait_for_all()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
        if store.add(FAILURES, 1) > 1 and isinstance(error, DarwinError | OSError):
            time.sleep(GRACE)  # torchrun ends all processes once one has ended: let the first report why
            leave(2 if isinstance(error, UsageError) else 1)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def connected() -> bool:
    """Whether this process is one of several: it is in `together`, or has failed there."""
    return dist.is_initialized()


def leave(code: int) -> NoReturn:
    """End the program without waiting for the other processes, as Python's own end may."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody may be reading any more
            stream.flush()
    os._exit(code)


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process run the `with` block alone, and then the others, which read what it wrote to the disk."""
    if not first():
        wait_for_all()
    yield
    if first():
        wait_for_all()


@contextmanager
def shared_directory(path: Path, prepare: Callable[[], object]) -> Iterator[None]:
    """Let the first process lock a directory for all, and prepare it before any of them works in it.

    Raises:
        UsageError: on the first process, as `locked_directory`.
    """
    if not first():
        wait_for_all()
        with holding(path):
            yield
        return
    with locked_directory(path):
        prepare()
        wait_for_all()
        yield


def sum_at(tensor: Tensor, owner: int) -> None:
    """Replace `tensor` on process `owner` by its sum over all processes. On other processes it becomes undefined.

    Raises:
        PeerLostError: if another process has ended.
    """
    if processes() > 1:
        with _peers():
            dist.reduce(tensor, owner)


def sum_everywhere(tensor: Tensor) -> None:
    """Replace `tensor` by its sum over all processes, the same to the last bit on all.

    Raises:
        PeerLostError: if another process has ended.
    """
    if processes() > 1:
        with _peers():
            dist.all_reduce(tensor)


def sums_everywhere(values: Sequence[float]) -> list[float]:
    """The sums of each value over all processes, the same on all. Raises `PeerLostError` if a process has ended."""
    if processes() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _peers():
        dist.all_reduce(sums)
    return sums.tolist()


def from_first(find: Callable[[], str]) -> str:
    """What the first process finds, on all; the others do not look. Raises `PeerLostError` if a process has ended."""
    if processes() == 1:
        return find()
    found = [find() if first() else None]
    with _peers():
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return str(found[0])


def wait_for_all() -> None:
    """Return once every process has called this. Raises `PeerLostError` if one has ended."""
    if processes() > 1:
        with _peers():
            dist.all_reduce(torch.zeros(1))  # on the host: NCCL would only queue it, and the host would run ahead


@contextmanager
def _peers() -> Iterator[None]:
    """Turn the backend's error at a broken connection into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise _peer_lost(reason) from None


def _end_on_signal(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM, which torchrun sends once another process has ended, maybe before this one notices."""
    raise _peer_lost("torchrun ended this one")


def _peer_lost(reason: str) -> PeerLostError:
    return PeerLostError(
        f"another process of this run has died ({reason}); run the same command again, it goes on from what is finished"
    )
