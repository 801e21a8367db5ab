"""Conversations in the common formats of training data.

Read formats, each as a value of a JSON row:

    OpenAI, TRL   [{"role": "system" | "user" | "assistant", "content": TEXT}, ...]
    ShareGPT      [{"from": "system" | "human" | "gpt", "value": TEXT}, ...]

A prompt and its completion are two such lists, or two texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
"""{"role": "system", "user" or "assistant", "content": text, "learn": whether a model is trained to write it}."""

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of these names hold conversations, columns of any other name hold texts."""

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
_UNSUPPORTED = ("tool_calls", "function_call", "tools", "images", "audio", "reasoning_content", "thinking")


def read_messages(value: Any, where: str) -> list[Message]:
    """Return the messages of a conversation in one of the formats above. The assistant's messages are learnt.

    OpenAI's `"weight": 0` excludes a message from learning. A text is one message of the user.

    Args:
        value: a list of messages, or a text.
        where: file, line and column, for messages.

    Raises:
        ValueError: `value` is something else; a message has another role or weight, no text, or holds more than a text;
            or the messages are not an optional system message, then user and assistant in turn.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value, "learn": False}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list of messages with role and content, found {_shown(value)}")
    messages = [_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1)]
    expected = "user"
    for number, message in enumerate(messages, start=1):
        if message["role"] == "system" and number == 1:
            continue
        if message["role"] != expected:
            raise ValueError(
                f"{where}, message {number}: expected user and assistant in turn, starting with user, after an "
                f"optional system message; found {message['role']} in place of {expected}"
            )
        expected = "assistant" if expected == "user" else "user"
    if all(message["role"] == "system" for message in messages):
        raise ValueError(f"{where}: expected a message of the user, found a system message only")
    return messages


def training_conversation(value: Any, where: str) -> list[Message]:
    """Return the messages up to the assistant's last one.

    Raises:
        ValueError: it is a text, there is no message of the assistant to learn; and see `read_messages`.
    """
    if isinstance(value, str):
        raise ValueError(
            f"{where}: expected a list of messages with role and content, found a text, {_shown(value)}; a column "
            f"of texts must not be named {', '.join(CONVERSATION_COLUMNS[:-1])} or {CONVERSATION_COLUMNS[-1]}"
        )
    messages = read_messages(value, where)
    if messages[-1]["role"] == "user":
        messages.pop()
    if not any(message["learn"] for message in messages):
        raise ValueError(f"{where}: expected a message of the assistant to learn, found none")
    return messages


def prompt_conversation(value: Any, where: str) -> list[Message]:
    """Return the messages up to the user's last one, which a model is asked to answer; see `read_messages`."""
    messages = read_messages(value, where)
    if messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def completed_prompt(prompt: Any, completion: Any, where: str) -> list[Message]:
    """Return the conversation of a prompt and its completion. Only the completion is learnt.

    Args:
        prompt: a text, or a list of messages that ends with the user's.
        completion: a text, or a list of messages that starts with the assistant's.
        where: file and line, for messages.

    Raises:
        ValueError: the two do not make a conversation; see `read_messages`.
    """
    asked = read_messages(prompt, f"{where}, prompt")
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(completion, list):
        raise ValueError(f"{where}, completion: expected a text or a list of messages, found {_shown(completion)}")
    own = [{"role": message["role"], "content": message["content"]} for message in asked]
    return [
        {**message, "learn": message["learn"] and number >= len(asked)}
        for number, message in enumerate(training_conversation([*own, *completion], where))
    ]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: expected an object with role and content, found {_shown(item)}")
    role, content = ("role", "content") if "role" in item or "content" in item else ("from", "value")
    name = _ROLES.get(str(item.get(role)))
    if name is None:
        raise ValueError(f"{where}: expected {role} to be one of {', '.join(_ROLES)}, found {_shown(item.get(role))}")
    if not isinstance(item.get(content), str):
        raise ValueError(f"{where}: expected a text as {content}, found {_shown(item.get(content))}")
    present = [key for key in _UNSUPPORTED if item.get(key)]
    if present:
        raise ValueError(f"{where}: expected a text only, found {', '.join(present)}, which is not supported")
    if item.get("weight") not in (None, 0, 1):
        raise ValueError(f"{where}: expected weight to be 0 (not learnt) or 1, found {_shown(item['weight'])}")
    return {"role": name, "content": item[content], "learn": name == "assistant" and item.get("weight") != 0}


def _shown(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."


def turns(texts: Sequence[str]) -> list[Message]:
    """Return a conversation from texts of user and assistant in turn, starting with the user."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": text, "learn": bool(number % 2)}
        for number, text in enumerate(texts)
    ]
