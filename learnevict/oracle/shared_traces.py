"""Golden eviction whose heads share a total: which heads deserve more slots than others?

`golden` gives every (layer, kv head) the same number of slots. Here the same labels are rolled under the same total, and the
slots lie where the labels want them: pooled over the heads of a layer (Ada-KV, arXiv 2407.11550) or of the whole model
(global ranking of arXiv 2601.17668 and 2605.09649), both above a floor that every head keeps, or in fixed numbers per
head. `profile` reads such numbers off a pooled trace: a static split that any policy can follow.

A trace made here is replayed like any other. All heads step together over whole rows of tokens, which suits texts of a few
thousand tokens; `golden` is the one for long documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Required, Unpack

from learnevict.errors import BudgetError, UsageError
from learnevict.oracle.reducers import horizon
from learnevict.oracle.traces import Labels, Protection
from learnevict.signals import NEVER, Trace

Score = Callable[[int, Int[Tensor, "L B H T"]], Float[Tensor, "L B H T"]]
"""What an event after block m scores tokens by, given expiries so far; the lowest go."""


@dataclass(frozen=True)
class Share:
    """How slots are divided.

    Attributes:
        scope: whose tokens compete: those of one "head", of a "layer", or of the whole "model".
        floor: share of an equal split, beside guards and fresh block, that every head keeps; for "layer" and "model".
        slots: int [L, H], slots of each head for scope "head"; their mean is the budget. None: all alike.
    """

    scope: Literal["head", "layer", "model"] = "model"
    floor: float = 0.2
    slots: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scope not in ("head", "layer", "model") or not 0 <= self.floor <= 1:
            raise UsageError(
                f"scope={self.scope!r}, floor={self.floor}: heads share by head, layer or model, and keep 0 to 1 of an "
                "equal split"
            )
        if self.slots is not None and self.scope != "head":
            raise UsageError(f"slots per head leave nothing to share by {self.scope}; use scope='head'")


@dataclass(frozen=True)
class Roll:
    """Texts on their event grid, and how many tokens may stay.

    Attributes:
        rank: int64 [B, T], each real token's number in its row; -1 for padding.
        limit: int64 [B, M], mean slots per head right after the event that follows block m, everything included.
        shape: layers and heads of the labels.
        block: tokens between events.
        guard: tokens that stay.
        prompt: int64 [B], tokens of prompts that the guard protects; zeros if it does not.
        share: who competes with whom.
    """

    rank: Tensor
    limit: Tensor
    shape: tuple[int, int]
    block: int
    guard: Protection
    prompt: Tensor
    share: Share = Share("head")

    @property
    def reserved(self) -> int:
        """Slots of sinks, recent tokens and a fresh block."""
        return self.guard.sinks + max(self.guard.recent, self.block)

    def candidates(self, seen: int) -> Tensor:
        """Tokens that may go once `seen` tokens of a row are read, bool [B, T]."""
        settled = (self.rank >= self.guard.sinks) & (self.rank < seen - max(self.block, self.guard.recent))
        return settled & (self.rank >= self.prompt.unsqueeze(-1))

    def trace(self, score: Score, source: str = "", budget: int | None = None) -> Trace:
        """Evict after every block whatever scores lowest."""
        layers, heads = self.shape
        expiry = torch.full((layers, len(self.rank), heads, self.rank.shape[1]), NEVER, dtype=torch.int32)
        expiry = expiry.to(self.rank.device)
        last = self.rank.amax(-1)
        for m in range((int(last.max()) + 1) // self.block):
            seen = (m + 1) * self.block
            held = (expiry == NEVER) & ((self.rank >= 0) & (self.rank < seen)).unsqueeze(1)
            excess = self._excess(held.sum(-1), m) * (last + 1 >= seen)[:, None]
            if not bool(excess.any()):
                continue
            candidate = held & self.candidates(seen).unsqueeze(1)
            victim = self._victims(score(m, expiry), candidate, excess, m)
            end = (self.rank == seen - 1).int().argmax(-1) + 1
            expiry = torch.where(victim, end[:, None, None].to(torch.int32), expiry)
        return Trace(expiry, source, budget, self.block, (self.guard.sinks, self.guard.recent, self.guard.prompt))

    def _excess(self, held: Tensor, m: int) -> Tensor:
        """Tokens that must go, [L, B, H], [L, B, 1] or [1, B, 1], of tokens held [L, B, H]."""
        limit = self.limit[:, m, None]
        if self.share.slots is not None:  # more or fewer than the mean
            slots = self.share.slots.to(held.device)[:, None]
            limit = limit + slots - slots.sum() // slots.numel()
        over = held - limit
        if self.share.scope == "head":
            return over.clamp_min(0)
        over = over.sum(-1, keepdim=True)
        return (over if self.share.scope == "layer" else over.sum(0, keepdim=True)).clamp_min(0)

    def _victims(self, scores: Tensor, candidate: Tensor, excess: Tensor, m: int) -> Tensor:
        """The lowest scores of each contest, bool [L, B, H, T]; of equal scores of a head the older goes."""
        contest = scores.masked_fill(~candidate, torch.inf)
        if self.share.scope == "head":
            return (_places(contest) < excess.unsqueeze(-1)) & candidate
        safe = (self.share.floor * (self.limit[:, m] - self.reserved - self.prompt)).long()
        best = _places(-scores.masked_fill(~candidate, -torch.inf))
        contest = contest.masked_fill(best < safe.view(-1, 1, 1), torch.inf)
        if self.share.scope == "layer":
            goes = _places(contest.flatten(2)) < excess
            return goes.view_as(scores) & candidate
        flat = contest.transpose(0, 1).flatten(1)
        goes = (_places(flat) < excess[0]).unflatten(-1, (*self.shape, -1))
        return goes.transpose(0, 1) & candidate


class GoldenOptions(TypedDict, total=False):
    """What `golden` takes too: see there."""

    budget: Required[int]
    block: Required[int]
    guard: Required[Protection]
    valid: Bool[Tensor, "B T"] | None
    prompt_length: Sequence[int] | Int[Tensor, "B"] | None


def roll_of(labels: Float[Tensor, "L B H T M"], share: Share = Share(), **terms: Unpack[GoldenOptions]) -> Roll:
    """The grid that labels lie on, under a budget.

    Raises:
        BudgetError: a head cannot hold guards and a fresh block.
        UsageError: a protected prompt of unknown length; slots per head of another mean than the budget.
    """
    layers, batch, heads, length, blocks = labels.shape
    budget, block, guard, given = terms["budget"], terms["block"], terms["guard"], terms.get("prompt_length")
    rank = ranks(terms.get("valid"), (batch, length)).to(labels.device)
    if guard.prompt and given is None:
        raise UsageError("the guard protects the prompt, but its length is unknown: give prompt_length")
    prompt = torch.as_tensor(given if guard.prompt else [0] * batch, device=labels.device).long()
    seen = torch.arange(1, blocks + 1, device=labels.device) * block
    limit = budget - (block == 1) + prompt.unsqueeze(-1).minimum(seen)
    roll = Roll(rank, limit, (layers, heads), block, guard, prompt, share)
    slots = share.slots
    if slots is not None and (slots.shape != roll.shape or int(slots.sum()) != budget * slots.numel()):
        raise UsageError(
            f"slots of shape {tuple(slots.shape)} with sum {int(slots.sum())} do not share out {budget} slots on average over "
            f"{layers} layers of {heads} heads; make them with slots_of"
        )
    least, smallest = budget if slots is None else int(slots.min()), roll.reserved + (block == 1)
    if least < smallest:
        raise BudgetError(
            f"a head with {least} slots cannot hold {guard.sinks} sinks, {guard.recent} recent tokens and a fresh block of "
            f"{block}; the smallest that works is {smallest}"
        )
    return roll


def ranks(valid: Bool[Tensor, "B T"] | None, shape: tuple[int, int]) -> Int[Tensor, "B T"]:
    """Each real token's number in its row, -1 for padding."""
    real = torch.ones(shape, dtype=torch.bool) if valid is None else valid
    return torch.where(real, real.long().cumsum(-1) - 1, -1)


