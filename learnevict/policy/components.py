"""Components of a Policy beside its scorer: allocators (how many), schedules (when), guards (never), draws (which)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from torch import Tensor

from learnevict.config import MOST_TOKENS
from learnevict.errors import BudgetError, UsageError
from learnevict.ops import keep_top
from learnevict.signals import Signals


class Allocator(ABC):
    """Splits a budget over layers and heads.

    Attributes:
        ragged: True if heads of one layer may hold different numbers of slots; storage is then paged.
        made: what a file says that it was made of, "model" and its "weights" among it; empty for any model.
    """

    ragged: bool = False
    made: Mapping[str, Any] = MappingProxyType({})

    def layer_budget(self, budget: int, rank: int, num_layers: int, floor: int) -> int:
        """Returns the budget of the `rank`-th evicting layer; the sum over layers is num_layers * budget."""
        return budget

    def row_budget(self, row: int, budget: int, rank: int, num_layers: int, floor: int) -> int:
        """Returns the same for one row of the batch, for allocators that treat rows differently."""
        return self.layer_budget(budget, rank, num_layers, floor)

    def in_layer(self, layer: int) -> Allocator:
        """Returns what counts the slots of one layer of the model, for allocators whose heads differ from layer to layer."""
        return self

    @abstractmethod
    def counts(self, scores: Tensor, protected: Tensor, budget: Tensor) -> Tensor:
        """Returns the slots to keep per head, int64 [B, H].

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
        if not 0 <= self.slack <= MOST_TOKENS:
            raise BudgetError(f"slack must be 0 or more tokens, and at most {MOST_TOKENS}, not {self.slack}")

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
    """Slots that no score may evict: attention sinks, the recent window, the fresh block, and if asked for the prompt.

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
        if not (0 <= self.sinks <= MOST_TOKENS and 0 <= self.recent <= MOST_TOKENS):
            raise BudgetError(
                f"sinks and recent must be 0 or more, and at most {MOST_TOKENS}, not {self.sinks} and {self.recent}"
            )
        if not 0 <= self.recent_share < 1:
            raise BudgetError(f"recent_share must be 0 or more and below 1, not {self.recent_share}")

    @property
    def terms(self) -> tuple[int, int, bool]:
        """Sinks, recent window, prompt protection; part of a trace."""
        return self.sinks, self.recent, self.prompt

    def reserved(self, period: int) -> int:
        """Returns how many slots guards and the fresh block of `period` tokens take."""
        return self.sinks + max(self.recent, period)

    def protect(self, signals: Signals) -> Tensor:
        """Returns the guarded slots, bool [B, H, N]."""
        rows, position = signals.rows, signals.position
        prompt = (position < rows.prompt_end.view(-1, 1, 1)) & signals.occupied
        recent: Tensor | int = self.recent
        if self.recent_share:  # of what the budget holds beside sinks and a protected prompt
            free = signals.budget - self.sinks - (prompt[:, 0].sum(-1) if self.prompt else 0)
            recent = (self.recent_share * free).int().clamp_min(self.recent).view(-1, 1, 1)
        fresh = position >= rows.block.view(-1, 1, 1)
        kept = (signals.place < self.sinks) | fresh | (signals.age < recent)
        return (kept | prompt if self.prompt else kept) & signals.occupied


class Draw(Protocol):
    """Turns scores and counts into slots to keep."""

    def choose(self, scores: Tensor, counts: Tensor, position: Tensor) -> Tensor:
        """Returns bool [B, H, N] with `counts` slots set per head (fewer where fewer are occupied)."""
        ...


@dataclass(frozen=True)
class TopK:
    """The best `counts` slots; of equal scores the older is evicted."""

    def choose(self, scores: Tensor, counts: Tensor, position: Tensor) -> Tensor:
        return keep_top(scores, position, counts)


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
        return keep_top(scores, position, counts) & (scores >= self.threshold)


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every head of a layer holds what the layer does; of layers, those that share unequally say so in `layer_budget`."""

    def counts(self, scores: Tensor, protected: Tensor, budget: Tensor) -> Tensor:
        return budget.long().view(-1, 1).expand(scores.shape[:2])
