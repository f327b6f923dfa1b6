"""Random numbers of a batch that depend on its step and on a row's number in the batch of all processes, and on nothing else.

So it does not matter how many processes share a batch, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.errors import BudgetError
from learnevict.ops.distributed import highest
from learnevict.ops.random import hashed, shift, uniform


@dataclass(frozen=True)
class BatchRandom:
    """The random keys (ops.random) of a batch, the same in all processes, and of the rows that this process has."""

    batch: Int[Tensor, ""]
    rows: Int[Tensor, "B"]

    @classmethod
    def of(cls, batch: Int[Tensor, ""], numbers: Int[Tensor, "B"]) -> BatchRandom:
        """Returns the keys of a batch, and of rows by their numbers in it."""
        return cls(batch, hashed(batch, 1, numbers))

    @classmethod
    def anew(cls, rows: int, device: torch.device | None = None) -> BatchRandom:
        """Returns new keys from the global generator."""
        return cls.of(torch.randint(2**62, ()), torch.arange(rows, device=device))

    def budget(self, budgets: tuple[int, int]) -> int:
        """Returns one budget for the batch, from the smallest to the largest, log-uniformly."""
        low, high = (math.log(budget) for budget in budgets)
        return round(math.exp(low + (high - low) * float(uniform(hashed(self.batch, 2)))))

    def per_row(self, *what: int) -> Float[Tensor, "B"]:
        """Returns a number from [0, 1) for each row; `what` says which draw it is."""
        return uniform(hashed(self.rows, *what))

    def one_of(self, values: Int[Tensor, "B"], marked: Bool[Tensor, "B"], *what: int) -> int | None:
        """Returns the value of one row, drawn evenly from the marked rows of all processes; None if none is marked.

        Args:
            values: of this process's rows, whole numbers of 32 bits.
            *what: which draw it is.
        """
        chances = shift(hashed(self.rows, *what), 33)  # the highest wins, and brings its value along
        lots = chances * 2**32 + values + 2**31
        best = highest(int(torch.where(marked, lots, -1).amax()), lots.device)
        return None if best < 0 else best % 2**32 - 2**31


def check_budgets(budgets: tuple[int, ...], least: int = 1) -> None:
    """Raises BudgetError if these are not a smallest and a largest budget, or cannot hold guards and a fresh block: `least`."""
    if len(budgets) != 2 or not 1 <= budgets[0] <= budgets[1]:
        given = " ".join(map(str, budgets))
        raise BudgetError(
            f"training budgets {given or '(none)'}: give the smallest and then the largest, of 1 token or more, as in "
            "--budgets 32 96"
        )
    if budgets[0] < least:
        raise BudgetError(
            f"training budgets of {budgets[0]} to {budgets[1]} cannot hold the guards and a fresh block; the smallest that "
            f"works is {least}"
        )
