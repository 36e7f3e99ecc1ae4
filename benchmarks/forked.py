"""Work in a fork of this process, which may print, hang, fill the memory or be killed, and how it ended."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS, BYTES = 60, 8 << 30  # of one piece of work, on the processor and in memory
WAIT = 300  # seconds for it, on a machine that does other work too


def attempt(work: Callable[[], int], log: Path, kill_after: float | None = None) -> tuple[str, int, str]:
    """Run `work` in a fork. Returns `done`, `refused`, `traceback`, `hang` or `killed`; the code; what was printed."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = start + (WAIT if kill_after is None else kill_after)
    while (waited := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.005)
    if waited[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return ("hang" if kill_after is None else "killed"), -9, _read(log)
    code, printed = os.waitstatus_to_exitcode(waited[1]), _read(log)
    sentences = [line for line in printed.splitlines() if line.startswith("darwinlm: ")]
    if code == 0 and "Traceback" not in printed:
        return "done", code, printed
    if "out of memory" in printed or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hang", code, printed
    one = code in (1, 2) and len(sentences) == 1 and "Traceback" not in printed
    return ("refused" if one else "traceback"), code, printed


def _read(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
