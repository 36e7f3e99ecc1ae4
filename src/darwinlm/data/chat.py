"""Chats: read from records of several forms, checked, and rendered by a model's own chat template.

A chat is a document like any other: a string, one line of JSON. What reads, hashes, shuffles and splits documents need
not know which are chats; only what makes tokens of them does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from darwinlm.types import UsageError

CHAT_COLUMNS = ("messages", "conversations", "prompt and completion")

# Other names of roles and of a message's fields, as in data sets of ShareGPT's form.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool", "model": "assistant"}
FIELDS = {"from": "role", "value": "content"}

# What may come after a turn: the beginning of a chat is None.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}

TODAY = datetime(2024, 7, 26)  # in every template that writes the date: the same text must give the same tokens
MARK = "\ue000answer\ue000"  # stands for an answer that is looked for

Message = dict[str, Any]


class BrokenChatError(UsageError):
    """A record whose chat has an empty turn, an unknown role, or turns in an order that no model answers."""


class Rendered(NamedTuple):
    """The tokens of a chat, and which of them an assistant wrote, the end of its turn included."""

    ids: list[int]
    assistant: list[bool]


class Chat(str):
    """A conversation as one line of JSON: `messages`, and `tools` where there are any."""

    place: Callable[[], str] = staticmethod(lambda: "a chat")  # says where it was read

    @classmethod
    def of(cls, messages: Sequence[Message], tools: Sequence[Any] = (), place: Callable[[], str] | None = None) -> Chat:
        """The chat of some messages in transformers' form (`role`, `content`, `tool_calls`), which must be in order."""
        content = {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
        chat = cls(json.dumps(content, ensure_ascii=False, default=str))
        if place is not None:
            chat.place = place
        return chat

    @cached_property
    def messages(self) -> list[Message]:
        """Its messages in order, in transformers' form."""
        return json.loads(self)["messages"]

    @cached_property
    def tools(self) -> list[Any]:
        """The JSON schemas of the functions that the assistant may call."""
        return json.loads(self).get("tools", [])

    @cached_property
    def opening(self) -> Chat:
        """The chat before its first answer: what a model can be asked."""
        roles = [message["role"] for message in self.messages]
        end = roles.index("assistant") if "assistant" in roles else len(roles)
        return Chat.of(self.messages[:end], self.tools, self.place)


def chat_of(record: object, where: str, place: Callable[[], str] | None = None) -> Chat | None:
    """The chat of a record with `messages`, `conversations`, or `prompt` and `completion`; None for other records.

    Messages have `role` and `content`, or `from` and `value`; `tools` are a list or one in JSON. Fields that are null
    count as missing, and a system prompt without text as none.

    Args:
        where: names the record in messages to the user.
        place: says later where it was read, if that takes time to find.

    Raises:
        BrokenChatError: if a turn is empty, or the roles are unknown or out of order.
    """
    turns = _turns(record) if isinstance(record, Mapping) else None
    if turns is None:
        return None
    messages = [_message(turn, number, where) for number, turn in enumerate(turns, 1)]
    if messages and messages[0]["role"] == "system" and not messages[0].get("content"):
        del messages[0]
    _check(messages, where)
    assert isinstance(record, Mapping)
    chat = Chat.of(messages, _tools(record.get("tools"), where), place or (lambda: where))
    try:
        chat.encode()
    except UnicodeEncodeError:
        raise BrokenChatError(f"{where} has half of a surrogate pair: expected Unicode; mend it") from None
    return chat


def _turns(record: Mapping[Any, Any]) -> list[Any] | None:
    """The messages of a record as they are, or None if it has none under a name that is known."""
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return record[name]
    prompt, completion = record.get("prompt"), record.get("completion")
    if prompt is None or completion is None:
        return None
    return [
        turn
        for role, part in (("user", prompt), ("assistant", completion))
        for turn in (part if isinstance(part, list) else [{"role": role, "content": part}])
    ]


def _message(turn: object, number: int, where: str) -> Message:
    """A turn in transformers' form. Raises `BrokenChatError` if it is none."""
    if not isinstance(turn, Mapping):
        raise BrokenChatError(f"{where} has no message as turn {number}: expected role and content; mend it")
    message: Message = {FIELDS.get(str(name), str(name)): _without_nulls(value) for name, value in turn.items()}
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in FOLLOWS or role is None:
        known = ", ".join(name for name in FOLLOWS if name)
        raise BrokenChatError(f"{where} has the role {role!r} in turn {number}: expected one of {known}; mend it")
    message["role"] = role
    if "content" in message:
        message["content"] = _text(message["content"], number, where)
    calls = message.get("tool_calls")
    if calls:
        message.setdefault("content", "")
        message["tool_calls"] = [_call(call, number, where) for call in calls]
    else:
        message.pop("tool_calls", None)
    return message


def _text(content: object, number: int, where: str) -> str:
    """The text of a message, whose content may be a list of parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BrokenChatError(f"{where} has a part that is no text in turn {number}: expected text alone; leave it out")
    return "".join(map(str, texts))


def _call(call: object, number: int, where: str) -> dict[str, Any]:
    """A tool call as templates read it, whose arguments are no JSON in a string."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function", call), Mapping):
        raise BrokenChatError(f"{where} has no tool call in turn {number}: expected name and arguments; mend it")
    function = dict(call.get("function", call))
    if not isinstance(function.get("name"), str):
        raise BrokenChatError(f"{where} has a tool call without a name in turn {number}: expected one; mend it")
    with_arguments = function.get("arguments")
    if isinstance(with_arguments, str):
        with suppress(ValueError):  # else it stays as the assistant wrote it
            function["arguments"] = json.loads(with_arguments)
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


