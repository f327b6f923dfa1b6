"""Uniform storage: one static pool of slots per layer, written in place.

A full head evicts by overwriting: the victim's slot is marked empty and the next token is written into it. An empty slot
holds zeros. No slot ever moves, nothing is concatenated, and no decision waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import add

import torch
from torch import Tensor

from learnevict.signals import EMPTY, StateColumn

Picked = tuple[Tensor, Tensor]
"""Rows, and places in a block, of some of its tokens: int64 [n] each."""


class SlotStates:
    """Positions and columns of slots, [B, H, N, ...], shared by both storages."""

    def __init__(self, batch: int, heads: int, columns: tuple[StateColumn, ...], device: torch.device) -> None:
        self.spec = columns
        self.position = torch.empty(batch, heads, 0, dtype=torch.int32, device=device)
        self.columns = {c.name: torch.empty(batch, heads, 0, *c.shape, dtype=c.dtype, device=device) for c in columns}

    def resize(self, capacity: int, pick: Tensor | None) -> None:
        """Keep the slots `pick` [B, H, n <= capacity] (None: all, in place) and add empty ones up to `capacity`."""
        self.position = resized(self.position, capacity, pick, EMPTY)
        for column in self.spec:
            self.columns[column.name] = resized(self.columns[column.name], capacity, pick, column.fill)

    def write(self, slot: Tensor, position: Tensor, notes: dict[str, Tensor]) -> None:
        """Enter fresh tokens: slot int64 [B, H, n], position int32 [B, n], notes {name: [B, H, n, ...]}."""
        place = position.unsqueeze(1).expand(-1, slot.shape[1], -1)
        self.position.scatter_(2, slot, place)
        for column in self.spec:
            target = self.columns[column.name]
            index = slot.view(*slot.shape, *([1] * len(column.shape))).expand(*slot.shape, *column.shape)
            if column.name in notes:
                target.scatter_(2, index, notes[column.name].to(column.dtype))
            else:
                target.scatter_(2, index, column.fill)

    def put(self, where: tuple[Tensor, ...], position: Tensor, notes: dict[str, Tensor]) -> None:
        """As `write`, for tokens picked from several rows: position int32 [n], notes {name: [n, H, ...]}."""
        self.position[where] = position.unsqueeze(-1).expand(where[-1].shape)
        for column in self.spec:
            fresh = notes[column.name].to(column.dtype) if column.name in notes else column.fill
            self.columns[column.name][where] = fresh

    def tensors(self) -> list[Tensor]:
        """Everything held, for byte counts."""
        return [self.position, *self.columns.values()]

    def select(self, index: Tensor) -> None:
        """Rows of the batch, int64 [b]."""
        self.position = self.position.index_select(0, index)
        self.columns = {name: column.index_select(0, index) for name, column in self.columns.items()}


class SlotPool:
    """Keys, values and ledger of one layer; every head owns `capacity` slots.

    Shapes: keys [B, H, N, d], values [B, H, N, dv], position int32 [B, H, N].
    """

    def __init__(self, key: Tensor, value: Tensor, columns: tuple[StateColumn, ...]) -> None:
        batch, heads = key.shape[:2]
        self.keys = key.new_empty(batch, heads, 0, key.shape[-1])
        self.values = value.new_empty(batch, heads, 0, value.shape[-1])
        self.state = SlotStates(batch, heads, columns, key.device)
        self.bias = key.new_empty(batch, heads, 0)
        self.free = torch.empty(batch, heads, 0, dtype=torch.int64, device=key.device)
        self.first = first_rows(self.free)
        self.cursor = [0] * batch

    @property
    def position(self) -> Tensor:
        """int32 [B, H, N], -1 = empty."""
        return self.state.position

    @property
    def capacity(self) -> int:
        """Slots per head."""
        return self.keys.shape[2]

    @property
    def room(self) -> int:
        """See signals.Slots."""
        return self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def aux_nbytes(self) -> int:
        """Bytes of positions, ledger, bias and free list."""
        return sum(tensor.nbytes for tensor in [*self.state.tensors(), self.bias, self.free])

    def resize(self, capacity: int) -> None:
        """Grow with empty slots, or shrink by dropping empty ones."""
        pick = None
        if capacity < self.capacity:
            pick = (self.position < 0).to(torch.int8).argsort(dim=-1, stable=True)[..., :capacity]
        self.keys = resized(self.keys, capacity, pick, 0.0)
        self.values = resized(self.values, capacity, pick, 0.0)
        self.state.resize(capacity, pick)
        self._list_free()
        self.first = first_rows(self.free)

    def write(
        self,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        notes: dict[str, Tensor],
        sizes: tuple[int, ...],
        real: Picked | None,
    ) -> None:
        """Enter fresh tokens.

        Args:
            key: [B, H, W, d]; value [B, H, W, dv].
            position: int32 [B, W].
            notes: {name: [B, H, W, ...]}.
            sizes: the first sizes[b] tokens of row b are real.
            real: their rows and places in W; None if all are.
        """
        slot = self._next(key.shape[2])
        if real is None:
            self._enter(slot, key, value, position, notes)
        else:
            where = picked_slots(real, slot)
            self.keys[where], self.values[where] = pick(real, key), pick(real, value)
            self.bias[where] = 0.0
            self.state.put(where, position[real], {name: pick(real, note) for name, note in notes.items()})
        self.cursor = list(map(add, self.cursor, sizes))

    def _next(self, width: int) -> Tensor:
        start = self.cursor[0]
        if self.cursor.count(start) == len(self.cursor):
            return self.free[:, :, start : start + width]
        offsets = torch.tensor(self.cursor).to(self.free.device, non_blocking=True).view(-1, 1, 1)
        index = (offsets + torch.arange(width, device=self.free.device)).clamp_max(self.capacity - 1)
        return self.free.gather(2, index.expand(-1, self.free.shape[1], -1))

    def _enter(self, slot: Tensor, key: Tensor, value: Tensor, position: Tensor, notes: dict) -> None:
        # By row of the flattened pool: scatter_ of bf16 on a CPU takes time in proportion to the pool.
        index = (slot + self.first).flatten()
        self.keys.view(-1, key.shape[-1]).index_copy_(0, index, key.reshape(-1, key.shape[-1]))
        self.values.view(-1, value.shape[-1]).index_copy_(0, index, value.reshape(-1, value.shape[-1]))
        self.bias.view(-1).index_fill_(0, index, 0.0)
        self.state.write(slot, position, notes)

    def evict(self, drop: Tensor) -> None:
        """Empty the slots of `drop`, bool [B, H, N]; zeros until the next tokens overwrite them."""
        self.position.masked_fill_(drop, EMPTY)
        for pool in (self.keys, self.values):
            pool.masked_fill_(drop.unsqueeze(-1), 0.0)  # infinity or NaN would survive a weight of 0
        self._list_free()

    def _list_free(self) -> None:
        occupied = self.position >= 0
        self.free = occupied.to(torch.int8).argsort(dim=-1, stable=True)
        self.bias = torch.zeros_like(occupied, dtype=self.keys.dtype).masked_fill_(~occupied, -torch.inf)
        self.cursor = [0] * len(self.cursor)

    def logits(self, query: Tensor) -> Tensor:
        """[B, H, R, d] -> [B, H, R, N]."""
        return query @ self.keys.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """[B, H, R, N] -> [B, H, R, dv]."""
        return weights.to(self.values.dtype) @ self.values

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """See signals.Slots."""
        step = max(1, -(-self.capacity // 4))
        for start in range(0, self.capacity, step):
            part = slice(start, start + step)
            yield part, self.keys[:, :, part], self.values[:, :, part]

    def select(self, index: Tensor) -> None:
        """Rows of the batch, int64 [b] (beam search, batch selection, repetition)."""
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.bias, self.free = self.bias.index_select(0, index), self.free.index_select(0, index)
        self.first = first_rows(self.free)
        self.state.select(index)
        self.cursor = [self.cursor[i] for i in index.tolist()]


def picked_slots(real: Picked, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and slot [n, H] of picked tokens, whose slots are in [B, H, W]."""
    return real[0].unsqueeze(-1), torch.arange(slot.shape[1], device=slot.device), pick(real, slot)


def pick(real: Picked, values: Tensor) -> Tensor:
    """Picked tokens of [B, H, W, ...], [n, H, ...]."""
    return values.transpose(1, 2)[real]


def first_rows(slots: Tensor) -> Tensor:
    """Where each head of [B, H, N] starts once the three are flattened, int64 [B, H, 1]."""
    batch, heads, capacity = slots.shape
    return torch.arange(batch * heads, device=slots.device).view(batch, heads, 1) * capacity


def resized(values: Tensor, capacity: int, pick: Tensor | None, fill: float) -> Tensor:
    """Slots `pick` (or all) of [B, H, N, ...], followed by `fill` up to `capacity`."""
    out = values.new_full((*values.shape[:2], capacity, *values.shape[3:]), fill)
    if pick is None:
        out[:, :, : values.shape[2]] = values
        return out
    index = pick.view(*pick.shape, *([1] * (values.ndim - 3))).expand(*pick.shape, *values.shape[3:])
    out[:, :, : pick.shape[2]] = values.gather(2, index)
    return out
