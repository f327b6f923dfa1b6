"""Trajectories: texts read under sampled eviction in one forward, with every sampled eviction recorded.

Slots compete within a head, or, where all layers are ranked together, in one candidate set of all heads. Rows are copies of a
text, so a group of traces of one text is a group of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from learnevict.config import Budget
from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import prefill
from learnevict.ops import keep_top
from learnevict.ops.random import hashed, uniform
from learnevict.parts.allocators import Together
from learnevict.parts.learned import SlotScorer
from learnevict.policy import Allocator, Schedule, Uniform
from learnevict.rl.config import RefineConfig
from learnevict.rl.distribution import NOTHING, lowest_scores, sample_evictions, sample_perturbations
from learnevict.signals import EMPTY, NEVER, Signals, Trace


@dataclass(frozen=True)
class CandidateSets:
    """The evictions of some layers: E events of B rows, R candidate sets of N slots each, K evictions from a set.

    R is the number of heads of one layer, or 1 if all heads of all layers compete (then N = L * H * slots).

    Attributes:
        layers: whose slots compete.
        candidates: slots that could be evicted [B, E, R, N].
        permutation: slots in the order in which they were sampled, NOTHING behind the last [B, E, R, K].
        tokens: what these slots held: (layer among `layers` * H + head) * T + column of the text [B, E, R, K].
        end: column from which they are gone [B, E].
    """

    layers: tuple[int, ...]
    candidates: Bool[Tensor, "B E R N"]
    permutation: Int[Tensor, "B E R K"]
    tokens: Int[Tensor, "B E R K"]
    end: Int[Tensor, "B E"]

    def until(self, length: Int[Tensor, "B"]) -> CandidateSets:
        """Returns the sets without evictions after which nothing of the row's text, of this length, is predicted."""
        late = (self.end >= length.view(-1, 1) - 1)[:, :, None, None]
        return replace(
            self,
            candidates=self.candidates & ~late,
            permutation=self.permutation.masked_fill(late, NOTHING),
            tokens=self.tokens.masked_fill(late, NOTHING),
        )

    def scores(self, by_layer: dict[int, Tensor]) -> Float[Tensor, "b E R N"]:
        """Returns scores {layer: [b, E, H, n]} laid out as the sets are."""
        return side_by_side([by_layer[layer] for layer in self.layers], 0.0)


@dataclass(frozen=True)
class Trajectory:
    """The evictions of a batch of traces, and the scorer's features {layer: [B, E, H, n, in]}.

    `allocation` are the logits of the layers' budget allocation that each row was held to [B, L]; None: the scorer's own.
    """

    config: RefineConfig
    budget: int
    random_keys: Int[Tensor, "B"]
    features: dict[int, Tensor]
    sets: list[CandidateSets]
    allocation: Tensor | None


@dataclass(frozen=True)
class TextTrajectory(Trajectory):
    """A trajectory over given texts, with the base's logits along its traces."""

    logits: Float[Tensor, "B T V"]
    trace: Trace


@dataclass(frozen=True)
class SampledEvent:
    """The evictions of one event, as CandidateSets without E; a set of all heads has heads of `width` slots each."""

    candidates: Tensor
    permutation: Tensor
    tokens: Tensor
    end: Tensor
    width: int

    def widened(self, width: int, joint: bool) -> SampledEvent:
        """Returns the same with heads of `width` slots, where heads lie side by side in a set."""
        if not joint:
            return self
        permutation = self.permutation // self.width * width + self.permutation % self.width
        permutation = torch.where(self.permutation == NOTHING, NOTHING, permutation)
        candidates = self.candidates.unflatten(-1, (-1, self.width))
        candidates = pad(candidates, (0, width - self.width)).flatten(-2)
        return replace(self, candidates=candidates, permutation=permutation, width=width)


