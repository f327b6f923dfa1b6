"""Plain texts as a task: stretches of files, whose every token is predicted under eviction (perplexity)."""

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
    """Stretches of texts, `length` tokens each: the first of every text, then the second ones; a sample's seed is its place.

    Up to as many samples as there are texts, intervals are over texts.

    Attributes:
        name: what rows call it.
        texts: token ids of each text.
        length: tokens of a stretch.
        start: a token that every stretch begins with, such as the tokenizer's bos; None: none.
    """

    name: str
    texts: tuple[Int[Tensor, "_"], ...]
    length: int
    start: int | None = None

    modes = ("teacher",)

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UsageError(f"a stretch has at least 2 tokens, not {self.length}")

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        read = fingerprint(str(token) for text in self.texts for token in text.tolist())
        return {"tasks": "texts 1", "text": read, "length": self.length, "start": self.start}

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns the tokens of a stretch."""
        return self.length

    def samples(self, seeds: Sequence[int]) -> list[Int[Tensor, "length"]]:
        """Returns stretches by their places.

        Raises:
            DataError: the texts have fewer.
        """
        fresh = self.length - (self.start is not None)
        places = sorted((place, text) for text, ids in enumerate(self.texts) for place in range(len(ids) // fresh))
        if max(seeds) >= len(places):
            raise DataError(
                f"{self.name} has {len(places)} stretches of {self.length} tokens, but number {max(seeds)} is asked for; use "
                "fewer --samples, a smaller --seed or --length, or a longer text"
            )
        lead = torch.tensor([] if self.start is None else [self.start], dtype=torch.int64)
        chosen = [places[seed] for seed in seeds]
        return [torch.cat([lead, self.texts[text][place * fresh : (place + 1) * fresh]]) for place, text in chosen]

    def reference(self, tokenizer: Any, samples: Sequence[Int[Tensor, "length"]]) -> TextBatch:
        """Returns the stretches; every token but the first is predicted, checked and counts."""
        ids = torch.stack(list(samples))
        predicted = torch.ones_like(ids, dtype=torch.bool)
        predicted[:, 0] = False
        return TextBatch(ids, torch.ones_like(ids), predicted, predicted, [1] * len(ids))
