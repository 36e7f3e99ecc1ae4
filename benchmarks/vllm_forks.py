"""Runs in an environment with vLLM: imports it once, and forks a server for every line of JSON on standard input.

Importing takes longer than all requests to a tiny model, and a server is three processes, each of which would do so. A
line has the arguments of the server and the file for what it prints; the answer is the id of its process.
"""

import json
import multiprocessing
import os
import signal
import sys

import vllm.entrypoints.launchers.api_server.entry as entry
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401

get_context = multiprocessing.get_context


def serve(arguments: list[str], log: str, modules: str) -> None:
    """Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ["HF_MODULES_CACHE"] = modules
    import huggingface_hub.constants  # noqa: F401
    import transformers.dynamic_module_utils
    import transformers.utils.hub

    for module in (transformers.dynamic_module_utils, transformers.utils.hub):
        module.HF_MODULES_CACHE = modules
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
