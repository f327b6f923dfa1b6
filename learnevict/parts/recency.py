"""The score of recency: newer tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learnevict.policy import Scorer
from learnevict.signals import Signals


@dataclass(frozen=True)
class Recency(Scorer):
    """Minus the age in tokens."""

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        return -signals.age.float()
