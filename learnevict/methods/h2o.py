"""H2O: heavy hitters and recent tokens (arXiv 2306.14048).

F_j = sum of the attention token j received from every query so far (Algorithm 1), per head; a group of query heads that
share a kv head contributes its mean. Half of the budget is the recent window, half goes to the largest F.

Variants: "paper" is that sum, which favours old tokens: more queries have seen them. "kvpress" (ObservedAttention)
divides by the number of queries that could see the token.

Departures: original positions stay (the authors' real-drop class re-numbers them); events every `slack` tokens, not
every step; sums are float32 (the authors' fp16 sums stop growing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import ScheduleOptions, compose, unknown_variant
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals, StateColumn

PAPER = Paper(
    "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", "2306.14048", 2023
)


@dataclass(frozen=True)
class AttentionMass(Scorer):
    """Attention received so far; `mean` divides by the queries that could give any."""

    mean: bool = False
    columns = (StateColumn("mass"),)
    observes = True

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        """Adds what the fresh queries gave, averaged over the group."""
        assert signals.fresh_attention is not None
        group = signals.fresh_attention.shape[2]
        return {"mass": signals.state["mass"] + signals.fresh_attention.sum((2, 3)) / group}

    def score(self, signals: Signals) -> Tensor:
        mass = signals.state["mass"]
        return mass / (signals.age + 1).clamp_min(1) if self.mean else mass


def policy(
    budget: AnyBudget,
    *,
    variant: str = "paper",
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep heavy hitters.

    Args:
        variant: "paper" or "kvpress", see above.
        recent: last tokens that stay; None: half of the budget (section 5: half heavy, half recent).
    """
    if variant not in ("paper", "kvpress"):
        raise unknown_variant("h2o", variant, ("paper", "kvpress"))
    half: dict[str, Any] = {"recent": 0, "recent_share": 0.5} if recent is None else {"recent": recent}
    return compose("h2o", budget, AttentionMass(variant == "kvpress"), **half, **options)
