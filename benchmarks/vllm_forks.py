"""Runs in an environment with vLLM: imports it once, and forks a server for every line of JSON on standard input.

Importing takes longer than all requests to a tiny model, and a server is three processes, each of which would do so. A
line has the arguments of the server and the file for what it prints; the answer is the id of its process.
"""

import json
import multiprocessing
import os
import signal
import sys
from importlib import import_module
from typing import Any

entry: Any = import_module("vllm.entrypoints.launchers.api_server.entry")
for module in ("vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"):
    import_module(module)
get_context = multiprocessing.get_context


def serve(arguments: list[str], log: str, modules: str) -> None:
    """Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    for name in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        vars(import_module(name))["HF_MODULES_CACHE"] = modules
    multiprocessing.get_context = lambda method=None: get_context("fork")  # vLLM asks for spawn on a CPU
    sys.argv = ["api_server", *arguments]
    code = 1
    try:
        entry.main()
        code = 0
    finally:
        os._exit(code)


signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no child stays a zombie
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        serve(**job)
    print(pid, flush=True)
