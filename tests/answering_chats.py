"""Tiny models with a chat template, and invented conversations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from darwinlm.model.checkpoint import Checkpoint

TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn['role'] }}\n{{ turn['content'] }}</s>{% endfor %}"
    "{% if tools %}<s>tools\n{{ tools | length }}</s>{% endif %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TOPICS = ("lists", "the weather", "numbers", "names of things", "files", "how functions work", "errors", "sets")


def with_template(checkpoint: Path, path: Path) -> Path:
    """A copy of a checkpoint whose tokenizer has a chat template."""
    shutil.copytree(checkpoint, path)
    tokenizer: Any = Checkpoint(path).tokenizer
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def conversations(path: Path, count: int = 16) -> Path:
    """A file of conversations of different lengths; each has an answer, which is no part of the prompt."""
    rows = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        question = {"role": "user", "content": f"Tell me about {topic}" + ", please" * (number // len(TOPICS))}
        rows.append({"messages": [question, {"role": "assistant", "content": "No."}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
