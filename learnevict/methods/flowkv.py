"""FlowKV: what has been compressed once is never compressed again, round any method (arXiv 2505.15347).

cache_t = K_(t-1) + F(T_t) + what is not compressed yet: F, the base method, ranks only what is new since the last compression,
and keeps a share rho of it. Compressing the whole cache every time leaves a token of the first turn with rho ** t of a chance.

A turn here is what left the guards since the last event, so memory stays bounded. With a budget in shares of the text,
budget="50%" and keep=0.5, every survivor stays for good, as in the paper, once the budget is well above the guards; under a
budget in tokens survivors go by age, the oldest first, and never by another look at their score.

Departures: turns are blocks of `slack` tokens, not those of a chat template, and the running turn is protected by guards alone;
losers of a block stay while there is room, and are then the first to go. schedule="blocks" only. No public code was read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from learnevict.config import AnyBudget
from learnevict.errors import UsageError
from learnevict.methods import Paper, load
from learnevict.ops.select import ranks
from learnevict.policy import Guard, Policy, WrappedScorer
from learnevict.signals import Signals, StateColumn

PAPER = Paper(
    "FlowKV: Enhancing Multi-Turn Conversational Coherence in LLMs via Isolated KV Cache Management",
    "2505.15347",
    2025,
    decides=("schedule",),
)
TIER = 2.0**22
"""Between winners, survivors and losers: more than there are tokens, and float32 holds thrice as much exactly."""


@dataclass(frozen=True)
class OnceScored(WrappedScorer):
    """New slots by the base's score, of which a share wins; then survivors by age; then the other new ones.

    Attributes:
        keep: share of new slots that wins.
        guard: of the policy; what it protects does not compete yet.
    """

    keep: float = 0.5
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "columns", (*self.scorer.columns, StateColumn("compressed", dtype=torch.int32)))
        object.__setattr__(self, "refreshes", True)

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        """Counts for every slot how often it competed for a place, this event included."""
        over = signals.occupied.sum((1, 2)) > signals.position.shape[1] * signals.budget
        competes = signals.occupied & ~self.guard.protect(signals) & over.view(-1, 1, 1)
        compressed = signals.state["compressed"] + competes
        return {**self.scorer.refresh(signals), "compressed": compressed}

    def score(self, signals: Signals) -> Tensor:
        new = signals.occupied & (signals.state["compressed"] == 1)
        by_base = self.scorer.score(signals).float().masked_fill(~new, -torch.inf)
        place = ranks(by_base, signals.position)
        wins = place < (self.keep * new.sum(-1, keepdim=True)).ceil()
        tier = torch.where(new, torch.where(wins, 0.0, 2.0), 1.0)
        return -(tier * TIER + torch.where(new, place, signals.age).float())


def policy(budget: AnyBudget, *, base: str = "snapkv", keep: float = 0.5, **options: Any) -> Policy:
    """Keep a share of every block, once and for all.

    Args:
        base: the method that ranks new slots.
        keep: share of them that stays (rho = 0.5: the paper).
        **options: of the base.

    Raises:
        UsageError: a base that ranks layers together, a share that is none, or another schedule.
    """
    inner = load(base).policy(budget, **options)
    if not 0 < keep <= 1 or inner.schedule.prompt == "end" or inner.scope == "model" or not inner.schedule.active:
        raise UsageError(
            f"flowkv keeps a share above 0 and up to 1 of every block by a base that ranks each layer alone; keep={keep} of "
            f"{base} with schedule prompt={inner.schedule.prompt!r} is none"
        )
    return replace(inner, scorer=OnceScored(inner.scorer, keep, inner.guard), name="flowkv")
