"""One layer of one batch as a policy meets it: whole texts as they are written, and single events of the event loop.

Tokens stand at their unpadded positions, as in a block of the event loop: a gate cannot tell training from inference.
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
    """Which columns of a padded batch hold the real tokens: unpadded position t is a row's real token number t.

    Attributes:
        order: int64 [B, T], columns of real tokens from first to last, then those of padding.
        column: int32 [B, T], the same, -1 for padding.
        length: int64 [B], real tokens.
        tokens: int64 [B, T], ids by unpadded position.
    """

    order: Tensor
    column: Tensor
    length: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, input_ids: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> UnpaddedPositions:
        """Returns the positions of texts, given their ids and which columns hold real tokens."""
        order = (~valid).to(torch.int8).argsort(dim=-1, stable=True)
        column = torch.where(valid.gather(1, order), order, EMPTY).int()
        return cls(order, column, valid.sum(-1), input_ids.gather(1, order))

    @property
    def index(self) -> Tensor:
        """The unpadded positions 0 to T - 1, int64 [T]."""
        return torch.arange(self.order.shape[1], device=self.order.device)

    def rows(self, seen: Int[Tensor, "B"], period: int) -> Rows:
        """Returns the state of rows that have read `seen` tokens, the last `period` of them since the last event."""
        at = torch.stack([torch.zeros_like(seen), seen - 1, (seen - period).clamp_min(0), self.length - 1], -1)
        first, now, block, end = self.column.gather(1, at.clamp_min(0)).unbind(-1)
        return Rows(first, now, seen.int(), block, end + 1)

    def draw_event(self, guard: Guard, period: int, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a random event of each row after which text follows and at which something may be evicted.

        Args:
            drawn: from [0, 1), float32 [B].

        Returns:
            The tokens seen by then, int64 [B], multiples of `period`; bool [B], whether the row has such an event.
        """
        low = (guard.reserved(period) // period + 1) * period
        choices = torch.div(self.length - 1 - low, period, rounding_mode="floor") + 1
        event = (drawn * choices).long().clamp_min(0)
        return (low + period * event).minimum(self.length), choices > 0


@dataclass(frozen=True)
class LayerBatch:
    """What one layer received of a batch, by unpadded position, and the oracle's labels of it.

    Attributes:
        layer: its index.
        positions: of the batch.
        received: queries, keys, values and hidden states.
        labels: float32, by columns: [B, H, T], or [B, H, T, M] with entry m for an event before block m of the text; None
            where nothing is learned.
        expiry: int32 [B, H, T], if the batch was read under eviction.
    """

    layer: int
    positions: UnpaddedPositions
    received: Received
    labels: Tensor | None = None
    expiry: Tensor | None = None

    @classmethod
    def of(
        cls,
        layer: int,
        positions: UnpaddedPositions,
        received: Received,
        labels: Tensor | None = None,
        expiry: Tensor | None = None,
    ) -> LayerBatch:
        """Returns the layer's batch, from what came by columns."""
        if expiry is not None:
            expiry = expiry.gather(-1, positions.order.unsqueeze(1).expand_as(expiry))
        return cls(layer, positions, received.at(positions.order), labels, expiry)

    def targets(self, block: Tensor) -> Tensor:
        """Returns the labels by unpadded position, [B, H, T]; of block labels those of one block per token."""
        labels, at = self.labels, self.positions.order
        assert labels is not None
        if labels.ndim == 4:
            at = at * labels.shape[-1] + block.clamp_max(labels.shape[-1] - 1)
            labels = labels.flatten(2)
        return labels.gather(-1, at.unsqueeze(1).expand(-1, labels.shape[1], -1))

    def written_targets(self, period: int, num_sinks: int) -> tuple[Tensor, Tensor]:
        """Returns targets [B, H, T] and candidates bool [B, 1, T], by unpadded position, of tokens scored as they are written.

        Sinks are no candidates. Labels of blocks of `period` tokens count from the block after the token's own.
        """
        index, length = self.positions.index, self.positions.length.unsqueeze(-1)
        candidates = (index < length) & (index >= num_sinks)
        if self.labels is not None and self.labels.ndim == 4:
            candidates &= index // period < (length - 1) // period
        return self.targets(index // period + 1), candidates.unsqueeze(1)

    def written(self, columns: Iterable[StateColumn]) -> Signals:
        """Returns the whole texts as one block of fresh tokens, entered into an empty cache with these state columns."""
        key, value = (part[:, :, :1] for part in (self.received.key, self.received.value))
        empty = torch.full(key.shape[:3], EMPTY, dtype=torch.int32, device=key.device)
        length, tokens = self.positions.length, self.positions.tokens
        return Signals(
            layer=self.layer,
            slots=Sequence(key, value, empty),
            rows=self.positions.rows(length, tokens.shape[1]),
            budget=length.int(),
            state={column.name: _filled(column, empty) for column in columns},
            query_position=self.positions.column,
            tokens=tokens,
            **vars(self.received),
        )

    def state(self, written: dict[str, Tensor], columns: Iterable[StateColumn]) -> dict[str, Tensor]:
        """Returns the state of all tokens, [B, H, T, ...]: what the scorer wrote, and the fill of all other columns."""
        like = self.positions.column.unsqueeze(1).expand(self.received.key.shape[:3])
        return {one.name: written.get(one.name, _filled(one, like)) for one in columns}

    def event(
        self, seen: Int[Tensor, "B"], period: int, budget: Tensor, state: dict[str, Tensor], window: int = 0
    ) -> Signals:
        """Returns the event after `seen` tokens of each row, multiples of `period`: the slots, the last block fresh.

        Args:
            budget: int32 [B].
            state: of all tokens.
            window: queries in the ring.
        """
        num, received = int(seen.max()), self.received
        rows = self.positions.rows(seen, period)
        column = self.positions.column[:, :num]
        position = column.masked_fill(self.positions.index[:num] >= seen.unsqueeze(-1), EMPTY)
        position = position.unsqueeze(1).expand(-1, received.key.shape[1], -1)
        if self.expiry is not None:
            position = position.masked_fill(self.expiry[:, :, :num] <= rows.now.view(-1, 1, 1), EMPTY)
        fresh, where, columns = self._last(seen, period)
        signals = Signals(
            layer=self.layer,
            slots=Sequence(received.key[:, :, :num], received.value[:, :, :num], position),
            rows=rows,
            budget=budget,
            state={name: part[:, :, :num] for name, part in state.items()},
            query_position=columns,
            tokens=self.positions.tokens.gather(1, where),
            **vars(fresh),
        )
        if not window:
            return signals
        last, _, columns = self._last(seen, window)
        return replace(signals, ring=(last.query, columns))

    def _last(self, seen: Tensor, num: int) -> tuple[Received, Tensor, Tensor]:
        """Returns the last `num` of the tokens seen, their unpadded positions [B, num] and columns, -1 before the text."""
        where = seen.unsqueeze(-1) - num + torch.arange(num, device=seen.device)
        first = where.clamp_min(0)
        return self.received.at(first), first, self.positions.column.gather(1, first).masked_fill(where < 0, EMPTY)


def _filled(column: StateColumn, like: Tensor) -> Tensor:
    """Returns a column at its fill, [B, H, N, ...] for like [B, H, N]."""
    return torch.full((*like.shape, *column.shape), column.fill, dtype=column.dtype, device=like.device)
