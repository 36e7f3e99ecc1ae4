"""Collectives that hand over files hold the host, as NCCL's own do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from test_parallel import torchrun

pytestmark = pytest.mark.slow  # several processes, each of which imports torch

# A GPU machine as far as it can be had without one: collectives on tensors of the device are queued and not waited for.
# What NCCL would do with them is left to gloo, which waits only if it is asked to.
PRETEND = """
import sys, time
import torch
from torch import distributed as dist

start, reduce = dist.init_process_group, dist.all_reduce
def init(backend, **settings):
    pairs = dict(pair.split(":") for pair in backend.split(",")) if ":" in backend else {"cpu": None, "cuda": backend}
    init.host = pairs["cpu"]
    start("gloo", **settings)
def all_reduce(tensor, *arguments, **settings):
    waits = init.host == "gloo" and tensor.device.type == "cpu"
    return reduce(tensor, *arguments, **settings) if waits else reduce(tensor, *arguments, async_op=True, **settings)
zeros = torch.zeros
torch.zeros = lambda *size, device=None, **settings: zeros(*size, **settings)
dist.init_process_group, dist.all_reduce = init, all_reduce
torch.cuda.is_available, torch.cuda.set_device = lambda: True, lambda _: None
dist.get_backend = lambda *_: "gloo" if init.host else "nccl"
"""
HAND_OVER = """
from pathlib import Path
from darwinlm.runtime import parallel

file = Path(sys.argv[1])
with parallel.together():
    if parallel.rank() == 0:
        time.sleep(2)
        file.write_text("whole")
    parallel.wait_for_all()
    assert file.read_text() == "whole", "the host ran ahead"
    print(parallel.sums_everywhere([1.0, parallel.rank()]))
"""


def test_the_host_waits_at_a_hand_over_of_files_where_a_gpu_is(tmp_path: Path) -> None:
    file = tmp_path / "pretend.py"
    file.write_text(PRETEND + HAND_OVER)
    ended = torchrun(str(file), str(tmp_path / "handed-over"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n").count("[2.0, 1.0]") == 2
