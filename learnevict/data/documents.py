"""Documents for training: a source becomes rows, rows become token ids, ids become batches.

    Source("texts.jsonl")  Source("folder")  Source("user/data", split="train")     text, prompt + completion, or chats

A chat goes through the tokenizer's template; its prompt is everything before the last turn of the assistant. Nothing is
downloaded unless a dataset of the Hub is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from learnevict.data.label_store import Document
from learnevict.data.sources import Source, open_rows
from learnevict.errors import DataError, LearnevictWarning
from learnevict.infer.prompts import CHATS, as_messages, checked, parse_row, warn_of_tools

RESPONSES = ("completion", "response")
KNOWN = "text", *CHATS[:2], "prompt", "or prompt and completion"
MOST_BAD = 1000
"""So many bad rows at the beginning of a source, and no good one, end the reading."""


@dataclass(frozen=True)
class Encoder:
    """Turns rows into token ids, of any length.

    Attributes:
        tokenizer: of the base model.
        column: where the text or the chat is; None: "text", "messages", "conversations", or "prompt" and perhaps
            "completion".
    """

    tokenizer: Any
    column: str | None = None

    def encode(self, row: Any, where: str) -> tuple[list[int], int]:
        """Returns token ids and the length of the prompt, 0 where there is none.

        Args:
            row: of the source, a line of JSON, or a DataError that says why there is none.
            where: where it stands, for the DataError if it has no text, or a chat that the template refuses.
        """
        if isinstance(row, DataError):
            raise row
        try:
            ids, prompt = self._row(parse_row(row) if isinstance(row, bytes | str) else row)
        except DataError as error:
            raise DataError(f"{where} {error}") from error
        if not ids:
            raise DataError(f"{where} has no text that the tokenizer has tokens for")
        return ids, prompt

    def _row(self, row: Any) -> tuple[list[int], int]:
        if not isinstance(row, dict):
            raise DataError('is no object; write {"text": ...} or {"messages": [...]}')
        names = (self.column,) if self.column else ("text", *CHATS)
        content = next((row[name] for name in names if row.get(name)), None)
        if isinstance(content, list):
            return self._chat(as_messages(content))
        if isinstance(content, str) and content.strip():
            return self._text(content), 0
        prompt = None if self.column else row.get("prompt")
        response = next((row[name] for name in RESPONSES if row.get(name)), None)
        if prompt and isinstance(prompt, list) and isinstance(response, list | None):
            return self._chat(as_messages([*prompt, *(response or [])]), answered=response is not None)
        if prompt and isinstance(prompt, str) and isinstance(response, str | None):
            ids = self._text(prompt)
            return ids + self._ids(response or ""), len(ids)
        wanted = (
            f"column {self.column!r} with text"
            if self.column
            else f"text: it needs {', '.join(KNOWN)} that is not empty"
        )
        raise DataError(f"has no {wanted}; its columns are {', '.join(map(str, row))}; name one with --column")

    def _text(self, text: str) -> list[int]:
        """Returns ids with the special tokens that the tokenizer adds, as in inference."""
        return list(self.tokenizer(checked(text), verbose=False)["input_ids"])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(checked(text), add_special_tokens=False, verbose=False)["input_ids"])

    def _chat(self, messages: list[dict[str, Any]], *, answered: bool = True) -> tuple[list[int], int]:
        """Reads a chat up to its last answer; without one, or if it is not `answered`, all of it is a prompt."""
        if not self.tokenizer.chat_template:
            raise DataError("is a chat, but this model's tokenizer has no chat template; give plain text")
        warn_of_tools(messages, self.tokenizer)
        answers = [i for i, turn in enumerate(messages) if turn.get("role") == "assistant"] if answered else []
        template = self.tokenizer.apply_chat_template
        before = messages[: answers[-1]] if answers else messages
        try:
            prompt = template(before, tokenize=False, add_generation_prompt=True) if before else ""
            full = template(messages[: answers[-1] + 1], tokenize=False) if answers else prompt
        except Exception as error:  # templates raise what they like
            raise DataError(f"is a chat that the chat template refuses: {error}") from error
        ids, prompt_ids = self._ids(full), self._ids(prompt)
        common = (i for i, (a, b) in enumerate(zip(ids, prompt_ids, strict=False)) if a != b)
        return ids, next(common, min(len(ids), len(prompt_ids)))


class Cutter:
    """Reads a source once: each row becomes a document or, packed, all of them in a row pieces of `max_length`.

    A longer text becomes several documents; a longer prompt with answer, or chat, is cut off.

    Attributes:
        rows: of the source, whose position can be saved; None: not opened yet.
        number: rows read so far.
        left: ids not cut yet, of a packed source or of a long text.
        num_cut: tokens of chats and prompts that were cut off.
        num_good: rows that could be read so far.
        num_bad: rows left out, because they could not be read.
        problem: of the first of these.
    """

    def __init__(self, source: Source, tokenizer: Any) -> None:
        self.encoder = Encoder(tokenizer, source.column)
        self.source, self.rows, self.number, self.left = source, None, 0, list[int]()
        self.num_cut, self.num_good, self.num_bad, self.problem = 0, 0, 0, ""
        end = getattr(tokenizer, "eos_token_id", None)
        self.end = [] if end is None else [end]

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents behind the position; bad rows are left out and counted, as long as there are good ones."""
        yield from self._pieces()
        if self.rows is None:
            self.rows = open_rows(self.source)
        for row in self.rows:
            self.number += 1
            if isinstance(row, bytes) and not row.strip():
                continue  # an empty line is no row
            try:
                ids, prompt = self.encoder.encode(row, f"row {self.number} of {self.source.name!r}")
            except DataError as error:
                self.num_bad, self.problem = self.num_bad + 1, self.problem or str(error)
                if self.num_bad >= MOST_BAD:
                    self.check()
                continue
            self.num_good += 1
            if self.source.packed:
                self.left += ids if ids[-1:] == self.end else ids + self.end
                yield from self._pieces()
            elif prompt:
                size = self.source.max_length
                self.num_cut += max(len(ids) - size, 0)
                yield self._document(ids[:size], min(prompt, size))
            else:
                self.left = ids
                yield from self._pieces()

    def _pieces(self) -> Iterator[Document]:
        """Yields the pieces of what is left; a packed source keeps the last one until it is full."""
        size = self.source.max_length
        while len(self.left) >= (size if self.source.packed else 1):
            piece, self.left = self.left[:size], self.left[size:]
            yield self._document(piece, 0)

    def _document(self, ids: list[int], prompt: int) -> Document:
        return Document(ids, prompt, Path(self.source.name).name, self.number - 1)

    def check(self) -> None:
        """Raises a DataError if all rows so far were bad."""
        if self.num_bad and not self.num_good:
            others = f" (and {self.num_bad - 1} others like it)" if self.num_bad > 1 else ""
            raise DataError(f"{self.problem}{others}")


