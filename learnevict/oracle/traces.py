"""Golden eviction: after each complete block a head forgets the tokens whose largest future label is smallest.

Greedy, with attention of the full cache that is not renormalised over survivors: a strong reference, not a bound. Departures
from ForesightKV's code (arXiv 2602.03203): budgets need not divide into blocks; guards are honoured; tokens are counted by
unpadded position, so padding changes nothing; of equal scores the older token goes; candidates are all tokens but guards and
the fresh block, where the paper takes the oldest `budget` (an option). Heads may compete for slots: over those of a layer
(Ada-KV, arXiv 2407.11550) or of the model (global ranking of arXiv 2601.17668 and 2605.09649), above a floor for each head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.errors import BudgetError, LabelError, UsageError
from learnevict.ops.select import eviction_order, highest
from learnevict.oracle.labels import check_block
from learnevict.oracle.reducers import horizon as reduce_horizon
from learnevict.policy import Guard
from learnevict.signals import NEVER, Trace

Labels = Sequence[Float[Tensor, "B H T M"] | None] | Float[Tensor, "L B H T M"]
Score = Callable[[int, Int[Tensor, "L B H T"]], Float[Tensor, "L B H T"]]
"""What an event after block m scores tokens by, given expiries so far; the lowest go."""


@dataclass(frozen=True)
class Share:
    """How slots are divided among heads: whose tokens compete, and what every head keeps.

    Attributes:
        floor: share of an equal split, beside guards and fresh block, that every head keeps; for "layer" and "model".
        slots: int [L, H], slots of each head for scope "head"; their mean is the budget. None: all alike.
    """

    scope: Literal["head", "layer", "model"] = "head"
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


EQUAL = Share()
"""All heads hold as many slots."""


@torch.no_grad()
def golden(
    labels: Labels,
    *,
    budget: int,
    block: int,
    guard: Guard,
    valid: Bool[Tensor, "B T"] | None = None,
    prompt_length: int | Sequence[int] | Int[Tensor, "B"] | None = None,
    horizon: Literal["max", "sum", "discounted"] = "max",
    discount: float | None = None,
    candidates: Literal["all", "oldest"] = "all",
    share: Share = EQUAL,
) -> Trace:
    """Returns the trace that keeps, with hindsight, what the recorded future attends to most (section 3.1 of arXiv:2602.03203).

    After block m of a row is complete, if more than `budget` slots are held, the candidates with the lowest score over blocks
    m+1, m+2, ... go. A partial last block has no event. With block = 1 (slack 0) an event leaves budget - 1, because the
    victim's slot is overwritten before the next token attends: never budget + 1 slots.

    Args:
        labels: per layer those of `future_attention` with the same block and valid; None for a stock layer.
        budget: slots per (layer, kv head) after an event, guards and fresh block included, on average over heads that
            share; with a protected prompt, slots beside the prompt.
        block: tokens between events.
        guard: tokens that stay.
        prompt_length: real prompt tokens, for all rows or each; used only if the guard protects the prompt.
        horizon, discount: how labels of blocks after the event become one score.
        candidates: "all": every held token but guards and the fresh block; "oldest": the oldest `budget` held tokens but
            guards, which may reach into the fresh block.
        share: how slots are divided among heads.

    Returns:
        expiry in columns of the padded input, NEVER for tokens not evicted, padding and stock layers.

    Raises:
        BudgetError: the budget cannot hold guards and a fresh block.
        LabelError: labels of another block or shape, or with NaN or infinity.
        UsageError: a protected prompt of unknown length; an argument that would be ignored; slots of all layers, of which some
            stay stock.
    """
    layers = list(labels)
    like = _check_labels(layers, block)
    batch, heads, length, _ = like.shape
    if horizon not in ("max", "sum", "discounted"):
        raise UsageError(f"golden scores the future by max, sum or discounted, not {horizon!r}")
    if candidates not in ("all", "oldest"):
        raise UsageError(f"candidates {candidates!r} is unknown; choose all or oldest")
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    roll = roll_of(
        valid.to(like.device), (len(layers), heads), share,
        budget=budget, block=block, guard=guard, prompt_length=prompt_length,
    )  # fmt: skip
    check_block(like, valid[0], block)
    evicting = [index for index, layer in enumerate(layers) if layer is not None]
    together = share.scope == "model" or share.slots is not None
    if together and len(evicting) < len(layers):
        raise UsageError(
            "the slots of all layers are divided, but some stay stock and have no labels; use scope='layer'"
        )
    expiry = torch.full((len(layers), batch, heads, length), NEVER, dtype=torch.int32, device=like.device)
    for group in [evicting] if together else [[index] for index in evicting]:
        given = torch.stack([layer.to(like.device) for index in group if (layer := layers[index]) is not None])
        future = torch.nn.functional.pad(reduce_horizon(given, horizon, discount=discount), (0, 1))
        part = replace(roll, shape=(len(group), heads), oldest=candidates == "oldest")
        expiry[group] = part.trace(lambda m, _, future=future: future[..., m + 1]).expiry
    source = "golden" if share.scope == "head" else f"golden by {share.scope}"
    return Trace(expiry, source, budget, block, guard.terms)


@dataclass(frozen=True)
class Roll:
    """The event grid of texts, and how many tokens may stay.

    Attributes:
        position: int64 [B, T], each real token's unpadded position; -1 for padding.
        limit: int64 [B, M], mean slots per head right after the event that follows block m, everything included.
        shape: layers and heads.
        prompt: int64 [B], tokens of prompts that the guard protects; zeros if it does not.
        oldest: only the oldest tokens that fit into the limit may go.
    """

    position: Tensor
    limit: Tensor
    shape: tuple[int, int]
    block: int
    guard: Guard
    prompt: Tensor
    share: Share = EQUAL
    oldest: bool = False

    def candidates(self, position: Int[Tensor, "*L B H N"], m: int) -> Bool[Tensor, "*L B H N"]:
        """Returns which tokens, given by their unpadded positions, may go after block m."""
        prompt, seen = self.prompt.view(-1, 1, 1), (m + 1) * self.block
        if not self.oldest:
            return evictable(position, seen, prompt, self.guard, self.block)
        beside = ((position >= prompt) & (position < seen)).cumsum(-1)
        fits = beside <= self.limit[:, m].view(-1, 1, 1) - prompt.clamp(max=seen)
        return fits & evictable(position, seen, prompt, self.guard, block=0)

    def trace(self, score: Score) -> Trace:
        """Returns the trace of evicting after every block what scores lowest.

        `held` is int64 [L, B, H, N], ascending unpadded positions, with T (an empty place) where a head holds fewer.
        """
        (layers, heads), (rows, num), device = self.shape, self.position.shape, self.position.device
        length = self.position.amax(-1).view(-1, 1, 1) + 1
        columns = (self.position < 0).to(torch.int8).argsort(dim=-1, stable=True)  # real tokens first, then padding
        columns = torch.nn.functional.pad(columns, (0, 1), value=num)
        column_of = columns[:, None].expand(layers, -1, heads, -1)
        held = torch.empty(layers, rows, heads, 0, dtype=torch.int64, device=device)
        expiry = torch.full((layers, rows, heads, num + 1), NEVER, dtype=torch.int32, device=device)
        for m in range(int(length.max()) // self.block):
            seen = (m + 1) * self.block
            fresh = torch.arange(m * self.block, seen, device=device).where(length >= seen, num)
            held = torch.cat([held, fresh.expand(layers, -1, heads, -1)], -1)
            excess = self._excess((held < num).sum(-1), m) * (length[..., 0] >= seen)
            if bool(excess.any()):
                where = column_of.gather(-1, held)
                scores = score(m, expiry[..., :num]).gather(-1, where.clamp(max=num - 1))
                victim = self._victims(scores, self.candidates(held, m), excess, m)
                end = (columns[:, seen - 1].to(torch.int32) + 1).view(-1, 1, 1)
                expiry.scatter_(-1, where.where(victim, num), end.expand_as(where).contiguous())
                held = held.masked_fill(victim, num)
            held = held.sort(-1).values[..., : int((held < num).sum(-1).max())]
        return Trace(expiry[..., :num], period=self.block, guard=self.guard.terms)

    def _excess(self, held: Tensor, m: int) -> Tensor:
        """Returns how many tokens must go, [L, B, H], [L, B, 1] or [1, B, 1], of tokens held [L, B, H]."""
        limit = self.limit[:, m, None]
        if self.share.slots is not None:  # more or fewer than the mean
            slots = self.share.slots.to(held.device)[:, None]
            limit = limit + slots - slots.sum() // slots.numel()
        over = held - limit
        if self.share.scope != "head":
            over = over.sum(-1, keepdim=True)
        if self.share.scope == "model":
            over = over.sum(0, keepdim=True)
        return over.clamp_min(0)

    def _victims(self, scores: Tensor, candidate: Tensor, excess: Tensor, m: int) -> Tensor:
        """Returns the lowest scores of each contest, bool [L, B, H, N]; of equal scores of a head the older goes."""
        contest = scores.masked_fill(~candidate, torch.inf)
        if self.share.scope == "head":
            return (eviction_order(contest) < excess.unsqueeze(-1)) & candidate
        reserved = self.guard.reserved(self.block)
        floor = (self.share.floor * (self.limit[:, m] - reserved - self.prompt)).long()
        contest = contest.masked_fill(highest(scores.masked_fill(~candidate, -torch.inf), floor.view(-1, 1)), torch.inf)
        if self.share.scope == "layer":
            goes = eviction_order(contest.flatten(2)) < excess
            return goes.view_as(scores) & candidate
        goes = eviction_order(contest.transpose(0, 1).flatten(1)) < excess[0]
        return goes.unflatten(-1, (*self.shape, -1)).transpose(0, 1) & candidate


def roll_of(
    valid: Bool[Tensor, "B T"],
    shape: tuple[int, int],
    share: Share = EQUAL,
    *,
    budget: int,
    block: int,
    guard: Guard,
    prompt_length: int | Sequence[int] | Int[Tensor, "B"] | None = None,
) -> Roll:
    """Returns the event grid of texts under a budget, for labels of `shape` layers and heads; arguments as of `golden`.

    Raises:
        BudgetError: a head cannot hold guards and a fresh block.
        UsageError: a protected prompt of unknown length; slots per head of another mean than the budget.
    """
    position = unpadded_positions(valid)
    if guard.prompt and prompt_length is None:
        raise UsageError("the guard protects the prompt, but its length is unknown: give prompt_length")
    prompt = torch.as_tensor(prompt_length if guard.prompt else 0, device=position.device).long().expand(len(position))
    lengths = position.amax(-1) + 1
    if bool((prompt < 0).any()) or bool((prompt > lengths).any()):
        raise UsageError(f"prompt_length {prompt.tolist()} must lie within the rows' real tokens {lengths.tolist()}")
    slots = share.slots
    if slots is not None and (slots.shape != shape or int(slots.sum()) != budget * slots.numel()):
        raise UsageError(
            f"slots of shape {tuple(slots.shape)} with sum {int(slots.sum())} do not share out {budget} slots on average over "
            f"{shape[0]} layers of {shape[1]} heads"
        )
    least = budget if slots is None else int(slots.min())
    smallest = int((guard.sinks - prompt).clamp_min(0).max()) + max(guard.recent, block) + (block == 1)
    if least < smallest:
        raise BudgetError(
            f"budget {least} cannot hold {guard.sinks} sinks, {guard.recent} recent tokens and a fresh block of {block}; the "
            f"smallest that works is {smallest}"
        )
    seen = torch.arange(1, -(-position.shape[1] // block) + 1, device=position.device) * block
    limit = budget - (block == 1) + prompt.unsqueeze(-1).minimum(seen)
    return Roll(position, limit, shape, block, guard, prompt, share)


def unpadded_positions(valid: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Returns each real token's number in its row, -1 for padding."""
    return torch.where(valid, valid.long().cumsum(-1) - 1, -1)


