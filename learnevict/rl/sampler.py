"""The governor of an episode: it draws what to evict and takes down every draw.

Slots race for survival within a head, or, where all layers are ranked together, in one race of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from learnevict.config import Budget
from learnevict.ops import keep_top
from learnevict.ops.random import hashed, uniform
from learnevict.parts.allocators import Together
from learnevict.parts.learned import SlotScorer
from learnevict.policy import Allocator, Guard, Schedule, Uniform
from learnevict.rl.distribution import NOTHING, draw_evictions, draw_shifts, lowest_scores
from learnevict.signals import EMPTY, Signals


@dataclass(frozen=True)
class SamplingTerms:
    """Under which rules traces are sampled.

    Attributes:
        budget: slots per (layer, kv head) after an event; on average over all heads for scope "model".
        period: tokens between events.
        temperature: of the draw; 0 evicts the lowest scores.
        pool: a draw of n takes from the pool * n lowest scores (ForesightKV: 2); 0: from all candidates.
        sinks, recent: guards.
        scope: "layer" or "model", as of Policy.
        floor: of Together, for scope "model".
        share_spread: how far the layers' shares depart from the judge's demand, in nats, in every row anew; 0: not at all.
    """

    budget: int
    period: int = 16
    temperature: float = 1.0
    pool: int = 0
    sinks: int = 4
    recent: int = 8
    scope: Literal["layer", "model"] = "layer"
    floor: float = 0.2
    share_spread: float = 0.0

    @property
    def free(self) -> int:
        """What the budget holds beyond guards, fresh block and one slot."""
        return self.budget - Guard(self.sinks, self.recent).reserved(self.period) - 1


@dataclass(frozen=True)
class EventDraws:
    """One event: as Races without E; a race of all heads has heads that are `width` slots wide."""

    pool: Tensor
    order: Tensor
    tokens: Tensor
    end: Tensor
    width: int

    def widened(self, width: int, joint: bool) -> EventDraws:
        """The same with heads of `width` slots, where heads lie side by side in a race."""
        if not joint:
            return self
        order = self.order // self.width * width + self.order % self.width
        pool = self.pool.unflatten(-1, (-1, self.width))
        pool = torch.nn.functional.pad(pool, (0, width - self.width)).flatten(-2)
        return replace(self, pool=pool, order=torch.where(self.order == NOTHING, NOTHING, order), width=width)


@dataclass
class SamplingPolicy:
    """A governor that draws what to evict and takes everything down.

    Args:
        noisy: bool [L, B], where the draw is random; elsewhere the lowest scores go, and the draw is not taken down.
        length: columns of the text.
        words: int64 [B], what each row's noise is hashed from (ops.hashing), with layer, head, token and event.
        features, events: what is taken down.
        shifts: of the layers' shares in each row, float32 [B, L], drawn if the terms say so.
        allocator: see Governor.
    """

    terms: SamplingTerms
    scorer: SlotScorer
    noisy: Tensor
    length: int
    words: Tensor
    name: str = "explorer"
    probe: None = None
    features: dict[int, list[Tensor]] = field(default_factory=dict)
    events: dict[tuple[int, ...], list[EventDraws]] = field(default_factory=dict)
    shifts: Tensor | None = None
    allocator: Allocator = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        demand = self.scorer.demand
        if self.scope == "model":
            self.allocator = Together(self.terms.floor)
        elif demand is not None:
            if self.terms.share_spread:
                self.shifts = draw_shifts(self.words, len(demand.level), self.terms.share_spread)
            self.allocator = demand.allocator(self.shifts)

    @property
    def tried(self) -> Tensor | None:
        """Logits of the layers' shares in each row [B, L]; None where nothing but the judge's own were used."""
        demand = self.scorer.demand
        if self.shifts is None or demand is None:
            return None
        return demand.logits(self.terms.free).detach() + self.shifts

    @property
    def scope(self) -> Literal["layer", "model"]:
        """See Governor."""
        return self.terms.scope

    @property
    def budget(self) -> Budget:
        """See Governor."""
        return Budget(self.terms.budget)

    @property
    def schedule(self) -> Schedule:
        """See Governor."""
        return Schedule(self.terms.period)

    @property
    def guard(self) -> Guard:
        """See Governor."""
        return Guard(self.terms.sinks, self.terms.recent)

    def keep(self, signals: Signals) -> Tensor:
        """EventDraws the evictions of this event, head by head."""
        return self._decide([signals])[0]

    def keep_together(self, layers: Sequence[Signals]) -> list[Tensor]:
        """EventDraws the evictions of this event from all heads of all layers."""
        return self._decide(layers)

    def _decide(self, layers: Sequence[Signals]) -> list[Tensor]:
        """EventDraws, take down, and say what stays in each layer."""
        first, names = layers[0], tuple(signals.layer for signals in layers)
        by_head = [self._judged(signals) for signals in layers]
        held = [signals.occupied for signals in layers]
        guarded = [self.guard.protect(signals) for signals in layers]
        scores, occupied = laid_out(by_head, 0.0), laid_out(held, False)
        due = (first.rows.seen % self.terms.period == 0) & (first.rows.seen > first.budget)
        heads = sum(part.shape[1] for part in held) // occupied.shape[1]
        count = (occupied.sum(-1) - heads * first.budget.view(-1, 1)).clamp_min(0) * due.view(-1, 1)
        pool = laid_out(self._contested(layers, by_head, guarded), False)
        pool = lowest_scores(scores, pool, self.terms.pool * count) if self.terms.pool else pool
        pool = pool & (count > 0).unsqueeze(-1)
        noise = laid_out([self._noise(signals) for signals in layers], 0.0)
        drawn = draw_evictions(scores, pool, count, self.terms.temperature, noise)
        noisy = self.noisy[list(names)].any(0).view(-1, 1, 1)
        order = torch.where(noisy, drawn, draw_evictions(scores, pool, count, 0.0))
        gone = torch.zeros_like(occupied).scatter(-1, order.clamp_min(0), order != NOTHING)
        taken = torch.where(noisy, order, NOTHING)
        where = EventDraws(
            pool, taken, self._tokens(layers, taken), first.rows.now.long() + 1, max(part.shape[-1] for part in held)
        )
        self.events.setdefault(names, []).append(where)
        return apart(occupied & ~gone, held)

    def _judged(self, signals: Signals) -> Tensor:
        """Scores [B, H, N], and the judge's inputs taken down."""
        statistics = self.scorer.statistics(signals)
        parts = [
            self.scorer.features(keys, values, statistics[:, :, part]) for part, keys, values in signals.slots.chunks()
        ]
        features = torch.cat(parts, dim=2)
        self.features.setdefault(signals.layer, []).append(features)
        return self.scorer.score_features(signals.layer, features)

    def _noise(self, signals: Signals) -> Tensor:
        """Uniform in [0, 1), float32 [B, H, N]; a token's own, wherever it is stored and whatever else is in the batch."""
        place = signals.place.long()
        head = torch.arange(place.shape[1], device=place.device).view(-1, 1)
        event = hashed(self.words, signals.layer, signals.rows.seen).view(-1, 1, 1)
        return uniform(hashed(event, head, place))

    def _contested(self, layers: Sequence[Signals], scores: list[Tensor], guarded: list[Tensor]) -> list[Tensor]:
        """What may be drawn, bool [B, H, N] of every layer: all but guards, and but what a floor leaves to every head."""
        free = [signals.occupied & ~guard for signals, guard in zip(layers, guarded, strict=True)]
        if self.scope == "layer":
            return free
        heads = sum(part.shape[1] for part in free)
        places = heads * layers[0].budget.long() - torch.stack([part.sum((1, 2)) for part in guarded]).sum(0)
        own = Together(self.terms.floor).least(places.clamp_min(0), heads).view(-1, 1)
        found = list[Tensor]()
        for signals, part, score in zip(layers, free, scores, strict=True):
            ranked = score.masked_fill(~part, -torch.inf)
            place = torch.where(part, signals.position, EMPTY)
            found.append(part & ~keep_top(ranked, place, own.expand(part.shape[:2])))
        return found

    def _tokens(self, layers: Sequence[Signals], order: Tensor) -> Tensor:
        """See Races.tokens."""
        heads = layers[0].position.shape[1]
        row = torch.arange(heads, device=order.device).view(1, -1, 1)
        places = [
            signals.position.long() + (row + number * heads) * self.length for number, signals in enumerate(layers)
        ]
        found = laid_out(places, 0).gather(-1, order.clamp_min(0))
        return torch.where(order == NOTHING, NOTHING, found)


def laid_out(parts: Sequence[Tensor], fill: float) -> Tensor:
    """One layer [..., H, n] as it is; several side by side as one race [..., 1, L * H * width]."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    wide = [torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts]
    return torch.cat(wide, -2).flatten(-2).unsqueeze(-2)


def apart(kept: Tensor, held: list[Tensor]) -> list[Tensor]:
    """The opposite of `laid_out`, for shapes as of `held`."""
    if len(held) == 1:
        return [kept]
    width = max(part.shape[-1] for part in held)
    parts = kept.squeeze(1).unflatten(-1, (-1, width)).split([part.shape[1] for part in held], dim=1)
    return [part[..., : like.shape[-1]] for part, like in zip(parts, held, strict=True)]
