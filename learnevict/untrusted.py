"""Text that other people wrote, made harmless for the place where it is shown: a terminal, Markdown or a spreadsheet."""

from __future__ import annotations

import re
from typing import Any

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours, deletes or reorders text, and what UTF-8 cannot hold; tabs and newlines are text."""
FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")
"""How a cell begins that spreadsheets calculate."""


def printable(text: str) -> str:
    """Returns text for a terminal, control characters and overrides of the writing direction written out as \\uXXXX.

    JSON stays the same JSON.
    """
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(value: object) -> str:
    """Returns text that stays text in a line, cell, link or code span of Markdown: no HTML, link, column or line break."""
    text = printable(" ".join(str(value).split()))
    return text.translate(str.maketrans("|`<>", "/'‹›")).replace("](", "] (")


def spreadsheet_cell(value: Any) -> Any:
    """Returns a text that no spreadsheet takes for a formula; numbers as they are."""
    if not isinstance(value, str):
        return value
    return "'" * bool(FORMULA.match(value)) + printable(value)