def evictable(
    position: Int[Tensor, "*L B H N"], seen: int | Tensor, prompt: Int[Tensor, "B 1 1"], guard: Guard, block: int
) -> Bool[Tensor, "*L B H N"]:
    """Returns which tokens may go once `seen` are read: all but sinks, recent tokens, fresh block and `prompt` first tokens."""
    return (position >= prompt.clamp_min(guard.sinks)) & (position < seen - max(guard.recent, block))


def _check_labels(layers: list[Tensor | None], block: int) -> Tensor:
    """Returns one of the layers, after all were found to agree."""
    given = [layer for layer in layers if layer is not None]
    if not given or block < 1:
        raise UsageError(f"golden needs labels of at least one layer and a block of at least 1 token, not {block}")
    num_tokens, num_blocks = given[0].shape[2:]
    if num_blocks != (expected := math.ceil(num_tokens / block)):
        raise LabelError(
            f"labels of another block: {num_tokens} tokens in blocks of {block} make {expected} label blocks, but "
            f"{num_blocks} were given; compute labels with block={block}"
        )
    for layer in given:
        if layer.shape != given[0].shape:
            raise LabelError(
                f"layers disagree: labels [B, H, T, M] of {tuple(given[0].shape)} and {tuple(layer.shape)}"
            )
        if not bool((layer < torch.inf).all()):
            raise LabelError("labels contain NaN or +infinity; were queries or keys of a diverged model recorded?")
    return given[0]
