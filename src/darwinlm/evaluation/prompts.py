"""Prompts of conversations: what stands before the first answer, as the model's chat template renders it."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from darwinlm.data.chat import Chat, prompt_text
from darwinlm.data.documents import read_documents
from darwinlm.types import UsageError


def chat_prompts(
    source: str, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig, count: int, answer: int, flag: str
) -> list[list[int]]:
    """Return the token ids of the first prompts of a source of chats that leave the model room for an answer.

    A prompt ends where the first answer begins.

    Args:
        model: the config of the model, which says how many positions it has.
        count: the most prompts.
        answer: tokens of an answer.
        flag: the name of the setting that names the source.

    Raises:
        UsageError: if the source cannot be read, the tokenizer has no chat template or it refuses a chat, or no prompt
            is short enough.
    """
    positions = getattr(model, "max_position_embeddings", None)
    longest = None if positions is None else positions - answer
    found, read = [], 0
    for chat in (document for document in read_documents(source, f"--{flag}") if isinstance(document, Chat)):
        read += 1
        ids = list(tokenizer(prompt_text(chat.opening, tokenizer), add_special_tokens=False)["input_ids"])
        if longest is None or len(ids) <= longest:
            found.append(ids)
        if len(found) == count:
            break
    if not found:
        which = "" if longest is None else f" whose prompts have at most {longest} tokens"
        raise UsageError(
            f"--{flag}: expected chats{which} in {source}, found none among {read}; give others, or let answers be "
            "shorter"
        )
    return found
