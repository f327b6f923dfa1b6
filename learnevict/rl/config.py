"""Settings of refinement: how traces are sampled, what they cost, and how credit is assigned."""

from __future__ import annotations

from dataclasses import dataclass

from learnevict.errors import BudgetError, UsageError
from learnevict.policy import Guard
from learnevict.train.run.flags import check_fields, flag

CHOICES = {
    "credit": ("trace", "to_go", "attention"), "scope": ("layer", "model"), "cost": ("low_entropy", "thresholded", "plain"),
}  # fmt: skip


@dataclass(frozen=True)
class RefineConfig:
    """Settings of refinement, the flags of recipes/grpo.py."""

    credit: str = flag(
        "attention",
        "how advantages are assigned: attention (per eviction, by what the full cache attends to), to_go (per event, by the "
        "cost after it) or trace (one number for all evictions of a trace, as in the paper)",
    )
    cost: str = flag(
        "low_entropy",
        "low_entropy (added loss up to the ceiling where the full cache is sure), thresholded (the paper's square of it above "
        "1.5) or plain (everywhere)",
    )
    ceiling: float = flag(2.0, "most that a token can cost, in nats")
    min_budget: int = flag(24, "slots per head at least, sampled anew for every step, log-uniformly")
    max_budget: int = flag(64, "slots per head at most")
    period: int = flag(16, "tokens between events")
    draw_temperature: float = flag(0.5, "of the sampling policy; the higher, the more it explores")
    pool: int = flag(
        0, "n evictions are sampled among the pool * n lowest scores (the paper: 2); 0: among all candidates"
    )
    layer_share: float = flag(
        1.0, "share of layers whose evictions are random in a trace, the others evict greedily; 1: all"
    )
    kl: float = flag(0.0, "weight of the divergence from the gates at the start")
    sinks: int = flag(4, "first tokens that stay", least=0)
    recent: int = flag(8, "last tokens that stay", least=0)
    scope: str = flag("layer", "layer (every head holds the budget) or model (all heads of all layers compete)")
    floor: float = flag(0.2, "share of an equal split that every head keeps, for scope model", least=0)
    share_spread: float = flag(
        0.0,
        "standard deviation by which the logits of the layers' budget allocation are perturbed, in nats; above 0 the "
        "allocation is learned, for scope layer",
    )
    free_every: int = flag(
        0, "every so many batches the model generates its own answers, and a verifier marks them; 0: never"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.least <= self.min_budget <= self.max_budget:
            raise BudgetError(
                f"budgets from {self.min_budget} to {self.max_budget} must rise and begin at {self.least} or more: "
                f"{self.sinks} sinks, {self.recent} recent and a fresh block of {self.period} stay whatever the scores"
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is unknown; choose {', '.join(known)}")
        if not 0 < self.layer_share <= 1:
            raise UsageError(f"layer_share is above 0 and at most 1, not {self.layer_share}")
        if self.floor > 1:
            raise UsageError(f"floor is at most 1, not {self.floor}")
        if self.share_spread and self.scope == "model":
            raise UsageError(f"share_spread is 0 for scope model, where layers compete anyway; not {self.share_spread}")

    @property
    def guard(self) -> Guard:
        """Returns the slots that are never evicted."""
        return Guard(self.sinks, self.recent)

    @property
    def least(self) -> int:
        """Returns the smallest budget that works."""
        return self.guard.reserved(self.period) + 1

    @property
    def span(self) -> tuple[int, int]:
        """Returns the slots that the smallest and the largest budget hold beyond `least`, at least 1."""
        return max(self.min_budget - self.least, 1), max(self.max_budget - self.least, 1)
