"""One layer of one batch as a policy would meet it: whole texts as they are written, and moments of them as events see them.

Rows are moved to row time, real tokens first, as in a block of the event loop: a gate cannot tell training from inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from learnevict.infer.soft import Sequence
from learnevict.oracle import Received
from learnevict.policy import Guard
from learnevict.signals import EMPTY, Rows, Signals, StateColumn


@dataclass(frozen=True)
class UnpaddedPositions:
    """Where the real tokens of a batch stand.

    Attributes:
        order: int64 [B, T], columns of real tokens from first to last, then those of padding.
        column: int32 [B, T], the same, -1 for padding.
        length: int64 [B], real tokens.
        tokens: int64 [B, T], ids in row time.
    """

    order: Tensor
    column: Tensor
    length: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, input_ids: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> UnpaddedPositions:
        """Of padded texts."""
        order = (~valid).to(torch.int8).argsort(dim=-1, stable=True)
        column = torch.where(valid.gather(1, order), order, EMPTY).int()
        return cls(order, column, valid.sum(-1), input_ids.gather(1, order))

    @property
    def rank(self) -> Tensor:
        """int64 [T], row time."""
        return torch.arange(self.order.shape[1], device=self.order.device)

    def rows(self, seen: Int[Tensor, "B"], period: int) -> Rows:
        """Where the rows stand when they have read so many tokens, the last `period` of them since the last event."""
        at = torch.stack([torch.zeros_like(seen), seen - 1, (seen - period).clamp_min(0), self.length - 1], -1)
        first, now, block, end = self.column.gather(1, at.clamp_min(0)).unbind(-1)
        return Rows(first, now, seen.int(), block, end + 1)

    def verdict(self, labels: Tensor, block: Tensor) -> Tensor:
        """Labels in row time, [B, heads, T]: those of one `block` per token, if labels are of blocks.

        Args:
            labels: by columns, [B, heads, T] or [B, heads, T, M].
            block: int64, broadcast to [B, T]; past the last one, the last one.
        """
        at = self.order
        if labels.ndim == 4:
            at = at * labels.shape[-1] + block.clamp_max(labels.shape[-1] - 1)
            labels = labels.flatten(2)
        return labels.gather(-1, at.unsqueeze(1).expand(-1, labels.shape[1], -1))

    def draw_cut(self, guard: Guard, period: int, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """A random event of each row that has candidates and a future.

        Args:
            guard: what is no candidate.
            period: tokens between events.
            drawn: from [0, 1), float32 [B].

        Returns:
            tokens seen by then, int64 [B], on the grid of `period`; bool [B], whether the row has such an event.
        """
        low = (guard.reserved(period) // period + 1) * period
        choices = torch.div(self.length - 1 - low, period, rounding_mode="floor") + 1
        event = (drawn * choices).long().clamp_min(0)
        return (low + period * event).minimum(self.length), choices > 0


@dataclass(frozen=True)
class LayerBatch:
    """What one layer received of a batch, in row time; `expiry` int32 [B, H, T] too, if the batch was read under eviction."""

    layer: int
    times: UnpaddedPositions
    received: Received
    expiry: Tensor | None = None

    @classmethod
    def of(cls, layer: int, times: UnpaddedPositions, received: Received, expiry: Tensor | None) -> LayerBatch:
        """From columns of the padded batch."""
        if expiry is not None:
            expiry = expiry.gather(-1, times.order.unsqueeze(1).expand_as(expiry))
        return cls(layer, times, received.at(times.order), expiry)

    def written(self, columns: Iterable[StateColumn]) -> Signals:
        """The whole texts as one block of fresh tokens, entered into an empty cache whose ledger has these columns."""
        key, value = (part[:, :, :1] for part in (self.received.key, self.received.value))
        empty = torch.full(key.shape[:3], EMPTY, dtype=torch.int32, device=key.device)
        ledger = {column.name: _filled(column, empty) for column in columns}
        length = self.times.length
        rows = self.times.rows(length, self.times.order.shape[1])
        fresh = (self.received, self.times.column, self.times.tokens)
        return self._signals(Sequence(key, value, empty), rows, rows.seen, ledger, fresh)

    def notes(self, written: dict[str, Tensor], columns: Iterable[StateColumn]) -> dict[str, Tensor]:
        """The ledger of all tokens, [B, H, T, ...], given what a scorer wrote; columns it did not name stand at their fill."""
        like = self.times.column.unsqueeze(1).expand(self.received.key.shape[:3])
        return {one.name: written.get(one.name, _filled(one, like)) for one in columns}

    def cut(
        self, seen: Int[Tensor, "B"], period: int, budget: Tensor, notes: dict[str, Tensor], window: int = 0
    ) -> Signals:
        """The event after `seen` tokens of each row: the slots it would find, the last block fresh.

        Args:
            seen: on the grid of `period`.
            period: tokens between events.
            budget: int32 [B].
            notes: ledger of all tokens.
            window: queries in the ring.
        """
        num, times, received = int(seen.max()), self.times, self.received
        rows = times.rows(seen, period)
        position = torch.where(times.rank[:num] < seen.unsqueeze(-1), times.column[:, :num], EMPTY)
        position = position.unsqueeze(1).expand(-1, received.key.shape[1], -1)
        if self.expiry is not None:
            position = position.masked_fill(self.expiry[:, :, :num] <= rows.now.view(-1, 1, 1), EMPTY)
        slots = Sequence(received.key[:, :, :num], received.value[:, :, :num], position)
        ledger = {name: note[:, :, :num] for name, note in notes.items()}
        signals = self._signals(slots, rows, budget, ledger, self._last(seen, period))
        if not window:
            return signals
        last, where, _ = self._last(seen, window)
        return replace(signals, ring=(last.query, where))

    def _last(self, seen: Tensor, num: int) -> tuple[Received, Tensor, Tensor]:
        """The last `num` tokens before each row's cut, their columns (-1: none) and ids."""
        rank = seen.unsqueeze(-1) - num + torch.arange(num, device=seen.device)
        at = rank.clamp_min(0)
        where = self.times.column.gather(1, at).masked_fill(rank < 0, EMPTY)
        return self.received.at(at), where, self.times.tokens.gather(1, at)

    def _signals(
        self,
        slots: Sequence,
        rows: Rows,
        budget: Tensor,
        ledger: dict[str, Tensor],
        fresh: tuple[Received, Tensor, Tensor],
    ) -> Signals:
        received, where, tokens = fresh
        return Signals(
            layer=self.layer,
            slots=slots,
            rows=rows,
            budget=budget,
            state=ledger,
            query=received.query,
            query_position=where,
            attention=received.attention,
            key=received.key,
            value=received.value,
            hidden=received.hidden,
            tokens=tokens,
        )


def _filled(column: StateColumn, like: Tensor) -> Tensor:
    """A column at its fill, [B, H, N, ...] for like [B, H, N]."""
    return torch.full((*like.shape, *column.shape), column.fill, dtype=column.dtype, device=like.device)
