"""Paths in what is shared: absolute ones are reduced to their last part, so that no folder of a machine is published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ABSOLUTE = r"(?:file://)?(?:~[\w.-]*[/\\]|[A-Za-z]:[/\\]|/|\\\\)"
"""How a path from a root or a home begins, on any system."""
WHOLE = re.compile(ABSOLUTE)
WITHIN = re.compile(
    r"(?P<link>\b(?!file:)[A-Za-z][\w+.-]+://\S*)"
    rf"|(?P<quote>['\"`])(?P<quoted>{ABSOLUTE}[^'\"`\n]*)(?P=quote)"
    rf"|(?<![\w.~/\\<-])(?P<bare>{ABSOLUTE}[^\s'\"`,;:()<>|/\\]+[/\\][^\s'\"`,;:()<>|]*)"
)
"""Paths in a text: between quotes, or bare and of two parts at least ("/INST" is none); links are passed over."""


def without_folders(value: Any) -> Any:
    """Returns JSON with every absolute path in it reduced to its last part; links, Hub ids and relative paths stay."""
    if isinstance(value, Mapping):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    return last_part(value) if WHOLE.match(value) else WITHIN.sub(_reduced, value)


def last_part(path: str) -> str:
    """Returns the last part of a path of any system; a bare root as it is."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def _reduced(found: re.Match[str]) -> str:
    if found["link"]:
        return found["link"]
    quote = found["quote"] or ""
    return quote + last_part(found["quoted"] or found["bare"]) + quote
