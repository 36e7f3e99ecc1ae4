"""An Ollama Modelfile beside a GGUF file: `ollama create NAME -f FILE.Modelfile`."""

from __future__ import annotations

import json
from pathlib import Path

from darwinlm.model.checkpoint import Checkpoint
from darwinlm.runtime.files import write_text

CONTEXT = 8192  # tokens at most: Ollama makes room for all of them at once


def write_modelfile(gguf: Path, checkpoint: Checkpoint) -> Path:
    """Write the Modelfile of a GGUF file that was made from a checkpoint, and return its path.

    Ollama takes the chat template from the GGUF file.
    """
    positions = getattr(checkpoint.config, "max_position_embeddings", None) or CONTEXT
    lines = [f"FROM ./{gguf.name}", f"PARAMETER num_ctx {min(positions, CONTEXT)}"]
    stop = checkpoint.tokenizer.eos_token
    lines += [f"PARAMETER stop {json.dumps(str(stop), ensure_ascii=False)}"] if stop else []
    path = gguf.with_suffix(".Modelfile")
    write_text(path, "\n".join(lines) + "\n")
    return path
