"""A governor from one function: the shortest way to try an idea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from learnevict.config import Budget
from learnevict.policy import Allocator, Guard, Schedule, Scorer, Uniform
from learnevict.signals import Signals


@dataclass(frozen=True)
class Unscored(Scorer):
    """Scores nothing; says how many past queries a Rule looks back at."""

    window: int = 0

    def score(self, signals: Signals) -> Tensor:
        """All alike, float32 [B, H, N]."""
        return torch.zeros(signals.position.shape, device=signals.position.device)


@dataclass(frozen=True)
class Rule:
    """A governor from one function: `Rule(lambda signals: ..., Budget(64))`.

    Args:
        keep: from signals to the slots to keep, bool [B, H, N], at most `signals.budget` per head; None keeps all.
        budget: what `keep` promises to stay within.
        schedule: when it is asked.
        scorer: what is kept up to date for it; Unscored(window) keeps a ring of past queries.
        guard: counted, not enforced: `keep` decides alone.
    """

    keep: Callable[[Signals], Tensor | None]
    budget: Budget
    schedule: Schedule = field(default_factory=Schedule)
    scorer: Scorer = field(default_factory=Unscored)
    allocator: Allocator = field(default_factory=Uniform)
    guard: Guard = field(default_factory=lambda: Guard(0, 0))
    name: str = "rule"
    scope: Literal["layer"] = "layer"
    probe: None = None
