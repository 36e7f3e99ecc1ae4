"""`push_to_hub` is that of any transformers model: what it uploads of an export loads from the hub by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from darwinlm.export.hf import export_hf
from darwinlm.model.pruned import auto_map, render
from darwinlm.model.reading import load
from exports import CARD, CASES, dense_model, make_tokenizer, stitched_model
from hub import local_hub

pytestmark = pytest.mark.slow  # several processes, each of which imports torch

# transformers and huggingface_hub as they are, but for the address of the hub. darwinlm cannot be imported.
FRESH_PROCESS = """
import sys
sys.modules["darwinlm"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
model.push_to_hub("me/pruned", token="secret")
AutoTokenizer.from_pretrained(directory).push_to_hub("me/pruned", token="secret")
again = AutoModelForCausalLM.from_pretrained("me/pruned", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("me/pruned")
with torch.no_grad():
    save_file({"logits": again(tokenizer("w7 w9 w11 w5", return_tensors="pt")["input_ids"]).logits}, out)
"""


def test_what_is_pushed_loads_by_its_name(tmp_path: Path) -> None:
    case = CASES["qwen2"]
    export = export_hf(*stitched_model(dense_model(case), case), make_tokenizer(), tmp_path / "export", CARD)
    model = load(export).eval()
    model.save_pretrained(tmp_path / "saved")  # as one does after `darwinlm.load`
    make_tokenizer().save_pretrained(tmp_path / "saved")
    out = tmp_path / "logits.safetensors"
    with local_hub() as (address, repositories):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-I", "-c", FRESH_PROCESS, str(tmp_path / "saved"), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pushed = repositories["me/pruned"]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "chat_template.jinja"} <= set(pushed)
    assert pushed["modeling_pruned_qwen2.py"].decode() == render("qwen2")
    assert all(name in pushed["config.json"].decode() for name in auto_map("qwen2").values())  # vLLM needs AutoModel
    expected = model(torch.tensor([[7, 9, 11, 5]])).logits
    torch.testing.assert_close(load_file(out)["logits"], expected, atol=1e-4, rtol=0)
