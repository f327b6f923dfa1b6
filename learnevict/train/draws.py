"""What a trainer draws for a batch: of its step and of a row's number in the batch of all processes, and of nothing else.

So it does not matter how many processes share a batch, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learnevict.ops.hashing import hashed, uniform


@dataclass(frozen=True)
class Draws:
    """Words that draws are hashed from (ops.hashing).

    Attributes:
        batch: int64 [], of the batch, the same in all processes.
        rows: int64 [B], of the rows that this process has.
    """

    batch: Int[Tensor, ""]
    rows: Int[Tensor, "B"]

    @classmethod
    def of(cls, batch: Int[Tensor, ""], numbers: Int[Tensor, "B"]) -> Draws:
        """Of a batch, and of rows by their numbers in it."""
        return cls(batch, hashed(batch, 1, numbers))

    @classmethod
    def anew(cls, rows: int, device: torch.device | None = None) -> Draws:
        """Of a batch by itself, from the global generator."""
        return cls.of(torch.randint(2**62, ()), torch.arange(rows, device=device))

    def budget(self, budgets: tuple[int, int]) -> int:
        """One for the batch, from the smallest to the largest, log-uniformly."""
        low, high = (math.log(budget) for budget in budgets)
        return round(math.exp(low + (high - low) * float(uniform(hashed(self.batch, 2)))))

    def per_row(self, *what: int) -> Float[Tensor, "B"]:
        """From [0, 1), for each row; another `what`, another draw."""
        return uniform(hashed(self.rows, *what))
