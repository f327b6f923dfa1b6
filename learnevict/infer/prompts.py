"""What a user wants read: files as text and as rows, in one way everywhere, and conversations as data sets write them.

Files are UTF-8, with or without a byte order mark.

Lines of JSON end with a newline and with nothing else: U+2028 and U+0085 are characters of a text.
"""

from __future__ import annotations

import json
import warnings
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, LearnevictWarning

CONVERT = "convert it, for instance with `iconv -f latin1 -t utf-8`"
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


def read_file(path: Path) -> str:
    """Returns a whole file as text. Raises DataError: it cannot be read, or is not UTF-8."""
    try:
        return decode(path.read_bytes(), repr(str(path)))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error


def read_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file as they are needed, empty ones too, so that they can be counted.

    They are not decoded: one that is not UTF-8 is a bad row, and no reason to stop at.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file):
                yield raw if number else raw.removeprefix(BOM_UTF8)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error


def decode(raw: bytes, source: str) -> str:
    """Returns UTF-8 as text, without the byte order mark that it may begin with. Raises DataError: it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{source} is not UTF-8 (byte {raw[error.start]:#04x} in line {line}); {CONVERT}") from error


def parse_row(line: bytes | str) -> dict[str, Any]:
    """Returns the object that a line of JSON holds.

    Raises:
        DataError: it holds something else; worded to follow the name of the line.
    """
    try:
        found = json.loads(line if isinstance(line, str) else line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.object[error.start]:#04x}); {CONVERT}") from error
    except ValueError as error:
        raise DataError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise DataError("is not JSON that can be read: brackets are nested too deeply") from error
    if not isinstance(found, dict):
        raise DataError(f"is {type(found).__name__} of JSON, not an object of names and values")
    return found


def checked(text: str, subject: str = "") -> str:
    """Returns the text itself, which tokenizers and files can take.

    Raises:
        DataError: it holds half of a surrogate pair; worded to follow `subject`, or the name of a row.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{subject}holds {text[error.start]!a}, half of a surrogate pair, which is no character; write both halves, or "
            "U+FFFD"
        ) from error
    return text


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