def _tools(tools: object, where: str) -> list[Any]:
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or []
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise BrokenChatError(f"{where} has tools that cannot be read: expected a list of JSON schemas; mend it")
    return _without_nulls(found)


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that tables have where another row has a field."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check(messages: Sequence[Message], where: str) -> None:
    """Raise `BrokenChatError` if a turn is empty, or turns are out of order."""
    if not messages:
        raise BrokenChatError(f"{where} has no turns: expected a question and an answer; leave it out")
    before: str | None = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in FOLLOWS[before]:
            after = "at the beginning" if before is None else f"after {before}"
            expected = " or ".join(FOLLOWS[before])
            raise BrokenChatError(f"{where} has {role} {after} in turn {number}: expected {expected}; mend the order")
        if not message.get("content", "").strip() and "tool_calls" not in message:
            raise BrokenChatError(f"{where} has an empty turn, number {number} ({role}): expected text; leave it out")
        before = role


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The tokens of a chat by the tokenizer's chat template, and which of them the assistant wrote.

    The template's `{% generation %}` marks say which; without any, an answer is what its turn adds to the text before
    it and the prompt for an answer. What the template writes as the date of today is always the same.

    Raises:
        UsageError: if there is no template, it refuses the chat, or does not tell where an answer is; it names the row.
    """
    template = _template(chat, tokenizer)
    text: str = _apply(chat, chat.messages, tokenizer, template, tokenize=False)
    _check_calls(chat, text)
    if re.search(r"{%-?\s*generation\s*-?%}", template):
        asked = {"return_dict": True, "return_assistant_tokens_mask": True}
        found: Any = _apply(chat, chat.messages, tokenizer, template, **asked)
        return Rendered(list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]])
    spans = _answers(chat, tokenizer, template, text)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return Rendered(encoded["input_ids"], [any(first <= at < end for first, end in spans) for at in starts])


def prompt_text(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that asks a model for its answer to all turns of a chat (`chat.opening`, for example).

    It has the tokens that begin a text already: tokenize it without special tokens.

    Raises:
        UsageError: if there is no template, or it refuses the chat; it names the row.
    """
    template = _template(chat, tokenizer)
    return _apply(chat, chat.messages, tokenizer, template, tokenize=False, add_generation_prompt=True)


def _template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a chat, with a date that does not change."""
    try:
        template = tokenizer.get_chat_template(None, chat.tools or None)
    except ValueError:
        raise UsageError(
            f"{chat.place()} is a chat, and the model's tokenizer has no chat template: expected one of an instruct "
            "model; put chat_template.jinja beside the tokenizer"
        ) from None
    formats = set(re.findall(r"""strftime_now\(\s*["']([^"']*)["']""", template))
    dates = json.dumps({text: TODAY.strftime(text) for text in sorted(formats)})
    date = f"{{%- macro strftime_now(format) -%}}{{{{ {dates}[format] }}}}{{%- endmacro -%}}"
    return date + template if formats else template


def _apply(
    chat: Chat, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, **settings: Any
) -> Any:
    """What the template makes of a chat's first messages. Raises `UsageError` if it refuses them."""
    settings |= {"tools": chat.tools or None, "chat_template": template}
    try:
        return tokenizer.apply_chat_template(list(messages), **settings)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{chat.place()}: the model's chat template does not take it ({reason}); mend the row or leave it out"
        ) from None


def _check_calls(chat: Chat, text: str) -> None:
    """Raise `UsageError` if a template leaves out what functions were called."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", [])]
    for name in (call["function"]["name"] for call in calls):
        if name not in text:
            raise UsageError(
                f"{chat.place()}: the model's chat template does not write the call of {name}: expected a template "
                "with tool calls; leave such rows out, or put another chat_template.jinja beside the tokenizer"
            )


def _answers(chat: Chat, tokenizer: PreTrainedTokenizerBase, template: str, text: str) -> list[tuple[int, int]]:
    """Where the answers begin and end in the text of a whole chat, in characters; white space after them is none."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        until = chat.messages[: index + 1]
        before = _apply(chat, until[:-1], tokenizer, template, tokenize=False, add_generation_prompt=True)
        after = _apply(chat, until, tokenizer, template, tokenize=False)
        if text.startswith(before) and text.startswith(after) and len(after) > len(before):
            spans.append((len(before), len(after.rstrip())))
        else:
            spans.append(_answer_by_itself(chat, index, tokenizer, template, text))
    return spans


def _answer_by_itself(
    chat: Chat, index: int, tokenizer: PreTrainedTokenizerBase, template: str, text: str
) -> tuple[int, int]:
    """Where an answer is in the text, if the template writes it in another way once turns follow, as Qwen3's does."""
    marked = [*chat.messages]
    marked[index] = marked[index] | {"content": MARK}
    head, found, tail = _apply(chat, marked, tokenizer, template, tokenize=False).partition(MARK)
    last = _apply(chat, marked[: index + 1], tokenizer, template, tokenize=False)
    if not (found and text.startswith(head) and text.endswith(tail)):
        raise UsageError(
            f"{chat.place()}: the model's chat template does not tell where the answer in turn {index + 1} is: "
            "expected {% generation %} marks in it, found none; add them"
        )
    end = last.partition(MARK)[2].rstrip()
    return len(head), len(text) - len(tail) + (len(end) if tail.startswith(end) else 0)
