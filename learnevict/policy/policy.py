"""Who may govern a cache: anything with `keep(signals)`, or a function; what else a cache asks has its defaults here alone.

A Policy is the one that methods make: when, who, how many, never, which.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from learnevict.config import Base, Budget
from learnevict.errors import BudgetError, CacheError, DefaultBudgetWarning, UsageError
from learnevict.ops import keep_top
from learnevict.policy.components import Allocator, Draw, Guard, Schedule, TopK, Uniform
from learnevict.policy.scorer import Probe, Scorer
from learnevict.policy.stores import Drop, Store
from learnevict.signals import EMPTY, Signals

DEFAULT_BUDGET = 512
"""Slots per layer and kv head, for who names no budget."""
KINDS: dict[str, type] = {
    "scorer": Scorer, "allocator": Allocator, "schedule": Schedule, "guard": Guard, "base": Base,
    "store": Store,
}  # fmt: skip
"""Of a Governor's parts."""


@runtime_checkable
class Keeps(Protocol):
    """All that a cache needs of who governs it; of the parts of a Governor, those that it has are used too."""

    def keep(self, signals: Signals, /) -> Tensor | None:
        """Returns the slots to keep, bool [B, H, N], at most `signals.budget` per head; None keeps all."""
        ...


AnyPolicy: TypeAlias = Keeps | Callable[[Signals], Tensor | None]
"""What may be handed to a cache."""


@dataclass(frozen=True)
class Unscored(Scorer):
    """Scores all slots alike; `window` is how many past queries the cache keeps for `keep` to look back at."""

    window: int = 0

    def score(self, signals: Signals) -> Tensor:
        return torch.zeros(signals.position.shape, device=signals.position.device)


