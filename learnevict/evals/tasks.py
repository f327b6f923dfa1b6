"""What a model is asked: a task yields samples, says what is read of them, and scores answers.

The suite, its log, resume and reports know a task by the protocol `Task` alone. The testbed's families are such tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from learnevict import testbed
from learnevict.config import Budget
from learnevict.errors import UsageError
from learnevict.infer.generate import read_text
from learnevict.oracle.reference import align
from learnevict.testbed import Sample

NUM_MEASURED = 200


@dataclass(frozen=True)
class TextBatch:
    """Reference texts, padded on the left (see `aligned` for an exception).

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 0 = padding.
        answer_mask: tokens that decide whether an answer is right.
        loss_mask: tokens of the response, whose loss is measured.
        prompt_length: real tokens of each prompt.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    answer_mask: Bool[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    prompt_length: list[int]

    def to(self, device: Any) -> TextBatch:
        """Returns the same on a device."""
        parts = (self.input_ids, self.attention_mask, self.answer_mask, self.loss_mask)
        return TextBatch(*(part.to(device) for part in parts), prompt_length=self.prompt_length)

    def aligned(self, block: int) -> TextBatch:
        """Returns the same, padded on the left by multiples of a block and on the right by the rest: events fall together."""
        parts = (self.input_ids, self.attention_mask, self.answer_mask, self.loss_mask)
        return TextBatch(*align(block, self.attention_mask, *parts), prompt_length=self.prompt_length)


class Task(Protocol):
    """Samples of one kind, and what a right answer to one of them is."""

    @property
    def name(self) -> str:
        """What rows and the log call it: their family."""
        ...

    @property
    def modes(self) -> tuple[str, ...]:
        """How it can be measured: "teacher" along a reference text, "free" by scoring the model's own answer."""
        ...

    @property
    def origin(self) -> dict[str, Any]:
        """Everything but the seed that makes its samples what they are; the tasks of one log have it in common."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The longest answer that is waited for."""
        ...

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns mean tokens of a sample, with or without its prompt: what a budget such as "1/4" is a share of."""
        ...

    def samples(self, seeds: Sequence[int]) -> Sequence[Any]:
        """Returns the samples of these seeds; only the task itself looks into them."""
        ...

    def prompt(self, tokenizer: Any, sample: Any) -> list[int]:
        """Returns the token ids after which the model answers."""
        ...

    def reference(self, tokenizer: Any, samples: Sequence[Any]) -> TextBatch:
        """Returns prompts with their reference answers, for the mode "teacher"."""
        ...

    def score(self, sample: Any, answer: str) -> float:
        """Returns 1 for a right answer and 0 for a wrong one, or a share of it, for the mode "free"."""
        ...


@dataclass(frozen=True)
class FamilyTask:
    """One family of the testbed; see testbed.generate for split and length."""

    name: str
    split: str = "test"
    length: str = "normal"

    modes = ("teacher", "free")

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        return {"tasks": _fingerprint(), "split": self.split, "length": self.length}

    @property
    def max_new_tokens(self) -> int:
        """Returns twice the longest reference answer of the first 200 validation samples."""
        return 2 * max(response for _, response in _lengths(self.name, self.length))

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns the mean over the first 200 validation samples."""
        found = _lengths(self.name, self.length)
        return sum(prompt * before + response for before, response in found) / len(found)

    def samples(self, seeds: Sequence[int]) -> list[Sample]:
        """See Task."""
        return [testbed.generate(self.name, seed, split=self.split, length=self.length) for seed in seeds]

    def prompt(self, tokenizer: Any, sample: Sample) -> list[int]:
        """See Task."""
        return read_text(tokenizer, sample.prompt)

    def reference(self, tokenizer: Any, samples: Sequence[Sample]) -> TextBatch:
        """See Task."""
        return read(tokenizer, samples)

    def score(self, sample: Sample, answer: str) -> float:
        """See Task."""
        return float(testbed.verify(sample, answer))


def family_tasks(
    families: Sequence[str] = testbed.FAMILIES, *, split: str = "test", length: str = "normal"
) -> tuple[FamilyTask, ...]:
    """Returns the tasks of some families.

    Raises:
        UsageError: families that do not exist, or are named twice.
    """
    unknown = [family for family in families if family not in testbed.FAMILIES]
    if unknown or not families:
        given = ", ".join(unknown) or "none given"
        raise UsageError(f"no such task family: {given}; choose {', '.join(testbed.FAMILIES)}")
    if len(set(families)) < len(families):
        raise UsageError(
            f"families {', '.join(families)}: give each only once, for each has the same samples every time"
        )
    return tuple(FamilyTask(family, split, length) for family in families)


def read(tokenizer: Any, samples: Sequence[Sample]) -> TextBatch:
    """Tokenises samples of the testbed, one token a word."""
    texts = tokenizer([sample.text for sample in samples], padding=True, padding_side="left", return_tensors="pt")
    ids, mask = texts["input_ids"], texts["attention_mask"]
    answer_mask, loss_mask = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    prompts = [len(sample.prompt.split()) for sample in samples]
    for row, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        marks = torch.tensor(sample.answer_mask)
        assert int(mask[row].sum()) == len(marks), "the tokenizer does not make one token a word"
        answer_mask[row, -len(marks) :] = marks
        loss_mask[row, prompt - len(marks) :] = True
    return TextBatch(ids, mask, answer_mask, loss_mask, prompts)


_fingerprint = cache(testbed.fingerprint)


@cache
def _lengths(family: str, length: str) -> list[tuple[int, int]]:
    """Returns words of prompt and of response of the samples that lengths are measured on."""
    samples = FamilyTask(family, "validation", length).samples(range(NUM_MEASURED))
    return [(len(sample.prompt.split()), len(sample.response.split())) for sample in samples]


def is_share(text: str) -> bool:
    """Returns whether a budget is a share such as "1/4"."""
    return "/" in text


def resolve(text: str, whole: Callable[[], float]) -> int | str:
    """Returns tokens for "1/4" (of what `whole` returns) and "64"; per cent and bytes are left to the cache.

    Raises:
        BudgetError: not understood, or a share above 1.
    """
    budget = Budget.parse(text)
    if not is_share(text):
        return int(budget.amount) if budget.unit == "tokens" else text
    above, below = map(float, text.split("/"))
    return round(whole() * above / below)