@dataclass
class SamplingPolicy:
    """A policy that samples what to evict and records it.

    Args:
        num_slots: the budget: slots per (layer, kv head) after an event, on average over all heads for scope "model".
        scorer: whose scores are sampled from.
        noisy: bool [L, B], where the choice is random; elsewhere the lowest scores go, and nothing is recorded.
        length: columns of the text.
        random_keys: int64 [B], what each row's noise is hashed from (ops.random), with layer, head, token and event.
    """

    config: RefineConfig
    num_slots: int
    scorer: SlotScorer
    noisy: Tensor
    length: int
    random_keys: Tensor
    features: dict[int, list[Tensor]] = field(default_factory=dict)
    events: dict[tuple[int, ...], list[SampledEvent]] = field(default_factory=dict)
    allocation: Tensor | None = None
    allocator: Allocator = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        config, demand = self.config, self.scorer.demand
        self.budget = Budget(self.num_slots)
        self.schedule, self.guard = Schedule(config.period), config.guard
        self.scope: Literal["layer", "model"] = "model" if config.scope == "model" else "layer"
        if self.scope == "model":
            self.allocator = Together(config.floor)
        elif demand is not None:
            perturbation = None
            if config.share_spread:
                perturbation = sample_perturbations(self.random_keys, len(demand.level), config.share_spread)
                self.allocation = demand.logits(self.num_slots - config.least).detach() + perturbation
            self.allocator = demand.allocator(perturbation)

    def keep(self, signals: Signals) -> Tensor:
        """Samples the evictions of this event, head by head."""
        return self.keep_together([signals])[0]

    def keep_together(self, layers: Sequence[Signals]) -> list[Tensor]:
        """Samples the evictions of this event from all heads of the layers, and returns what stays in each layer."""
        config, first, names = self.config, layers[0], tuple(signals.layer for signals in layers)
        by_head = [self._score(signals) for signals in layers]
        held = [signals.occupied for signals in layers]
        scores, occupied = side_by_side(by_head, 0.0), side_by_side(held, False)
        due = (first.rows.seen % config.period == 0) & (first.rows.seen > first.budget)
        heads = sum(part.shape[1] for part in held) // occupied.shape[1]
        count = (occupied.sum(-1) - heads * first.budget.view(-1, 1)).clamp_min(0) * due.view(-1, 1)
        candidates = side_by_side(self._candidates(layers, by_head), False)
        if config.pool:
            candidates = lowest_scores(scores, candidates, config.pool * count)
        candidates = candidates & (count > 0).unsqueeze(-1)
        noise = side_by_side([self._noise(signals) for signals in layers], 0.0)
        sampled = sample_evictions(scores, candidates, count, config.draw_temperature, noise)
        noisy = self.noisy[list(names)].any(0).view(-1, 1, 1)
        permutation = torch.where(noisy, sampled, sample_evictions(scores, candidates, count, 0.0))
        evicted = torch.zeros_like(occupied).scatter(-1, permutation.clamp_min(0), permutation != NOTHING)
        recorded = torch.where(noisy, permutation, NOTHING)
        width = max(part.shape[-1] for part in held)
        event = SampledEvent(candidates, recorded, self._tokens(layers, recorded), first.rows.now.long() + 1, width)
        self.events.setdefault(names, []).append(event)
        return per_layer(occupied & ~evicted, held)

    def _score(self, signals: Signals) -> Tensor:
        """Returns scores [B, H, N], and records the scorer's features."""
        statistics = self.scorer.statistics(signals)
        parts = [
            self.scorer.features(keys, values, statistics[:, :, part]) for part, keys, values in signals.slots.chunks()
        ]
        features = torch.cat(parts, dim=2)
        self.features.setdefault(signals.layer, []).append(features)
        return self.scorer.score_features(signals.layer, features)

    def _noise(self, signals: Signals) -> Tensor:
        """Returns noise in [0, 1), float32 [B, H, N], that depends on the token and not on its slot or the batch."""
        place = signals.place.long()
        head = torch.arange(place.shape[1], device=place.device).view(-1, 1)
        event = hashed(self.random_keys, signals.layer, signals.rows.seen).view(-1, 1, 1)
        return uniform(hashed(event, head, place))

    def _candidates(self, layers: Sequence[Signals], scores: list[Tensor]) -> list[Tensor]:
        """Returns what may be evicted, bool [B, H, N] of every layer: all but guards and each head's floor."""
        guarded = [self.guard.protect(signals) for signals in layers]
        free = [signals.occupied & ~guard for signals, guard in zip(layers, guarded, strict=True)]
        if self.scope == "layer":
            return free
        heads = sum(part.shape[1] for part in free)
        places = heads * layers[0].budget.long() - torch.stack([part.sum((1, 2)) for part in guarded]).sum(0)
        own = Together(self.config.floor).least(places.clamp_min(0), heads).view(-1, 1)
        found = list[Tensor]()
        for signals, part, score in zip(layers, free, scores, strict=True):
            ranked = score.masked_fill(~part, -torch.inf)
            place = torch.where(part, signals.position, EMPTY)
            found.append(part & ~keep_top(ranked, place, own.expand(part.shape[:2])))
        return found

    def _tokens(self, layers: Sequence[Signals], permutation: Tensor) -> Tensor:
        """Returns the tokens in these slots, see CandidateSets.tokens."""
        heads = layers[0].position.shape[1]
        row = torch.arange(heads, device=permutation.device).view(1, -1, 1)
        places = [one.position.long() + (row + number * heads) * self.length for number, one in enumerate(layers)]
        found = side_by_side(places, 0).gather(-1, permutation.clamp_min(0))
        return torch.where(permutation == NOTHING, NOTHING, found)


