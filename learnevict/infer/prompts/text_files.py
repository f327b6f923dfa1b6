"""Files of the user, read as text and as rows in one way everywhere: UTF-8, with or without a byte order mark.

Lines of JSON end with a newline and with nothing else: U+2028 and U+0085 are characters of a text.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learnevict.errors import DataError

CONVERT = "convert it, for instance with `iconv -f latin1 -t utf-8`"


def read_file(path: Path) -> str:
    """Returns a whole file as text.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
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
    """Returns UTF-8 as text, without the byte order mark that it may begin with.

    Raises:
        DataError: it is not UTF-8.
    """
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
