"""The policy of a method: when, who, how many, never, which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learnevict.errors import BudgetError, CacheError, UsageError
from learnevict.policy.components import Allocator, Draw, Guard, TopK
from learnevict.policy.governor import Governor
from learnevict.signals import EMPTY, Signals


@dataclass(frozen=True)
class Policy(Governor):
    """A Governor composed of when, who, how many, never, which.

    Args:
        guard: slots that no score may evict.
        draw: which slots stay, given scores and counts.

    Raises:
        BudgetError: a token budget smaller than guards + fresh block.
        UsageError: scope "model" with an allocator that gives every head the same.
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
                f'scope="model" lets heads compete, but {type(self.allocator).__name__} gives every head the same; use '
                'allocators.Together(), or scope="layer"'
            )
        if self.budget.unit == "bytes" and self.schedule.active and self.schedule.prompt == "end":
            raise BudgetError(
                f"a budget of {self.budget} is a hard total, but this schedule holds the whole prompt before its first event; "
                'give tokens or a share, or schedule="blocks"'
            )

    def keep(self, signals: Signals) -> Tensor | None:
        scores, protected = self.rank(signals)
        counts = self.allocator.in_layer(signals.layer).counts(scores, protected, signals.budget)
        return self.draw.choose(scores, counts, signals.position)

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