@dataclass(frozen=True)
class Governor(ABC):
    """All that a cache asks of who governs it.

    Args:
        budget: slots per (layer, kv head) after an event.
        scorer: its per-slot state is kept up to date.
        allocator: how many slots per layer and head.
        schedule: when events fall.
        guard: slots counted beside the budget's share of scored ones.
        name: shown in tables and traces.
        base: the model its gate was trained for; None if it has none.
        scope: "layer" evicts as each layer finishes; "model" ranks the slots of all layers together after the last one,
            so that layers and heads compete for L * H * budget slots. A forward that reaches beyond an event is then
            read in pieces.
        probe: tokens that are run against the cache before every event, which then falls after the forward too.
        store: what becomes of slots that lose their place in full precision.
    """

    budget: Budget
    scorer: Scorer = field(default_factory=Unscored)
    allocator: Allocator = field(default_factory=Uniform)
    schedule: Schedule = field(default_factory=Schedule)
    guard: Guard = field(default_factory=lambda: Guard(0, 0))
    name: str = "policy"
    base: Base | None = None
    scope: Literal["layer", "model"] = "layer"
    probe: Probe | None = None
    store: Store = field(default_factory=Drop)

    @property
    def deferred(self) -> bool:
        """Whether events fall after the forward: layers are ranked together, or tokens are run to ask."""
        return self.scope == "model" or self.probing

    @property
    def probing(self) -> bool:
        """Whether tokens are run to ask the cache."""
        return self.probe is not None or self.scorer.asks

    @property
    def floor(self) -> int:
        """The smallest budget that leaves room for one scored slot beside the guards and the fresh block."""
        return self.guard.reserved(self.schedule.period) + 1

    @abstractmethod
    def keep(self, signals: Signals) -> Tensor | None:
        """See Keeps."""

    @abstractmethod
    def keep_together(self, layers: Sequence[Signals]) -> list[Tensor]:
        """Returns the same for all evicting layers at once, for scope "model"."""

    def keep_in_tiers(self, signals: Signals, full: Tensor, counts: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns the slots to keep, and those of them that stay in full precision, both bool [B, H, N]; here the newest.

        Args:
            full: the slots that are in full precision now, bool [B, H, N].
            counts: int [B, H], how many may be at most.
        """
        keep = self.keep(signals)
        stay = full if keep is None else full & keep
        return keep, stay & keep_top(signals.position.float().masked_fill(~stay, -torch.inf), signals.position, counts)


@dataclass(frozen=True)
class Rule(Governor):
    """A Governor that asks an object; its guard is counted, not enforced, because the object decides alone."""

    given: Any = None

    def keep(self, signals: Signals) -> Any:  # whatever it is, the cache checks it
        return self.given.keep(signals) if hasattr(self.given, "keep") else self.given(signals)

    def keep_together(self, layers: Sequence[Signals]) -> Any:
        return self.given.keep_together(layers)


def governor(given: Any, **parts: Any) -> Governor:
    """Returns who governs a cache: a Governor itself, or one made of an object and defaults for the parts that it lacks.

    Args:
        given: an object with `keep(signals)`, or that function itself.
        **parts: of a Governor, over the object's own.

    Raises:
        UsageError: it can do neither, a part is of another kind, or it is of scope "model" without `keep_together(layers)`.
        BudgetError: its budget is not understood.

    Warns:
        DefaultBudgetWarning: it names no budget, so DEFAULT_BUDGET holds.
    """
    if isinstance(given, Governor):
        return replace(given, **parts) if parts else given
    own = {part.name: getattr(given, part.name, None) for part in fields(Governor)}
    own = {name: part for name, part in own.items() if part is not None or (name == "budget" and hasattr(given, name))}
    named: dict[str, Any] = {**own, "name": getattr(given, "__name__", type(given).__name__), **parts}
    if isinstance(own.get("name"), str) and "name" not in parts:
        named["name"] = own["name"]
    if isinstance(given, type) or not callable(getattr(given, "keep", given)):
        raise UsageError(
            f"{named['name']} cannot govern a cache; give a method's policy(budget), an object with keep(signals), or a "
            "function that returns the slots to keep, bool [B, H, N]"
        )
    for part, kind in KINDS.items():
        if not isinstance(named.get(part), kind | None):
            raise UsageError(
                f"{type(given).__name__} has a part `{part}` that is no {kind.__name__}, but {type(named[part]).__name__}; "
                "call it otherwise if it is not meant for the cache"
            )
    if (scope := named.get("scope", "layer")) not in ("layer", "model"):
        raise UsageError(f'{named["name"]} is of scope {scope!r}; choose "layer" or "model"')
    if scope == "model" and not hasattr(given, "keep_together"):
        raise UsageError(
            f'{named["name"]} is of scope "model" but lacks keep_together(layers); write it, or drop the scope'
        )
    if "budget" not in named:
        warnings.warn(
            f"{named['name']} names no budget, so {DEFAULT_BUDGET} slots per layer and kv head hold; give it an attribute "
            '`budget` (tokens, "25%" or "64MiB") that keep(signals) stays within',
            DefaultBudgetWarning,
            stacklevel=3,
        )
    named["budget"] = Budget.parse(named.get("budget", DEFAULT_BUDGET))
    return Rule(**named, given=given)


@dataclass(frozen=True)
class Policy(Governor):
    """A Governor composed of when, who, how many, never, which.

    Args:
        guard: slots that no score may evict.
        draw: which slots stay, given scores and counts.

    Raises:
        BudgetError: a token budget smaller than guards + fresh block.
        UsageError: scope "model" with an allocator that gives every head the same; a store in few bits with heads that hold
            different numbers of slots.
    """

    guard: Guard = field(default_factory=Guard)
    draw: Draw = field(default_factory=TopK)

    def __post_init__(self) -> None:
        if self.budget.unit == "tokens" and self.schedule.active and self.budget.amount < self.floor:
            raise BudgetError(
                f"budget {self.budget} is too small for {self.name}: {self.guard.sinks} sinks, {self.guard.recent} recent and "
                f"a fresh block of {self.schedule.period} tokens; the smallest that works is {self.floor} (or use a smaller "
                "slack)"
            )
        if self.scope == "model" and not self.allocator.ragged:
            raise UsageError(
                f'scope="model" lets heads compete, but {type(self.allocator).__name__} gives every head the same; give a '
                'method allocation="pooled", or a Policy the allocator Together()'
            )
        if self.store.bits and self.allocator.ragged:
            raise UsageError(
                f"a store in {self.store.bits} bits gives every head as many slots, but {type(self.allocator).__name__} lets "
                'heads compete; give allocation="equal", or store="drop"'
            )
        if self.budget.unit == "bytes" and self.schedule.active and self.schedule.prompt == "end":
            raise BudgetError(
                f"a budget of {self.budget} is a hard total, but this schedule holds the whole prompt before its first event; "
                'give tokens or a share, or schedule="blocks"'
            )

    def keep(self, signals: Signals) -> Tensor | None:
        return self._choose(signals, *self.rank(signals))

    def _choose(self, signals: Signals, scores: Tensor, protected: Tensor) -> Tensor:
        counts = self.allocator.in_layer(signals.layer).counts(scores, protected, signals.budget)
        return self.draw.choose(scores, counts, signals.position)

    def keep_in_tiers(self, signals: Signals, full: Tensor, counts: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns the best by score; see Governor."""
        scores, protected = self.rank(signals)
        keep = self._choose(signals, scores, protected)
        stay = full & keep
        return keep, stay & keep_top(scores.masked_fill(~stay, -torch.inf), signals.position, counts)

    def keep_together(self, layers: Sequence[Signals]) -> list[Tensor]:
        """Returns the slots to keep in each layer, bool [B, H, N_l]: at most L * H times the mean of the layers' budgets.

        Scores of all layers must be comparable.
        """
        return keep_best(layers, [self.rank(signals) for signals in layers], self.allocator, self.draw)

    def rank(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Returns scores float32 [B, H, N], inf where protected and -inf where empty, and what is protected, bool [B, H, N].

        Raises:
            CacheError: see check_scores.
        """
        protected = self.guard.protect(signals)
        scores = self.scorer.score(signals).float().masked_fill(~signals.occupied, -torch.inf)
        scores = scores.masked_fill(protected, torch.inf)
        check_scores(scores, signals.occupied & ~protected, self.name, signals.layer)
        return scores, protected


def check_scores(scores: Tensor, competing: Tensor, name: str, layer: int) -> None:
    """Refuses scores [B, H, N] of competing slots that are not finite, which would pass for empty or protected ones.

    Raises:
        CacheError: one is NaN or infinite; on CUDA a device assertion, which waits for nobody.
    """
    try:
        torch.ops.aten._assert_async.msg((scores.isfinite() | ~competing).all(), "a policy's scores are not finite")
    except RuntimeError as error:
        raise CacheError(
            f"{name} scores {int((competing & ~scores.isfinite()).sum())} slots of layer {layer} with NaN or infinity, so "
            "nothing can be ranked; look for an overflow in a gate or in hidden states (float16?), or mend score(signals)"
        ) from error


def keep_best(
    layers: Sequence[Signals], ranked: Sequence[tuple[Tensor, Tensor]], allocator: Allocator, draw: Draw
) -> list[Tensor]:
    """Returns the best slots of all layers, bool [B, H, N_l] of each; `ranked` as of Policy.rank."""
    width = max(scores.shape[-1] for scores, _ in ranked)

    def side_by_side(parts: list[Tensor], empty: float) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(part, (0, width - part.shape[-1]), value=empty) for part in parts], dim=1)

    scores = side_by_side([scores for scores, _ in ranked], -torch.inf)
    protected = side_by_side([protected for _, protected in ranked], False)
    position = side_by_side([signals.position for signals in layers], EMPTY)
    budget = torch.stack([signals.budget for signals in layers]).sum(0) // len(layers)
    counts = allocator.counts(scores, protected, budget)
    keep = draw.choose(scores, counts, position).split([part.shape[1] for part, _ in ranked], dim=1)
    return [part[..., : scores.shape[-1]] for part, (scores, _) in zip(keep, ranked, strict=True)]
