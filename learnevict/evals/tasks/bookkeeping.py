"""Bookkeeping cases in plain English as a task, for models that `recipes/adapt.py` has taught them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import UsageError
from learnevict.evals.tasks.task import TextBatch, joined
from learnevict.infer.generate import read_chat
from learnevict.testbed import entries
from learnevict.testbed.entries import Case

NUM_MEASURED = 50


@dataclass(frozen=True)
class BookkeepingTask:
    """One family of learnevict.testbed.entries, worked out freely and along the right response.

    Attributes:
        name: of the family.
        tokenizer: of the model, fast and with a chat template; mean lengths are measured with it.
        split: test or validation.
        max_new_tokens: the longest answer.

    Raises:
        UsageError: the tokenizer has no chat template, or cannot tell where its tokens lie in a text.
    """

    name: str
    tokenizer: Any
    split: str = "test"
    max_new_tokens: int = 320

    modes = ("teacher", "free")
    graded = False

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template or not self.tokenizer.is_fast:
            raise UsageError(f"{self.name} needs a model with a chat template and a fast tokenizer")

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        return {"tasks": "bookkeeping 1", "split": self.split, "limit": self.max_new_tokens}

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Returns tokens of prompt and response of the first 50 validation samples."""
        cases = [entries.generate(self.name, seed, split="validation") for seed in range(NUM_MEASURED)]
        return [(len(self.prompt(self.tokenizer, case)), len(_response(self.tokenizer, case)[0])) for case in cases]

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns the mean over the first 50 validation samples."""
        return sum(prompt * before + response for before, response in self.lengths) / len(self.lengths)

    def samples(self, seeds: Sequence[int]) -> list[Case]:
        """See Task."""
        return [entries.generate(self.name, seed, split=self.split) for seed in seeds]

    def prompt(self, tokenizer: Any, sample: Case) -> list[int]:
        """See Task."""
        return read_chat(tokenizer, [{"role": "user", "content": sample.prompt}])

    def reference(self, tokenizer: Any, samples: Sequence[Case]) -> TextBatch:
        """Returns prompts with right responses; tokens that take memory or arithmetic are the answer's."""
        responses = [_response(tokenizer, sample) for sample in samples]
        pairs = [(self.prompt(tokenizer, one), ids) for one, (ids, _) in zip(samples, responses, strict=True)]
        return joined(pairs, tokenizer.pad_token_id or 0, [checked for _, checked in responses])

    def score(self, sample: Case, answer: str) -> float:
        """See Task."""
        return float(entries.final_answer(answer) == sample.answer)


def _response(tokenizer: Any, case: Case) -> tuple[list[int], Tensor]:
    """Returns token ids of the response, and which of them overlap a checked place."""
    encoded = tokenizer(case.response, add_special_tokens=False, return_offsets_mapping=True)
    checked = [
        any(start < stop and first < end for start, end in case.checked) for first, stop in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), torch.tensor(checked)
