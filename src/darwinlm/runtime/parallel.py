"""The little that torch.distributed needs: who am I, sums over processes, and one clear end if a process dies.

Everything works in a single process too, where it does nothing. `torchrun --nproc-per-node N -m darwinlm` starts many.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from darwinlm.runtime.files import locked_directory
from darwinlm.runtime.progress import console
from darwinlm.types import DarwinError, UsageError

SPOKEN = "darwinlm/spoken"  # counts the processes of a run that have failed


GRACE = 2.0  # seconds


PATIENCE = timedelta(hours=6)  # one process may eliminate a large unit while the others wait for it


class PeerLostError(DarwinError):
    """Another process of the run has gone; it has said why, if it could."""


def processes() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def neighbours() -> int:
    """How many of them are on this machine, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that speaks, and writes what is common to all."""
    return rank() == 0


def owner(block: int) -> int:
    """Which process eliminates a block's structures."""
    return block % processes()


def is_mine(block: int) -> bool:
    """Whether it is this one."""
    return owner(block) == rank()


@contextmanager
def together() -> Iterator[None]:
    """Join the other processes that torchrun has started, if any, and part from them in the end.

    Whatever ends one process ends all. One of them says why: the one that failed, or, if it could not, another.

    Raises:
        PeerLostError: if another process died without a word.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, me, world = next(iter(rendezvous("env://", timeout=PATIENCE)))
    # Gloo beside NCCL: a collective on the host is one that the host waits for.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=me, world_size=world, timeout=PATIENCE)
    console.quiet = not first()
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        yield
        wait_for_all()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends as it is
        if store.add(SPOKEN, 1) > 1 and isinstance(error, DarwinError | OSError):
            time.sleep(GRACE)  # torchrun ends the others once one is gone: let the other say why
            raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        console.quiet = False
        dist.destroy_process_group()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process does this alone, then the others, who find what it has left on the disk."""
    if not first():
        wait_for_all()
    yield
    if first():
        wait_for_all()


@contextmanager
def shared_directory(path: Path, prepare: Callable[[], object]) -> Iterator[None]:
    """The first process holds a directory for all, and prepares it before any of them works in it.

    Raises:
        UsageError: on the first process, as `locked_directory`.
    """
    if not first():
        wait_for_all()
        yield
        return
    with locked_directory(path):
        prepare()
        wait_for_all()
        yield


def sum_at(tensor: Tensor, owner: int) -> None:
    """Replace `tensor` on process `owner` by the sum over all processes. Elsewhere it means nothing afterwards.

    Raises:
        PeerLostError: if a process has gone.
    """
    if processes() > 1:
        with _peers():
            dist.reduce(tensor, owner)


def sums_everywhere(values: Sequence[float]) -> list[float]:
    """The sums over all processes of what each gives, the same everywhere. Raises `PeerLostError` if one has gone."""
    if processes() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _peers():
        dist.all_reduce(sums)
    return sums.tolist()


def wait_for_all() -> None:
    """Return once every process has come here. Raises `PeerLostError` if one has gone."""
    if processes() > 1:
        with _peers():
            dist.all_reduce(torch.zeros(1))  # on the host: NCCL would only queue it, and the host would run ahead


@contextmanager
def _peers() -> Iterator[None]:
    """What the backend raises when a connection breaks becomes one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise _peer_lost(reason) from None


def _told_to_end(_signal: int, _frame: FrameType | None) -> NoReturn:
    """torchrun ends all processes once one is gone, maybe before its absence is felt here."""
    raise _peer_lost("torchrun ended this one")


def _peer_lost(reason: str) -> PeerLostError:
    return PeerLostError(
        f"another process of this run has died ({reason}); run the same command again, it goes on from what is finished"
    )