def read_documents(source: Source, tokenizer: Any, limit: int, skip: int = 0) -> tuple[list[Document], list[Document]]:
    """Returns up to `limit` documents, and the `skip` before them, which are held out; a DataError if there are too few."""
    cutter = Cutter(source, tokenizer)
    found = list(islice(cutter, skip + limit))
    cutter.check()
    if cutter.num_bad:
        total = cutter.num_bad + cutter.num_good
        message = f"{cutter.num_bad} of {total} rows cannot be read: left out; the first: {cutter.problem}"
        warnings.warn(message, LearnevictWarning, stacklevel=2)
    if found and source.packed and cutter.left and len(found) < skip + limit:
        message = f"the last {len(cutter.left)} tokens fill no piece of --max_length {source.max_length}: left out"
        warnings.warn(message, LearnevictWarning, stacklevel=2)
    if cutter.num_cut:
        message = f"{cutter.num_cut:,} tokens of chats, or of prompts with answers, lie beyond --max_length {source.max_length}"
        warnings.warn(f"{message}: left out", LearnevictWarning, stacklevel=2)
    if len(found) <= skip:
        held = f"only {len(found)} documents" if found else "no text"
        held += f" of {source.max_length} tokens" if source.packed else ""
        held += f", and {skip} are held out for evaluation" if skip else ""
        raise DataError(f"{source.name!r} holds {held}; give more text, or a smaller --max_length or --eval_documents")
    return found[skip:], found[:skip]


class Collator:
    """Left-pads documents; labels and states, if stored, become one tensor per layer."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, documents: list[Document]) -> dict[str, Any]:
        """Returns input_ids and attention_mask [B, T], prompt_length [B]; of documents from a store also stored_labels
        [L, B, H, T, M] and stored_states float16 [L, B, T, E], otherwise None."""
        width = max(len(d.input_ids) for d in documents)
        ids = torch.full((len(documents), width), self.pad)
        mask = torch.zeros(len(documents), width, dtype=torch.long)
        blocks = max((d.labels.shape[-1] for d in documents if d.labels is not None), default=0)
        first, state = documents[0].labels, documents[0].states
        labels = None if first is None else torch.zeros(first.shape[0], len(documents), first.shape[1], width, blocks)
        shape = None if state is None else (state.shape[0], len(documents), width, state.shape[2])
        states = None if shape is None else torch.zeros(shape, dtype=torch.float16)
        for row, document in enumerate(documents):
            size = len(document.input_ids)
            ids[row, width - size :] = torch.tensor(document.input_ids)
            mask[row, width - size :] = 1
            if labels is not None and document.labels is not None:
                labels[:, row, :, width - size :, : document.labels.shape[-1]] = document.labels.float()
            if states is not None and document.states is not None:
                states[:, row, width - size :] = document.states
        prompts = torch.tensor([d.prompt_length for d in documents])
        return {
            "input_ids": ids, "attention_mask": mask, "prompt_length": prompts, "stored_labels": labels,
            "stored_states": states,
        }  # fmt: skip


def long_enough(documents: list[Document], shortest: int) -> list[Document]:
    """Returns the documents of at least so many tokens, and warns of the others; a DataError if there is none."""
    kept = [document for document in documents if len(document.input_ids) >= shortest]
    if not kept:
        raise DataError(
            f"no text has the {shortest} tokens that the smallest training budget and the period ask for; lower them"
        )
    if len(kept) < len(documents):
        tokens = [sum(len(one.input_ids) for one in some) for some in (documents, kept)]
        message = (
            f"{len(documents) - len(kept)} of {len(documents)} texts, {tokens[0] - tokens[1]:,} of {tokens[0]:,} tokens, have "
            f"fewer than {shortest}: left out"
        )
        warnings.warn(message, LearnevictWarning, stacklevel=2)
    return kept
