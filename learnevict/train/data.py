"""Documents to learn from: what a user names becomes rows, rows become token ids, ids become batches.

    Source("texts.jsonl")  Source("folder")  Source("user/data", split="train")     text, prompt + completion, or chats

A chat goes through the tokenizer's template; its prompt is everything before the last turn of the assistant. Nothing is
downloaded unless a dataset of the Hub is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from learnevict.errors import DataError
from learnevict.train.labels import Document
from learnevict.train.sources import Source, is_file, open_rows

RESPONSES = ("completion", "response")
KNOWN = "text", "messages", "prompt", "prompt + completion"


@dataclass(frozen=True)
class Encoder:
    """Rows as token ids.

    Attributes:
        tokenizer: of the base model.
        max_length: longer documents are cut.
        column: where the text or the chat is; None: "text", "messages", or "prompt" and perhaps "completion".
    """

    tokenizer: Any
    max_length: int
    column: str | None = None

    def encode(self, row: dict[str, Any], where: str) -> tuple[list[int], int]:
        """Token ids and the length of the prompt, 0 where there is none.

        Args:
            row: of the source.
            where: it stands, for errors.

        Raises:
            DataError: the row has no text, or a chat that the template refuses.
        """
        content = row.get(self.column) if self.column else row.get("text") or row.get("messages")
        if isinstance(content, list):
            return self._chat(content, where)
        if isinstance(content, str):
            return self._text(content), 0
        prompt = None if self.column else row.get("prompt")
        response = next((row[name] for name in RESPONSES if row.get(name)), None)
        if prompt and isinstance(prompt, list) and isinstance(response, list | None):
            return self._chat([*prompt, *(response or [])], where, answered=response is not None)
        if prompt and isinstance(prompt, str) and isinstance(response, str | None):
            ids = self._text(prompt)
            return (ids + self._ids(response or ""))[: self.max_length], len(ids)
        wanted = f"column {self.column!r}" if self.column else f"text: it needs {' or '.join(KNOWN)}"
        raise DataError(f"{where} has no {wanted}; its columns are {', '.join(row)}; name one with --column")

    def _text(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer adds, as in inference."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])[: self.max_length]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _chat(self, messages: list[dict[str, Any]], where: str, *, answered: bool = True) -> tuple[list[int], int]:
        """Up to its last answer; without one, or if it is not `answered`, all of it is a prompt."""
        if not self.tokenizer.chat_template:
            raise DataError(f"{where} is a chat, but this model's tokenizer has no chat template; give plain text")
        answers = [i for i, turn in enumerate(messages) if turn.get("role") == "assistant"] if answered else []
        try:
            asked = self._prompt(messages[: answers[-1]] if answers else messages)
            full = self.tokenizer.apply_chat_template(messages[: answers[-1] + 1], tokenize=False) if answers else asked
        except Exception as error:  # templates raise what they like
            raise DataError(f"the chat template refuses {where}: {error}") from error
        ids = self._ids(full)
        prompt = _shared(ids, self._ids(asked))
        return ids[: self.max_length], min(prompt, self.max_length)

    def _prompt(self, messages: list[dict[str, Any]]) -> str:
        return (
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if messages else ""
        )


class Cutter:
    """Rows become documents: one each, or, packed, pieces of `max_length` from all of them in a row.

    Attributes:
        left: ids not cut yet; the state of a packed stream.
    """

    def __init__(self, source: Source, tokenizer: Any) -> None:
        self.encoder = Encoder(tokenizer, 10**12 if source.packed else source.max_length, source.column)
        self.source, self.left = source, list[int]()
        end = getattr(tokenizer, "eos_token_id", None)
        self.end = [] if end is None else [end]

    def feed(self, row: dict[str, Any], number: int) -> Iterator[Document]:
        """Documents that are ready once this row is known; `number` counts rows from 1."""
        name = Path(self.source.name).name
        ids, prompt = self.encoder.encode(row, f"row {number} of {self.source.name!r}")
        if not self.source.packed:
            if ids:
                yield Document(ids, prompt, name, number - 1)
            return
        self.left += ids if ids[-1:] == self.end else ids + self.end
        yield from self.drain(number)

    def drain(self, number: int) -> Iterator[Document]:
        """Packed documents that are ready already."""
        size = self.source.max_length
        while self.source.packed and len(self.left) >= size:
            piece, self.left = self.left[:size], self.left[size:]
            yield Document(piece, 0, Path(self.source.name).name, number - 1)


def read_documents(source: Source, tokenizer: Any, limit: int, skip: int = 0) -> tuple[list[Document], list[Document]]:
    """Up to `limit` documents, and the `skip` before them, held out.

    Raises:
        DataError: the source cannot be read, holds no text, or fewer documents than are to be held out.
    """
    cutter = Cutter(source, tokenizer)
    rows: Iterable[dict[str, Any]] = read_file(Path(source.name)) if is_file(source) else open_rows(source)
    made = (one for number, row in enumerate(rows, 1) for one in cutter.feed(row, number))
    found = list(islice(made, skip + limit))
    if len(found) <= skip:
        packed = f" of {source.max_length} tokens" if source.packed else ""
        held = f", and {skip} are held out for evaluation" if skip else ""
        raise DataError(
            f"{source.name!r} holds {'no text' if not found else f'only {len(found)} documents'}{packed}{held}; give more "
            "text, or a smaller --max_length or --eval_documents"
        )
    return found[skip:], found[:skip]


def read_texts(path: Path, tokenizer: Any, limit: int, max_length: int) -> list[Document]:
    """Documents of a .txt file (one) or a .jsonl file (one a line).

    Raises:
        DataError: missing, empty, not UTF-8, not JSON, or a row without text.
    """
    return read_documents(Source(str(path), max_length=max_length), tokenizer, limit)[0]


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .txt file (one) or a .jsonl file; empty lines count as no row.

    Raises:
        DataError: missing, not UTF-8 or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        yield {"text": text}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _row(line, f"line {number} of {str(path)!r}")


class Collator:
    """Left-pads documents; labels, if stored, become one tensor per layer."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, documents: list[Document]) -> dict[str, Any]:
        """input_ids and attention_mask [B, T], prompt_length [B], stored_labels [L, B, H, T, M] or None."""
        width = max(len(d.input_ids) for d in documents)
        ids = torch.full((len(documents), width), self.pad)
        mask = torch.zeros(len(documents), width, dtype=torch.long)
        blocks = max((d.labels.shape[-1] for d in documents if d.labels is not None), default=0)
        first = documents[0].labels
        labels = None if first is None else torch.zeros(first.shape[0], len(documents), first.shape[1], width, blocks)
        for row, document in enumerate(documents):
            size = len(document.input_ids)
            ids[row, width - size :] = torch.tensor(document.input_ids)
            mask[row, width - size :] = 1
            if labels is not None and document.labels is not None:
                labels[:, row, :, width - size :, : document.labels.shape[-1]] = document.labels.float()
        prompts = torch.tensor([d.prompt_length for d in documents])
        return {"input_ids": ids, "attention_mask": mask, "prompt_length": prompts, "stored_labels": labels}


def long_enough(documents: list[Document], shortest: int) -> list[Document]:
    """Documents of at least so many tokens.

    Raises:
        DataError: there is none.
    """
    kept = [document for document in documents if len(document.input_ids) >= shortest]
    if not kept:
        raise DataError(
            f"no text has the {shortest} tokens that the smallest training budget and the period ask for; lower them"
        )
    return kept


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}") from error
    if not isinstance(row, dict):
        raise DataError(f'{where} is not an object of JSON; write {{"text": ...}} or {{"messages": [...]}}')
    return row


def _shared(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
