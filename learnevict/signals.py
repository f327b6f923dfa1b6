"""Signals, what a policy may look at: one layer at one moment; and Trace, the eviction history that it leaves behind.

Slots have no order: `position` says which token a slot holds (-1: none).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

NEVER = 2**31 - 1
EMPTY = -1


@dataclass(frozen=True)
class StateColumn:
    """Per-slot state that lives and dies with its slot, [B, H, N, *shape]; `fill` in a slot just taken."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: float = 0.0


class Slots(Protocol):
    """Read access to stored keys and values, whatever the storage (dense pool or pages)."""

    @property
    def position(self) -> Tensor:
        """int32 [B, H, N]: the token each slot holds, -1 where empty."""
        ...

    @property
    def room(self) -> int:
        """Slots of storage per row and head, on average; N may be larger where heads share storage."""
        ...

    def logits(self, query: Tensor) -> Tensor:
        """Returns the unscaled products of [B, H, R, d] with every slot's key, [B, H, R, N]."""
        ...

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields slot ranges with their keys and values [B, H, n, d], each smaller than half of the layer's keys."""
        ...


def queries_at_a_time(slots: Slots, query: Tensor) -> int:
    """Returns how many of the queries [B, Hq, S, d] may meet all slots at once, so that their logits stay below the keys."""
    heads, num = slots.position.shape[1:]
    return max(1, query.shape[-1] * slots.room // (2 * (query.shape[1] // heads) * max(num, 1)))


@dataclass(frozen=True)
class Rows:
    """Where each row of the batch stands; every field int32 [B].

    Positions are columns of the (padded) input. `first`: first real token. `now`: last real token. `seen`: real tokens.
    `block`: first token after the last event (the fresh block starts here). `prompt_end`: first token after the prompt.
    `runs`, where padding stands between real tokens, as between the turns of a batch: int32 [2, B, R], the columns where
    stretches without padding begin (NEVER where a row has fewer), and columns less real tokens before them; else None.
    """

    first: Tensor
    now: Tensor
    seen: Tensor
    block: Tensor
    prompt_end: Tensor
    runs: Tensor | None = None

    def place(self, column: Tensor) -> Tensor:
        """Returns how many real tokens of its row stand before each of the columns int32 [B, ...]: the unpadded position."""
        if self.runs is None:
            return column - self.first.view(-1, *[1] * (column.ndim - 1))
        flat = column.reshape(column.shape[0], -1).contiguous()
        run = torch.searchsorted(self.runs[0], flat, right=True).sub_(1).clamp_min_(0)
        return (flat - self.runs[1].gather(1, run)).view_as(column)

    def age(self, column: Tensor) -> Tensor:
        """Returns how many real tokens of its row were read since each of the columns int32 [B, ...]; 0 for the newest."""
        shape = (-1, *[1] * (column.ndim - 1))
        if self.runs is None:
            return self.now.view(shape) - column
        return self.seen.view(shape) - 1 - self.place(column)


@dataclass(frozen=True)
class Attention:
    """How logits become probabilities in this layer: scaling, optional softcap, optional attention sinks [Hq].

    `frequencies` [r]: radians per position by which RoPE rotates dimensions f and f + r of queries and keys (f < r; the rest
    stays); None if the model has no such embedding. `window`: tokens that a layer with a sliding window sees; None elsewhere.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    frequencies: Tensor | None = None
    window: int | None = None

    def scores(self, logits: Tensor) -> Tensor:
        """Returns what the softmax sees: scaled, capped, float32."""
        scores = logits.float() * self.scaling
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def probabilities(self, logits: Tensor, visible: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns the softmax over slots, in float32; rows that see nothing become zeros.

        Args:
            logits: [B, H, G, S, N], unscaled.
            visible: bool, broadcastable to logits.
            bias: float32, broadcastable to logits, added after scaling and cap; never a factor, which would favour
                negative logits.
        """
        scores = self.scores(logits) if bias is None else self.scores(logits) + bias
        scores = scores.masked_fill(~visible, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        sink = None
        if self.sinks is not None:
            sink = self.sinks.float().view(1, scores.shape[1], scores.shape[2], 1, 1)
            top = torch.maximum(top, sink)
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = (scores - top).exp_()
        total = weights.sum(-1, keepdim=True)
        if sink is not None:
            total = total + (sink - top).exp()
        return weights / total.clamp_min(torch.finfo(torch.float32).tiny)

    def beside(self, stored: Tensor, own: Tensor, visible: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Returns the softmax over slots and, causally, over keys of tokens that are only run to ask, float32, in two parts.

        Args:
            stored: [B, H, G, P, N], unscaled logits of the slots.
            own: [B, H, G, P, K], of the tokens' own keys; the first query is that of key number `first`.
            visible: bool, broadcastable to `stored`.
        """
        causal = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).tril(first)
        stored = self.scores(stored).masked_fill(~visible, -torch.inf)
        own = self.scores(own).masked_fill(~causal, -torch.inf)
        top = torch.maximum(stored.detach().amax(-1, keepdim=True), own.detach().amax(-1, keepdim=True))
        drain: Tensor | float = 0.0
        if self.sinks is not None:
            sink = self.sinks.float().view(1, own.shape[1], -1, 1, 1)
            top = torch.maximum(top, sink.detach())
            drain = (sink - top).exp()
        stored, own = (stored - top).exp(), (own - top).exp()
        total = stored.sum(-1, keepdim=True) + own.sum(-1, keepdim=True) + drain
        return stored / total, own / total


@dataclass(frozen=True)
class Signals:
    """One layer at one moment, as shown to a policy.

    Attributes:
        layer: index of the layer in the model.
        slots: keys and values held; `position` is int32 [B, H, N].
        rows: where each row of the batch stands.
        budget: int32 [B], slots to hold per kv head after this event, on average over the heads of the layer.
        state: named columns, [B, H, N, ...].
        query: fresh queries, post-RoPE [B, Hq, S, d]; `query_position` int32 [B, S] (-1: padding).
        key, value: fresh keys [B, H, S, d], post-RoPE, and values [B, H, S, dv], the ones being entered.
        hidden: fresh inputs of the attention module [B, S, E]; None in a replay from stored queries.
        tokens: fresh token ids [B, S]; None when the model was called with embeddings.
        attention: how logits become probabilities.
        ring: the last W queries and their positions ([B, Hq, W, d], int32 [B, W]); empty unless the scorer asks.
        fresh_attention: float32 [B, H, G, S, N], fresh queries over all slots; only while a scorer that needs it observes.
        probe_attention: float32 [B, H, G, P, N], what the probe's tokens attend to; only for a policy with a probe.
    """

    layer: int
    slots: Slots
    rows: Rows
    budget: Tensor
    state: Mapping[str, Tensor]
    query: Tensor
    query_position: Tensor
    attention: Attention
    key: Tensor | None = None
    value: Tensor | None = None
    hidden: Tensor | None = None
    tokens: Tensor | None = None
    ring: tuple[Tensor, Tensor] | None = None
    fresh_attention: Tensor | None = None
    probe_attention: Tensor | None = None
    memo: dict[str, Tensor] = field(default_factory=dict)

    @property
    def position(self) -> Tensor:
        """int32 [B, H, N], -1 = empty."""
        return self.slots.position

    @property
    def occupied(self) -> Tensor:
        """bool [B, H, N]."""
        return self.slots.position >= 0

    @property
    def age(self) -> Tensor:
        """int32 [B, H, N]: tokens since each slot's token was read; 0 for the newest, meaningless where empty."""
        return self.rows.age(self.position)

    @property
    def place(self) -> Tensor:
        """int32 [B, H, N]: the unpadded position of each slot's token; meaningless where empty."""
        return self.rows.place(self.position)

    @property
    def order(self) -> Tensor:
        """int64 [B, H, N]: slot indices from the oldest token to the newest, empty slots last."""
        if "order" not in self.memo:
            key = torch.where(self.occupied, self.position, NEVER)
            self.memo["order"] = key.argsort(dim=-1, stable=True)
        return self.memo["order"]

    def in_order(self, values: Tensor, function: Callable[[Tensor], Tensor], empty: float) -> Tensor:
        """Returns a function of neighbouring tokens, [B, H, N], for values [B, H, N] per slot.

        Args:
            values: per slot.
            function: maps [B, H, N] ordered by position to the same shape; empty slots come last, filled with `empty`.
            empty: what an empty slot contributes.
        """
        ordered = values.masked_fill(~self.occupied, empty).gather(-1, self.order)
        return torch.empty_like(values).scatter_(-1, self.order, function(ordered).to(values.dtype))

    def pieces(self, width: int = 1) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields slot ranges with keys and values [B, H, n, d], so short that `width` float32 numbers per slot stay small."""
        for part, keys, values in self.slots.chunks():
            step = max(1, self.slots.room * keys.shape[-1] * keys.element_size() // (8 * width))
            for start in range(0, keys.shape[2], step):
                stop = min(start + step, keys.shape[2])
                yield slice(part.start + start, part.start + stop), keys[:, :, start:stop], values[:, :, start:stop]

    def per_slot(self, function: Callable[..., Tensor], width: int = 1, *others: Tensor) -> Tensor:
        """Returns function(keys [B, H, n, d], values [B, H, n, dv], ...) -> [B, H, n], taken piece by piece, float32 [B, H, N].

        `others` [B, H, N or 1, ...] are handed to it too, cut as keys and values are.
        """
        out = torch.empty(self.position.shape, dtype=torch.float32, device=self.position.device)
        for part, keys, values in self.pieces(width):
            out[:, :, part] = function(keys, values, *(x if x.shape[2] == 1 else x[:, :, part] for x in others))
        return out

    def window(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the attention of the last `size` queries, a few at a time from oldest to newest: probabilities float32
        [B, H, G, w, N], zeros for missing queries, and query positions int32 [B, w]."""
        for logits, where in self.window_logits(size):
            yield self.attention.probabilities(logits, self.visible(where)), where

    def window_logits(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same before scaling, cap, visibility and softmax."""
        assert self.ring is not None, "the scorer must declare window > 0 to look back at queries"
        queries, positions = self.ring
        order = positions.argsort(-1)[:, max(queries.shape[2] - size, 0) :]
        batch, heads, num = self.position.shape
        step = queries_at_a_time(self.slots, queries)
        for start in range(0, order.shape[1], step):
            pick = order[:, start : start + step]
            index = pick.view(batch, 1, -1, 1).expand(-1, queries.shape[1], -1, queries.shape[3])
            query = queries.gather(2, index).view(batch, heads, -1, queries.shape[3])
            yield self.slots.logits(query).view(batch, heads, -1, pick.shape[1], num), positions.gather(1, pick)

    def visible(self, query_position: Tensor) -> Tensor:
        """Returns the occupied slots whose token is not after the query, bool [B, H, 1, S, N]; none for a missing query."""
        slot = self.position[:, :, None, None, :]
        return (slot >= 0) & (slot <= query_position[:, None, None, :, None])


@dataclass(frozen=True)
class Trace:
    """An eviction history. Token i of a head is visible to query t iff i <= t < expiry[i].

    Attributes:
        expiry: int32 [L, B, H, T], in columns of the padded input; NEVER where a token was not evicted.
        source: what produced it ("golden", a method's name).
        budget: slots per (layer, kv head) after an event, where one number says it.
        period: tokens between events.
        guard: sinks, recent window and prompt protection of what produced it (policy.Guard.terms); None if unknown.
    """

    expiry: Tensor
    source: str = ""
    budget: int | None = None
    period: int | None = None
    guard: tuple[int, int, bool] | None = None

    @property
    def evictions(self) -> int:
        """Number of (layer, row, head, token) entries that were evicted."""
        return int((self.expiry != NEVER).sum())

    def held(self, query: int) -> Tensor:
        """Returns how many slots query column `query` sees, int64 [L, B, H]; padding is not told apart."""
        column = torch.arange(self.expiry.shape[-1], device=self.expiry.device)
        return ((column <= query) & (self.expiry > query)).sum(-1)
