"""The testbed's families as tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from learnevict import testbed
from learnevict.errors import UsageError
from learnevict.evals.tasks.task import TextBatch
from learnevict.infer.generate import read_text
from learnevict.testbed import Sample

NUM_MEASURED = 200


@dataclass(frozen=True)
class FamilyTask:
    """One family of the testbed; see testbed.generate for split and length."""

    name: str
    split: str = "test"
    length: str = "normal"

    modes = ("teacher", "free")
    graded = False

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
