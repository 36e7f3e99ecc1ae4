"""Of a model on the hub exactly what is used is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub import local_hub

pytestmark = pytest.mark.slow  # a process of its own, for the address of the hub is read at its start

FETCH = """
import sys
from darwinlm.model.hub import fetch_model
from darwinlm.runtime.names import hub_model
directory = fetch_model(hub_model(sys.argv[1]))
print(*sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()))
"""
SMALL = {"config.json", "merges.txt", "vocab.json", "tokenizer_config.json", "LICENSE", "USE_POLICY.md", "README.md"}
OTHERS = (
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "logo.png",
)


def fetched(address: str, tmp_path: Path, name: str = "me/model@main") -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"
    } | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    command = [sys.executable, "-c", FETCH, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("sharded", [True, False])
def test_what_is_used_and_nothing_else(sharded: bool, tmp_path: Path) -> None:
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    weights = {"model.safetensors.index.json": index, shards[0]: b"1", shards[1]: b"2"}
    with local_hub() as (address, repositories):
        wanted = weights if sharded else {"model.safetensors": b"0"}
        repositories["me/model"] = dict.fromkeys([*SMALL, *OTHERS], b"{}") | wanted
        done = fetched(address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == SMALL | set(wanted)


def test_an_adapter(tmp_path: Path) -> None:
    files = {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"}
    with local_hub() as (address, repositories):
        repositories["me/model"] = dict.fromkeys([*files, "optimizer.pt", *OTHERS], b"{}")
        done = fetched(address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == files


def test_a_model_without_safetensors_is_refused(tmp_path: Path) -> None:
    with local_hub() as (address, repositories):
        repositories["me/model"] = dict.fromkeys([*SMALL, *OTHERS], b"{}")
        done = fetched(address, tmp_path)
    assert "no weights of me/model on the hub: expected model.safetensors, found none" in done.stderr
