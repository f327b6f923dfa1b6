"""Which slots stay, given scores and counts, where it is not simply the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from learnevict.errors import UsageError
from learnevict.ops import keep_top


@dataclass(frozen=True)
class Above:
    """The best slots that score no less than a threshold: fewer than the budget allows, never more.

    It is heard at events, so nothing goes before a row has filled its budget; slots that it empties stay allocated, for tokens
    to come.

    Attributes:
        threshold: in the units of the scores; protected slots are above any.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise UsageError(
                f"a threshold of {self.threshold} keeps all or nothing; give a number that scores can reach"
            )

    def choose(self, scores: Tensor, counts: Tensor, position: Tensor) -> Tensor:
        """See policy.Draw."""
        return keep_top(scores, position, counts) & (scores >= self.threshold)
