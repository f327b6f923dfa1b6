"""Who may govern a cache: anything with `keep(signals)`, or a function. What else a cache asks has its defaults here alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
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


@runtime_checkable
class Keeps(Protocol):
    """All that a cache needs of who governs it; of the parts of a Governor, those that it has are used too."""

    def keep(self, signals: Signals, /) -> Tensor | None:
        """The slots to keep, bool [B, H, N], at most `signals.budget` per head; None keeps all."""
        ...


AnyPolicy: TypeAlias = Keeps | Callable[[Signals], Tensor | None]
"""What may be handed to a cache."""


class Governor(Keeps, Protocol):
    """All that a cache asks of who governs it."""

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
    @property
    def base(self) -> Base | None: ...
    @property
    def scope(self) -> Literal["layer", "model"]: ...
    @property
    def probe(self) -> Probe | None: ...


class Assembly(Governor, Protocol):
    """A governor of scope "model"."""

    def keep_together(self, layers: Sequence[Signals]) -> list[Tensor]:
        """As `keep`, for all evicting layers at once."""
        ...


@dataclass(frozen=True)
class Unscored(Scorer):
    """Scores all slots alike; `window` is how many past queries the cache keeps for `keep` to look back at."""

    window: int = 0

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        return torch.zeros(signals.position.shape, device=signals.position.device)


@dataclass(frozen=True)
class Rule:
    """A Governor whose `keep` is a function, and the defaults of all its other parts.

    Args:
        keep: see Keeps.
        budget: what `keep` promises to stay within.
        scorer: its per-slot state is kept up to date; its scores are not asked for.
        guard: counted, not enforced, because `keep` decides alone.
    """

    keep: Callable[[Signals], Tensor | None]
    budget: Budget
    schedule: Schedule = field(default_factory=Schedule)
    scorer: Scorer = field(default_factory=Unscored)
    allocator: Allocator = field(default_factory=Uniform)
    guard: Guard = field(default_factory=lambda: Guard(0, 0))
    name: str = "rule"
    base: Base | None = None
    scope: Literal["layer", "model"] = "layer"
    probe: Probe | None = None
    keep_together: Callable[[Sequence[Signals]], list[Tensor]] | None = None


def governor(given: Any) -> Governor:
    """Returns who governs a cache: the object itself if it has all parts, else a Rule with those it has.

    Args:
        given: an object with `keep(signals)`, or that function itself.

    Raises:
        UsageError: it can do neither, or is of scope "model" without `keep_together(layers)`.
        BudgetError: its budget is not understood.

    Warns:
        DefaultBudgetWarning: it names no budget, so DEFAULT_BUDGET holds.
    """
    parts: dict[str, Any] = {part.name: getattr(given, part.name) for part in fields(Rule) if hasattr(given, part.name)}
    name = parts.setdefault("name", getattr(given, "__name__", type(given).__name__))
    keep = parts.setdefault("keep", given)
    if isinstance(given, type) or not callable(keep):
        raise UsageError(
            f"{name} cannot govern a cache; give a method's policy(budget), an object with keep(signals), or a function that "
            "returns the slots to keep, bool [B, H, N]"
        )
    if parts.get("scope") == "model" and not callable(parts.get("keep_together")):
        raise UsageError(f'{name} is of scope "model" but lacks keep_together(layers); write it, or use scope="layer"')
    required = [part.name for part in fields(Rule) if part.name != "keep_together"]
    if all(hasattr(given, part) for part in required) and isinstance(given.budget, Budget):
        complete: Any = given
        return complete
    if "budget" not in parts:
        warnings.warn(
            f"{name} names no budget, so {DEFAULT_BUDGET} slots per layer and kv head hold; give it an attribute `budget` "
            '(tokens, "25%" or "64MiB") that keep(signals) stays within',
            DefaultBudgetWarning,
            stacklevel=3,
        )
    parts["budget"] = Budget.parse(parts.get("budget", DEFAULT_BUDGET))
    return Rule(**parts)
