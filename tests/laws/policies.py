"""Policies made for tests: their choices depend on positions alone, so a test can foretell them without the core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnevict.config import Budget
from learnevict.methods.random import Hashed
from learnevict.policy import Guard, Policy, Schedule, Uniform
from learnevict.signals import Signals


@dataclass(frozen=True)
class Lopsided(Uniform):
    """Two thirds of what the guards leave go to the first head, if it holds so many; the rest in equal parts to the others."""

    ragged = True

    def counts(self, scores: Tensor, protected: Tensor, budget: Tensor) -> Tensor:
        heads = scores.shape[1]
        kept = protected.sum(-1)
        free = budget.long() * heads - kept.sum(-1)
        room = (scores > -torch.inf).sum(-1) - kept
        rest = (free - (free * 2 // 3).minimum(room[:, 0])) // (heads - 1)
        return kept + torch.stack([free - rest * (heads - 1), *[rest] * (heads - 1)], -1)


@dataclass(frozen=True)
class Keeping(Policy):
    """A policy of which a test replaces the verb."""

    verb: Any = None

    def keep(self, signals: Signals) -> Tensor | None:
        return self.verb(signals)


def hashed(budget: int | str = 20, *, ragged: bool = False, seed: int = 0, verb: Any = None, **options: Any) -> Policy:
    """Random eviction, with uniform or lopsided heads. Options: slack, prompt ("blocks"/"end"), sinks, recent, protect."""
    schedule = Schedule(options.get("slack", 4), options.get("prompt", "blocks"), options.get("decode", True))
    guard = Guard(options.get("sinks", 2), options.get("recent", 3), options.get("protect", False))
    parts = (Hashed(seed), Lopsided() if ragged else Uniform(), schedule, guard)
    if verb is not None:
        return Keeping(Budget.parse(budget), *parts, name="hashed", verb=verb)
    return Policy(Budget.parse(budget), *parts, name="hashed")