@torch.no_grad()
def golden_shared(
    labels: Labels, share: Share = Share(), kind: Literal["max", "sum"] = "max", **terms: Unpack[GoldenOptions]
) -> Trace:
    """Evict with hindsight like `golden`, with slots divided as `share` says.

    Args:
        labels: of every layer, [B, H, T, M] each.
        share: who competes with whom.
        kind: the horizon.
        **terms: as of `golden`; the budget is the mean of all heads.

    Raises:
        UsageError: some layers stay stock; see also `roll_of`.
    """
    stacked = torch.stack([layer for layer in labels if layer is not None])
    if len(stacked) < len(labels):
        raise UsageError("golden_shared divides the slots of all layers, but some stay stock and have no labels")
    future = torch.nn.functional.pad(horizon(stacked, kind), (0, 1))
    roll = roll_of(stacked, share, **terms)
    return roll.trace(lambda m, _: future[..., m + 1], f"golden by {share.scope}", terms["budget"])


def profile(trace: Trace, valid: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "L H"]:
    """Mean slots that each head holds right after events, over rows and events at which the whole budget is held.

    Raises:
        UsageError: a trace of unknown budget or period, or one that never held its budget.
    """
    if trace.budget is None or trace.period is None:
        raise UsageError(f"a profile needs a trace that knows budget and period, not one from {trace.source!r}")
    expiry = trace.expiry
    rank = ranks(valid, (expiry.shape[1], expiry.shape[3])).to(expiry.device)
    total, count = torch.zeros(expiry.shape[0], expiry.shape[2], device=expiry.device), 0
    for seen in range(trace.period, int(rank.max()) + 2, trace.period):
        held = held_after(expiry, rank, seen).float()
        full = (rank == seen - 1).any(-1) & (held.mean((0, 2)) >= trace.budget - 0.5)
        total, count = total + held[:, full].sum(1), count + int(full.sum())
    if not count:
        raise UsageError(f"the texts are too short for a budget of {trace.budget}: nothing was evicted")
    return total / count


def held_after(expiry: Int[Tensor, "L B H T"], rank: Int[Tensor, "B T"], seen: int) -> Int[Tensor, "L B H"]:
    """Slots held right after the event at `seen` tokens; anything for rows that are shorter."""
    end = (rank == seen - 1).int().argmax(-1) + 1
    return ((expiry > end[:, None, None]) & ((rank >= 0) & (rank < seen)).unsqueeze(1)).sum(-1)


def slots_of(free: Float[Tensor, "L H"], budget: int, reserved: int) -> Int[Tensor, "L H"]:
    """Whole slots per head: what is reserved in all, and the rest in the given proportions; their mean is the budget.

    Args:
        free: what each head holds beyond `reserved`, in any unit, such as `profile(trace) - reserved`.
        budget: mean slots.
        reserved: slots that every head has: guards and a fresh block.
    """
    rest = (budget - reserved) * free.numel()
    exact = free.double().clamp_min(0)
    exact = exact / exact.sum() * rest
    whole = exact.floor()
    place = (whole - exact).flatten().argsort(stable=True)[: rest - int(whole.sum())]
    whole.view(-1)[place] += 1
    return reserved + whole.long()


def _places(scores: Tensor) -> Tensor:
    """Each score's place in ascending order along the last dimension, int64; of equal ones the first is lower."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
