"""Chats for tests, chat templates of the forms that models have, and tokenizers with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

import tiny

# SmolLM2's own.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: the last answer has a thought before it, which is left out once turns follow.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3.1's: a BOS, the date of today, tools and calls.
DATED = (
    "{{ bos_token }}{{ 'Today: ' + strftime_now('%d %b %Y') }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}{% if message.tool_calls is defined %}"
    "{{ message.tool_calls[0].function | tojson }}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# As Gemma's: it refuses a system prompt.
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


def tokenizer(template: str | None = CHATML, adds_bos: bool = False, marks: bool = True) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template.

    Args:
        marks: whether the marks of ChatML are tokens of their own, beyond the rows of tiny models.
    """
    made = tiny.tokenizer(adds_bos)
    if marks:
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def messages(*texts: str) -> list[dict[str, Any]]:
    """A user's and an assistant's messages in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def conversations() -> list[list[dict[str, Any]]]:
    """Questions about the topics of Python's help, answered by their text."""
    pieces = [
        text[start : start + 180] for text in tiny.documents() for start in range(0, min(len(text), 3000) - 180, 180)
    ]
    return [
        messages(f"{piece[:30]}?", piece[30:110], f"{piece[110:130]}?", piece[130:]) for piece in pieces if _full(piece)
    ]


def _full(piece: str) -> bool:
    """Whether no turn made of it is empty."""
    return all(piece[start:end].strip() for start, end in ((30, 110), (130, 180)))


def write(path: Path, *records: Any) -> Path:
    """Records as a `.jsonl` file."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def write_model(path: Path, family: str = "llama-gqa", template: str | None = CHATML) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    tiny.write_checkpoint(path, family)
    tokenizer(template, marks=False).save_pretrained(path)
    return path
