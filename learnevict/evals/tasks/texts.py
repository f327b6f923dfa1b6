"""Plain texts as a task: stretches of a file, whose every token is predicted under eviction (perplexity)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from learnevict.errors import DataError, UsageError
from learnevict.evals.tasks.task import TextBatch, fingerprint


@dataclass(frozen=True)
class TextTask:
    """Stretches of one text, `length` tokens each, one behind the other; the seed of a sample is its place.

    Attributes:
        name: what rows call it.
        ids: token ids of the whole text.
        length: tokens of a stretch.
        start: a token that every stretch begins with, such as the tokenizer's bos; None: none.
    """

    name: str
    ids: Int[Tensor, "T"]
    length: int
    start: int | None = None

    modes = ("teacher",)

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UsageError(f"a stretch has at least 2 tokens, not {self.length}")

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        read = fingerprint(map(str, self.ids.tolist()))
        return {"tasks": "texts 1", "text": read, "length": self.length, "start": self.start}

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns the tokens of a stretch."""
        return self.length

    def samples(self, seeds: Sequence[int]) -> list[Int[Tensor, "length"]]:
        """Returns stretches by their places.

        Raises:
            DataError: the text has fewer.
        """
        fresh = self.length - (self.start is not None)
        num = len(self.ids) // fresh
        if max(seeds) >= num:
            raise DataError(
                f"{self.name} has {num} stretches of {self.length} tokens, but number {max(seeds)} is asked for; use fewer "
                "--samples, a smaller --seed or --length, or a longer text"
            )
        lead = self.ids.new_tensor([] if self.start is None else [self.start])
        return [torch.cat([lead, self.ids[seed * fresh : (seed + 1) * fresh]]) for seed in seeds]

    def reference(self, tokenizer: Any, samples: Sequence[Int[Tensor, "length"]]) -> TextBatch:
        """Returns the stretches; every token but the first is predicted, checked and counts."""
        ids = torch.stack(list(samples))
        predicted = torch.ones_like(ids, dtype=torch.bool)
        predicted[:, 0] = False
        return TextBatch(ids, torch.ones_like(ids), predicted, predicted, [1] * len(ids))
