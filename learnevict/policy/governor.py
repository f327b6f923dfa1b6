"""Who may govern a cache: anything with `keep(signals)`, or a function. What else a cache asks has its defaults here alone."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from learnevict.config import Base, Budget
from learnevict.errors import DefaultBudgetWarning, UsageError
from learnevict.policy.components import Allocator, Guard, Schedule, Uniform
from learnevict.policy.scorer import Probe, Scorer
from learnevict.signals import Signals

DEFAULT_BUDGET = 512
"""Slots per layer and kv head, for who names no budget."""
KINDS: dict[str, type] = {
    "scorer": Scorer, "allocator": Allocator, "schedule": Schedule, "guard": Guard, "base": Base,
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

    @property
    def deferred(self) -> bool:
        """Whether events fall after the forward: layers are ranked together, or a probe is run."""
        return self.scope == "model" or self.probe is not None

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
