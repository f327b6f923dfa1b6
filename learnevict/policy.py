"""A policy is one sentence: when, who, how many, never, which.

    Policy(budget, scorer, allocator, schedule, guard, draw)

Its one verb is `keep(signals)`: the slots to keep, or None for all. Everything else in this file says what the words of
that sentence must offer; the library of words is `learnevict.parts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from learnevict.config import Base, Budget
from learnevict.errors import BudgetError
from learnevict.ops import keep_top
from learnevict.signals import Column, Signals


class Scorer(ABC):
    """Gives each slot a number; higher stays.

    Attributes:
        columns: notes it keeps per slot; the cache owns them.
        window: how many past queries it wants to look back at (0: none). The cache keeps a ring of that many.
        observes: True if `observe` must be called after every block or step with the attention of the fresh queries.
        refreshes: True if `refresh` must be called at every event of a row's grid, also when nothing needs to go.
    """

    columns: tuple[Column, ...] = ()
    window: int = 0
    observes: bool = False
    refreshes: bool = False

    @abstractmethod
    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]; values of empty slots are ignored."""

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """Notes for fresh tokens, {name: [B, H, S, ...]}; columns not named start at their fill."""
        return {}

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        """Updated notes of all slots, {name: [B, H, N, ...]}, given `signals.fresh_attention`."""
        return {}

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        """Updated notes of all slots at an event, {name: [B, H, N, ...]}; the cheap place for what is due once a period."""
        return {}

    def to(self, device: torch.device) -> Scorer:
        """Move parameters or tables to `device`; scorers without any return themselves."""
        return self


class Gate(nn.Module, Scorer):
    """A Scorer with parameters, for all layers of one base model; trained with the base frozen."""

    def settings(self) -> dict[str, Any]:
        """What the method's `build` needs besides the layout to make this gate again, as JSON."""
        return {}

    def to(self, *args: Any, **kwargs: Any) -> Gate:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As nn.Module.to."""
        nn.Module.to(self, *args, **kwargs)
        return self


class Allocator(ABC):
    """Splits a budget over layers and heads.

    Attributes:
        ragged: True if heads of one layer may hold different numbers of slots; storage is then paged.
    """

    ragged: bool = False

    def layer_budget(self, budget: int, rank: int, num_layers: int, floor: int) -> int:
        """Budget of the `rank`-th evicting layer of `num_layers`; the sum over layers is num_layers * budget."""
        return budget

    @abstractmethod
    def counts(self, scores: Tensor, protected: Tensor, budget: Tensor) -> Tensor:
        """Slots to keep per head, int64 [B, H].

        Args:
            scores: float32 [B, H, N], -inf where empty.
            protected: bool [B, H, N], slots that stay whatever their score.
            budget: int32 [B], slots per head on average; H * budget is never exceeded.
        """


@dataclass(frozen=True)
class Schedule:
    """When eviction is due.

    Events lie on a grid of `period` tokens anchored at each row's first real token, so padding changes nothing.

    Attributes:
        slack: tokens that may accumulate between events; 0 overwrites one victim at every step.
        prompt: "blocks" runs the event loop inside the prompt (query-agnostic, memory bounded); "end" evicts once when the
            prompt has been read (query-aware).
        decode: False switches eviction off after the prompt: the cache then grows, and the policy is not bounded.
        active: False never evicts at all.
    """

    slack: int = 128
    prompt: Literal["blocks", "end"] = "blocks"
    decode: bool = True
    active: bool = True

    def __post_init__(self) -> None:
        if self.slack < 0:
            raise BudgetError(f"slack must be 0 or more tokens, not {self.slack}")

    @property
    def period(self) -> int:
        """Tokens between events, at least 1."""
        return max(self.slack, 1)

    @property
    def bounded(self) -> bool:
        """True if storage never exceeds budget + slack while decoding."""
        return self.active and self.decode


@dataclass(frozen=True)
class Guard:
    """Slots that no score may evict: attention sinks, the recent window, the fresh block, and on demand the prompt.

    Attributes:
        sinks: first real tokens of a row.
        recent: last tokens read.
        prompt: keep the whole prompt; the budget is then counted on the rest (a budget in bytes stays a total).
        recent_share: share of the budget beside sinks and prompt that the recent window grows to, below 1.
    """

    sinks: int = 4
    recent: int = 8
    prompt: bool = False
    recent_share: float = 0.0

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise BudgetError(f"sinks and recent must be 0 or more, not {self.sinks} and {self.recent}")
        if not 0 <= self.recent_share < 1:
            raise BudgetError(f"recent_share must be 0 or more and below 1, not {self.recent_share}")

    @property
    def terms(self) -> tuple[int, int, bool]:
        """Sinks, recent window, prompt protection; what a trace notes down."""
        return self.sinks, self.recent, self.prompt

    def reserved(self, period: int) -> int:
        """Slots taken by guards and the fresh block of `period` tokens."""
        return self.sinks + max(self.recent, period)

    def protect(self, signals: Signals) -> Tensor:
        """bool [B, H, N]."""
        rows, position = signals.rows, signals.position
        first, block = rows.first.view(-1, 1, 1), rows.block.view(-1, 1, 1)
        prompt = (position < rows.prompt_end.view(-1, 1, 1)) & signals.occupied
        recent: Tensor | int = self.recent
        if self.recent_share:  # of what the budget holds beside sinks and a protected prompt
            free = signals.budget - self.sinks - (prompt[:, 0].sum(-1) if self.prompt else 0)
            recent = (self.recent_share * free).int().clamp_min(self.recent).view(-1, 1, 1)
        kept = (position < first + self.sinks) | (position >= block) | (signals.age < recent)
        return (kept | prompt if self.prompt else kept) & signals.occupied


class Draw(Protocol):
    """Turns scores and counts into slots to keep."""

    def choose(self, scores: Tensor, counts: Tensor, position: Tensor) -> Tensor:
        """bool [B, H, N] with `counts` slots set per head (fewer where fewer are occupied)."""
        ...


@dataclass(frozen=True)
class TopK:
    """The best `counts` slots; of equal scores the older is evicted."""

    def choose(self, scores: Tensor, counts: Tensor, position: Tensor) -> Tensor:
        """See Draw."""
        return keep_top(scores, position, counts)


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every layer and head holds the budget."""

    def counts(self, scores: Tensor, protected: Tensor, budget: Tensor) -> Tensor:
        """See Allocator."""
        return budget.long().view(-1, 1).expand(scores.shape[:2])


