"""Documents to learn from, out of a local file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learnevict.errors import DataError
from learnevict.train.labels import Document


def read_texts(path: Path, tokenizer: Any, limit: int, max_length: int) -> list[Document]:
    """Documents of a .txt file (one) or a .jsonl file ({"text": ...} or {"messages": [...]} per line).

    Raises:
        DataError: missing, empty, not UTF-8, not JSON, or a row without text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error
    texts = (
        [text]
        if path.suffix != ".jsonl"
        else [
            _text_of(line, number, path, tokenizer) for number, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    )
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"][:max_length] for part in texts[:limit]]
    documents = [Document(part, 0, path.name, number) for number, part in enumerate(ids) if part]
    if not documents:
        raise DataError(f"{str(path)!r} holds no text")
    return documents


def _text_of(line: str, number: int, path: Path, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"line {number} of {str(path)!r} is not JSON: {error.msg}") from error
    if isinstance(row, dict) and row.get("text"):
        return str(row["text"])
    if isinstance(row, dict) and row.get("messages"):
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    raise DataError(f'line {number} of {str(path)!r} has neither "text" nor "messages"')
