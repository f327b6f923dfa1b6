"""An endless stream of documents, read as they are needed, whose position a checkpoint saves."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from learnevict.data.documents import Cutter
from learnevict.data.label_store import Document
from learnevict.data.sources import Source, open_rows
from learnevict.errors import DataError, LearnevictWarning


class Stream(IterableDataset):
    """All documents of a source in their order, again and again, dealt to the processes in turn.

    Every process reads everything and keeps its own, so that the position is the same in all of them.

    Args:
        source: where from.
        tokenizer: of the base model.
        skip: documents at the beginning that are held out.
        shortest: documents with fewer tokens are left out.
        rank, num_ranks: which process this is, of how many.

    Attributes:
        digest: sha256 over the token ids of all documents dealt so far, as hexadecimal.
    """

    def __init__(
        self, source: Source, tokenizer: Any, skip: int = 0, shortest: int = 1, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.source, self.tokenizer, self.skip, self.shortest = source, tokenizer, skip, shortest
        self.rank, self.num_ranks = rank, num_ranks
        self.digest, self.index, self.bad_before, self.warned = "", 0, 0, set[str]()
        self.cutter = Cutter(source, tokenizer)

    @property
    def num_bad(self) -> int:
        """Rows that could not be read and were left out, in all passes."""
        return self.bad_before + self.cutter.num_bad

    def __iter__(self) -> Iterator[Document]:
        documents = self._documents()
        while True:
            group = list(islice(documents, self.num_ranks))
            for document in group:
                ids = torch.tensor(document.input_ids, dtype=torch.int32).numpy().tobytes()
                self.digest = hashlib.sha256(self.digest.encode() + ids).hexdigest()
            yield group[self.rank]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position behind the last document, as JSON."""
        rows = None if self.cutter.rows is None else self.cutter.rows.state_dict()
        position = {"rows": rows, "left": self.cutter.left, "number": self.cutter.number, "index": self.index}
        return {**position, "digest": self.digest, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind that document."""
        cutter = self.cutter = Cutter(self.source, self.tokenizer)
        if state["rows"] is not None:
            cutter.rows = open_rows(self.source)
            cutter.rows.load_state_dict(state["rows"])
        cutter.left, cutter.number = list(state["left"]), state["number"]
        cutter.num_good = state["index"] + len(cutter.left)
        self.index, self.digest, self.bad_before = state["index"], state["digest"], state["num_bad"]

    def _documents(self) -> Iterator[Document]:
        """Yields the documents of all passes that are neither held out nor too short."""
        any_found = self.index > self.skip
        while True:
            for document in self.cutter:
                self._warn()
                self.index += 1
                if self.index > self.skip and len(document.input_ids) >= self.shortest:
                    any_found = True
                    yield document
            self.cutter.check()
            self._warn()
            if not any_found:
                raise DataError(
                    f"{self.source.name!r} has no document of at least {self.shortest} tokens behind the {self.skip} that "
                    "are held out; lower --eval_documents, the period or the smallest budget"
                )
            self.bad_before, self.index = self.num_bad, 0
            self.cutter = Cutter(self.source, self.tokenizer)

    def _warn(self) -> None:
        cutter, most = self.cutter, self.source.max_length
        for found, message in (
            (cutter.num_bad, f"rows that cannot be read are left out, such as this: {cutter.problem}"),
            (
                cutter.num_cut,
                f"chats and prompts with answers are cut off at {most} tokens, such as row {cutter.number}",
            ),
        ):
            if found and message[:4] not in self.warned:
                self.warned.add(message[:4])
                warnings.warn(message, LearnevictWarning, stacklevel=3)
