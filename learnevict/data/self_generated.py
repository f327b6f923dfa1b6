"""Self-generated data: the model's own answers in place of those of the data, greedy and with a full cache.

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
    """Settings of self-generated answers.

    Attributes:
        max_tokens: of an answer; 0: as many as the longest given one.
        max_length: tokens of a prompt and its answer at most.
        batch_size: prompts at a time, padded on the left.
        rank, num_ranks: which process this is, of how many that share the prompts.
        progress: whether the first one shows a bar.
    """

    max_tokens: int = 0
    max_length: int = 4096
    batch_size: int = 8
    rank: int = 0
    num_ranks: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or self.batch_size < 1:
            raise UsageError(
                f"answers of at most {self.max_tokens} tokens, {self.batch_size} at a time: give 0 tokens or more, at least 1"
            )

    def longest(self, documents: list[Document]) -> int:
        """Returns the limit of an answer, in tokens; 0 where nothing gives one."""
        given = (len(one.input_ids) - one.prompt_length for one in documents if one.prompt_length)
        return self.max_tokens or max(given, default=0)


def generate_answers(
    base: PreTrainedModel, tokenizer: Any, documents: list[Document], settings: SelfGeneration
) -> list[Document]:
    """Returns the same prompts with the model's answers, in order, whatever the number of processes.

    Args:
        base: the model; it ends an answer as it does in `learnevict infer`.
        tokenizer: its own.
        documents: a prompt may be all there is; those without one, or with one that leaves no room, are left out.
        settings: how long, and how many at a time.

    Raises:
        DataError: no document has a prompt.
        UsageError: no limit of the answers is given.
    """
    prompted = [one for one in documents if 0 < one.prompt_length < settings.max_length]
    if not prompted:
        raise DataError(
            f"no document has a prompt of fewer than {settings.max_length} tokens to answer: give chats, or a column prompt, "
            "without --packed"
        )
    if len(prompted) < len(documents):
        left = len(documents) - len(prompted)
        warnings.warn(f"{left} of {len(documents)} texts have no prompt to answer: left out", LearnevictWarning, 2)
    max_tokens = settings.longest(prompted)
    if not max_tokens:
        raise UsageError(
            "the data hold prompts alone, so nothing says how long an answer may get; give --answer_tokens, 512 for instance"
        )
    mine = [
        pair for part in _share(prompted, settings) for pair in _answer(base, tokenizer, prompted, part, max_tokens)
    ]
    answers: dict[int, list[int]] = dict(gather_object(mine) if settings.num_ranks > 1 else mine)
    return [_continued(one, answers[index], settings.max_length) for index, one in enumerate(prompted)]


def _share(documents: list[Document], settings: SelfGeneration) -> Iterator[list[int]]:
    """Yields the indices of the batches of this process; prompts of like lengths go together."""
    order = sorted(range(len(documents)), key=lambda index: documents[index].prompt_length)
    batches = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
    mine = batches[settings.rank :: settings.num_ranks]
    yield from track(mine, "answering", disable=not settings.progress or settings.rank > 0)


def _answer(
    base: PreTrainedModel, tokenizer: Any, documents: list[Document], part: list[int], max_tokens: int
) -> list[tuple[int, list[int]]]:
    prompts: list[str | list[int]] = [documents[index].input_ids[: documents[index].prompt_length] for index in part]
    found = generate(base, tokenizer, None, prompts, batch_size=len(part), max_new_tokens=max_tokens)
    return [(index, one.tokens) for index, one in zip(part, found, strict=True)]


def _continued(document: Document, answer: list[int], max_length: int) -> Document:
    ids = document.input_ids[: document.prompt_length] + answer
    return replace(document, input_ids=ids[:max_length], labels=None)
