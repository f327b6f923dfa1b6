"""Documents without end, read as they are needed, from a position that a checkpoint holds."""

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
        num_bad: rows that could not be read and were left out, in all passes.
    """

    def __init__(
        self, source: Source, tokenizer: Any, skip: int = 0, shortest: int = 1, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.source, self.tokenizer, self.skip, self.shortest = source, tokenizer, skip, shortest
        self.rank, self.num_ranks = rank, num_ranks
        self.digest, self.num_bad, self.told = "", 0, False
        self._begin(None, Cutter(source, tokenizer), number=0, index=0)

    def __iter__(self) -> Iterator[Document]:
        documents = self._documents()
        while True:
            group = list(islice(documents, self.num_ranks))
            for document in group:
                ids = torch.tensor(document.input_ids, dtype=torch.int32).numpy().tobytes()
                self.digest = hashlib.sha256(self.digest.encode() + ids).hexdigest()
            yield group[self.rank]

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last document, as JSON."""
        rows = None if self.rows is None else self.rows.state_dict()
        return {
            "rows": rows,
            "left": self.cutter.left,
            "number": self.number,
            "index": self.index,
            "digest": self.digest,
            "num_bad": self.num_bad,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind that document."""
        rows = None if state["rows"] is None else open_rows(self.source)
        if rows is not None:
            rows.load_state_dict(state["rows"])
        cutter = Cutter(self.source, self.tokenizer)
        cutter.left = list(state["left"])
        cutter.num_good = state["index"] + len(cutter.left)
        self.digest, self.num_bad = state["digest"], state["num_bad"]
        self._begin(rows, cutter, state["number"], state["index"])

    def _begin(self, rows: Any, cutter: Cutter, number: int, index: int) -> None:
        """Rows of this pass (None: not opened yet), what is left of them, rows read and documents cut so far."""
        self.rows, self.cutter, self.number, self.index = rows, cutter, number, index

    def _documents(self) -> Iterator[Document]:
        """Pass after pass."""
        dealt = self.index > self.skip
        while True:
            for document in self._one_pass():
                self.index += 1
                if self.index > self.skip and len(document.input_ids) >= self.shortest:
                    dealt = True
                    yield document
            self.cutter.check()
            if not dealt:
                raise DataError(
                    f"{self.source.name!r} has no document of at least {self.shortest} tokens behind the {self.skip} that "
                    "are held out; lower --eval_documents, the period or the smallest budget"
                )
            self._begin(None, Cutter(self.source, self.tokenizer), number=0, index=0)

    def _one_pass(self) -> Iterator[Document]:
        """The rest of the rows."""
        yield from self.cutter.drain(self.number)
        if self.rows is None:
            self.rows = open_rows(self.source)
        for row in self.rows:
            self.number += 1
            before = self.cutter.num_bad
            yield from self.cutter.feed(row, self.number)
            self.num_bad += self.cutter.num_bad - before
            if self.cutter.num_bad and self.cutter.num_good and not self.told:
                self.told = True
                said = f"rows that cannot be read are left out, such as this: {self.cutter.problem}"
                warnings.warn(said, LearnevictWarning, stacklevel=2)