class Governor(Protocol):
    """Anything that may govern a cache: the verb `keep`, and what the cache must know beforehand."""

    @property
    def budget(self) -> Budget: ...
    @property
    def scorer(self) -> Scorer: ...
    @property
    def allocator(self) -> Allocator: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def guard(self) -> Guard: ...
    @property
    def name(self) -> str: ...

    def keep(self, signals: Signals) -> Tensor | None:
        """bool [B, H, N], the slots to keep; None keeps all."""
        ...


@dataclass(frozen=True)
class Policy:
    """When, who, how many, never, which: a frozen sentence that governs a cache.

    Args:
        budget: slots per (layer, kv head) after an event: tokens, "25%" or "64MiB".
        scorer: who is worth keeping.
        allocator: how many per layer and head.
        schedule: when.
        guard: who is never evicted.
        draw: which, given scores and counts.
        name: shown in tables and traces.
        base: the model its gate was trained for; None if it has none.

    Raises:
        BudgetError: a token budget smaller than guards + fresh block.
    """

    budget: Budget
    scorer: Scorer
    allocator: Allocator = field(default_factory=Uniform)
    schedule: Schedule = field(default_factory=Schedule)
    guard: Guard = field(default_factory=Guard)
    draw: Draw = field(default_factory=TopK)
    name: str = "policy"
    base: Base | None = None

    def __post_init__(self) -> None:
        if self.budget.unit == "tokens" and self.schedule.active and self.budget.amount < self.floor:
            raise BudgetError(
                f"budget {self.budget} is too small for {self.name}: {self.guard.sinks} sinks, {self.guard.recent} recent and "
                f"a fresh block of {self.schedule.period} tokens; the smallest that works is {self.floor} (or use a smaller "
                "slack)"
            )

        if self.budget.unit == "bytes" and self.schedule.active and self.schedule.prompt == "end":
            raise BudgetError(
                f"a budget of {self.budget} is a hard total, but this schedule holds the whole prompt before its first event; "
                'give tokens or a share, or schedule="blocks"'
            )

    @property
    def floor(self) -> int:
        """The smallest budget that leaves room for one scored slot beside the guards and the fresh block."""
        return self.guard.reserved(self.schedule.period) + 1

    def keep(self, signals: Signals) -> Tensor | None:
        """The slots to keep, bool [B, H, N]."""
        protected = self.guard.protect(signals)
        scores = self.scorer.score(signals).float().masked_fill(~signals.occupied, -torch.inf)
        scores = scores.masked_fill(protected, torch.inf)
        counts = self.allocator.counts(scores, protected, signals.budget)
        return self.draw.choose(scores, counts, signals.position)
