"""A file of answers that grows row by row and survives being interrupted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError

START = b'{"id": "'
"""How every row begins."""


class Results:
    """Rows as JSON lines, in a file that a later run goes on with, or on standard output.

    Args:
        path: the file; None: standard output.

    Raises:
        DataError: it cannot be written, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        if path is None:
            return
        try:
            with path.open("a", encoding="utf-8"):
                pass
            self._read(path)
        except OSError as error:
            raise DataError(f"cannot write {str(path)!r}: {error.strerror}; choose another --out") from error

    def _read(self, path: Path) -> None:
        """Take in finished rows; cut off a last one that was being written when the run died, and nothing else."""
        raw = path.read_bytes()
        end = raw.rfind(b"\n") + 1
        broken = bool(raw[end:]) and not _is_json(raw[end:])
        try:
            if broken and not (START.startswith(raw[end:]) or raw[end:].startswith(START)):
                raise ValueError("the last line is not ours")
            rows = [json.loads(line) for line in (raw[:end] if broken else raw).splitlines()]
            self.keys = {row["id"]: row["key"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} holds something else than rows of `learnevict infer`; choose another --out"
            ) from error
        if broken:
            os.truncate(path, end)
        elif raw[end:]:
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def has(self, name: str, key: str) -> bool:
        """Whether this row is finished.

        Raises:
            UsageError: it is, but for another prompt or under other settings.
        """
        found = self.keys.get(name)
        if found is not None and found != key:
            raise UsageError(
                f"{self.path} holds row {name!r} for another prompt or under other settings; choose another --out to "
                "keep both"
            )
        return found is not None

    def add(self, row: dict[str, Any], key: str) -> None:
        """Write one row, for good."""
        line = json.dumps({**row, "key": key}, ensure_ascii=False)
        if self.path is None:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __str__(self) -> str:
        return "standard output" if self.path is None else str(self.path)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True


def say(line: str) -> None:
    """One line to the person, not to the pipe."""
    sys.stdout.flush()
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
