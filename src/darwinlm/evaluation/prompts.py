"""Prompts of conversations: what stands before the first answer, as the model's chat template renders it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from darwinlm.types import UsageError


def chat_prompts(
    path: str, tokenizer: PreTrainedTokenizerBase, count: int, longest: int | None, flag: str
) -> list[list[int]]:
    """Return the token ids of the first prompts of a file of conversations that have at most `longest` tokens.

    A prompt ends where the assistant's turn begins. Each line of the file is an object with `messages`, or with a
    `prompt` that is a text or messages, and may have `tools`.

    Args:
        count: the most prompts.
        longest: None for no bound.
        flag: the name of the setting that names the file.

    Raises:
        UsageError: if there is no such file, a line is no conversation, the tokenizer has no chat template, or no
            prompt is short enough.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            f"--{flag}: expected a model with a chat template, found none; take its instruct version, or leave it out"
        )
    found, read = [], 0
    for number, row in _rows(Path(path), flag):
        read += 1
        ids = _rendered(row, tokenizer, f"--{flag}: line {number} of {path}")
        if longest is None or len(ids) <= longest:
            found.append(ids)
        if len(found) == count:
            break
    if not found:
        raise UsageError(
            f"--{flag}: expected prompts of at most {longest} tokens in {path}, found none in {read}; let answers have "
            "fewer tokens, or give other prompts"
        )
    return found


def _rows(path: Path, flag: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise UsageError(f"--{flag}: expected a .jsonl file of conversations, found none at {path}; check its name")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise UsageError(
                        f"--{flag}: line {number} of {path} is no object of JSON; mend it, or leave it out"
                    )
                yield number, row


def _rendered(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    given = row.get("messages", row.get("prompt"))
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise UsageError(f"{where}: expected messages with roles, or a prompt, found neither; mend it, or leave it out")
    roles = [turn["role"] for turn in messages]
    before = messages[: roles.index("assistant")] if "assistant" in roles else messages
    if not before:
        raise UsageError(f"{where}: expected a turn before the assistant's, found none; mend it, or leave it out")
    try:
        text = tokenizer.apply_chat_template(before, row.get("tools"), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of any kind: templates are programs
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{where}: the chat template refuses it ({reason}); mend it, or leave it out") from None
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
