"""Files of the user, read as text in one way everywhere."""

from __future__ import annotations

from pathlib import Path

from learnevict.errors import DataError


def read_file(path: Path) -> str:
    """A text file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return decode(path.read_bytes(), repr(str(path)))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error


def decode(raw: bytes, source: str) -> str:
    """Text from UTF-8, with or without a byte order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{source} is not UTF-8 (byte {raw[error.start]:#04x} in line {line}); convert it, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from error
