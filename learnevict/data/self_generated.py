"""The model's own words in place of the answers of the data: what it says to each prompt, greedily and with a full cache.

Judge Q (arXiv 2509.10798) and LookaheadKV (arXiv 2603.10899) learn from such answers; any mode can.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import gather_object
from rich.progress import track
from transformers import PreTrainedModel

from learnevict.data.label_store import Document
from learnevict.errors import DataError, LearnevictWarning, UsageError
from learnevict.infer.generate import generate


@dataclass(frozen=True)
class SelfGeneration:
    """How answers are written.

    Attributes:
        most: tokens of an answer at most; 0: as many as the longest given one.
        max_length: tokens of a prompt and its answer at most.
        batch_size: prompts at a time, padded on the left.
        rank, num_ranks: which process this is, of how many that share the prompts.
        shown: whether the first one shows a bar.
    """

    most: int = 0
    max_length: int = 4096
    batch_size: int = 8
    rank: int = 0
    num_ranks: int = 1
    shown: bool = False

    def __post_init__(self) -> None:
        if self.most < 0 or self.batch_size < 1:
            raise UsageError(
                f"answers of at most {self.most} tokens, {self.batch_size} at a time: give 0 tokens or more, and at least 1"
            )

    def longest(self, documents: list[Document]) -> int:
        """Tokens of an answer at most; 0 where nothing says so."""
        given = (len(one.input_ids) - one.prompt_length for one in documents if one.prompt_length)
        return self.most or max(given, default=0)


def answer(base: PreTrainedModel, tokenizer: Any, documents: list[Document], how: SelfGeneration) -> list[Document]:
    """The same prompts with the model's answers, in order; who shares the work does not matter.

    Args:
        base: the model; it ends an answer as it does in `learnevict infer`.
        tokenizer: its own.
        documents: a prompt may be all there is; those without one, or with one that leaves no room, are left out.
        how: long, and how many at a time.

    Raises:
        DataError: no document has a prompt.
        UsageError: nothing says how long an answer may get.
    """
    asked = [one for one in documents if 0 < one.prompt_length < how.max_length]
    if not asked:
        raise DataError(
            f"no document has a prompt of fewer than {how.max_length} tokens to answer: give chats, or a column prompt, "
            "without --packed"
        )
    if len(asked) < len(documents):
        left = len(documents) - len(asked)
        warnings.warn(f"{left} of {len(documents)} texts have no prompt to answer: left out", LearnevictWarning, 2)
    most = how.longest(asked)
    if not most:
        raise UsageError(
            "the data hold prompts alone, so nothing says how long an answer may get; give --answer_tokens, 512 for instance"
        )
    mine = [pair for part in _share(asked, how) for pair in _answer(base, tokenizer, asked, part, most)]
    said: dict[int, list[int]] = dict(gather_object(mine) if how.num_ranks > 1 else mine)
    return [_continued(one, said[index], how.max_length) for index, one in enumerate(asked)]


def _share(documents: list[Document], how: SelfGeneration) -> Iterator[list[int]]:
    """Indices of the batches that fall to this process; prompts of like lengths go together."""
    order = sorted(range(len(documents)), key=lambda index: documents[index].prompt_length)
    batches = [order[start : start + how.batch_size] for start in range(0, len(order), how.batch_size)]
    mine = batches[how.rank :: how.num_ranks]
    yield from track(mine, "answering", disable=not how.shown or how.rank > 0)


def _answer(
    base: PreTrainedModel, tokenizer: Any, documents: list[Document], part: list[int], most: int
) -> list[tuple[int, list[int]]]:
    prompts: list[str | list[int]] = [documents[index].input_ids[: documents[index].prompt_length] for index in part]
    found = generate(base, tokenizer, None, prompts, batch_size=len(part), max_new_tokens=most)
    return [(index, one.tokens) for index, one in zip(part, found, strict=True)]


def _continued(document: Document, said: list[int], max_length: int) -> Document:
    ids = document.input_ids[: document.prompt_length] + said
    return replace(document, input_ids=ids[:max_length], labels=None)
