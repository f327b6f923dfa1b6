"""Conversations as data sets write them, in the shape that chat templates take."""

from __future__ import annotations

import warnings
from typing import Any

from learnevict.errors import DataError, LearnevictWarning
from learnevict.infer.prompts.text_files import checked

CHATS = ("messages", "conversations", "conversation")
"""Names under which rows keep them."""
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of ShareGPT and others for the roles of templates."""


def as_messages(turns: Any) -> list[dict[str, Any]]:
    """Returns turns as {"role": TEXT, "content": TEXT}, with whatever else they have, tool calls for instance.

    Args:
        turns: of "role" and "content" or, as ShareGPT has it, "from" and "value"; a content may be a list of parts of text,
            and null where a turn calls tools.

    Raises:
        DataError: no turns, or one without role or text; worded to follow the name of the row.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError('has no turns; a conversation is a list of {"role": TEXT, "content": TEXT}')
    return [_message(turn, number) for number, turn in enumerate(turns, 1)]


def warn_of_tools(messages: list[dict[str, Any]], tokenizer: Any) -> None:
    """Warns where turns call tools, but the chat template has no words for that."""
    if "tool_calls" not in str(tokenizer.chat_template) and any("tool_calls" in turn for turn in messages):
        warnings.warn(
            "turns call tools, but this model's chat template does not show tool calls: they are left out",
            LearnevictWarning,
            stacklevel=2,
        )


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(f'has a turn {number} that is no object; write {{"role": TEXT, "content": TEXT}}')
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise DataError(f"has a turn {number} without a role, such as user or assistant")
    content = turn.get("content", turn.get("value"))
    if content is None and not turn.get("tool_calls"):
        raise DataError(f"has a turn {number} without content")
    own = {name: value for name, value in turn.items() if name not in ("from", "value") and value is not None}
    return {**own, "role": ROLES.get(role.lower(), role), "content": _text(content, number)}


def _text(content: Any, number: int) -> str:
    """Returns the text of a content: text, parts of text in a row, or nothing."""
    if isinstance(content, str):
        return checked(content)
    if content is not None and not isinstance(content, list):
        raise DataError(f"has a turn {number} whose content is {type(content).__name__}, not text")
    parts = [{"text": part} if isinstance(part, str) else part for part in content or []]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"has a turn {number} with a part of another kind than text: {kind!r}")
    return checked("".join(part["text"] for part in parts))