def side_by_side(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Returns one layer [..., H, n] as it is, and several side by side as one set [..., 1, L * H * width]."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    wide = [pad(part, (0, width - part.shape[-1]), value=fill) for part in parts]
    return torch.cat(wide, -2).flatten(-2).unsqueeze(-2)


def per_layer(kept: Tensor, held: list[Tensor]) -> list[Tensor]:
    """Returns the layers that `side_by_side` has laid out, with the shapes of `held`."""
    if len(held) == 1:
        return [kept]
    width = max(part.shape[-1] for part in held)
    parts = kept.squeeze(1).unflatten(-1, (-1, width)).split([part.shape[1] for part in held], dim=1)
    return [part[..., : like.shape[-1]] for part, like in zip(parts, held, strict=True)]


@torch.no_grad()
def sample_trajectory(
    model: PreTrainedModel, policy: SamplingPolicy, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
) -> TextTrajectory:
    """Reads texts, padded on the left, under a sampling policy: one trace per row."""
    with attach(model, policy, record=True) as cache:
        logits = prefill(model, cache, input_ids, attention_mask)
    found = recorded(policy, torch.full_like(input_ids[:, 0], input_ids.shape[1]))
    return TextTrajectory(**vars(found), logits=logits, trace=cache.trace())


def recorded(policy: SamplingPolicy, length: Int[Tensor, "B"]) -> Trajectory:
    """Returns what a policy has recorded, of texts of these lengths."""
    features = {layer: stack_padded(parts, 0.0) for layer, parts in sorted(policy.features.items())}
    sets = [stack_events(names, events).until(length) for names, events in sorted(policy.events.items())]
    return Trajectory(policy.config, policy.num_slots, policy.random_keys, features, sets, policy.allocation)


def stack_events(layers: tuple[int, ...], events: list[SampledEvent]) -> CandidateSets:
    """Stacks events behind the rows; slots and evictions are padded to the most of any event."""
    width = max(event.width for event in events)
    events = [event.widened(width, joint=len(layers) > 1) for event in events]
    return CandidateSets(
        layers,
        stack_padded([event.candidates for event in events], False),
        stack_padded([event.permutation for event in events], NOTHING),
        stack_padded([event.tokens for event in events], NOTHING),
        torch.stack([event.end for event in events], dim=1),
    )


def stack_padded(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Stacks tensors [B, H, n, ...] behind the rows, padded to the largest n."""
    rows, heads, _, *rest = parts[0].shape
    stacked = parts[0].new_full((rows, len(parts), heads, max(part.shape[2] for part in parts), *rest), fill)
    for event, part in enumerate(parts):
        stacked[:, event, :, : part.shape[2]] = part
    return stacked


def expired(trace: Trace) -> Tensor:
    """Returns expiry with NEVER as the length of the text, int64 [L, B, H, T]."""
    return torch.where(trace.expiry == NEVER, trace.expiry.shape[-1], trace.expiry).long()
