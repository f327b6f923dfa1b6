"""Uniform storage: one static pool of slots per layer, written in place.

A full head evicts by overwriting: the victim's slot is marked empty and the next token is written into it. An empty slot
holds zeros. No slot ever moves, nothing is concatenated, and no decision waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
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
        self.first = first_rows(self.position)

    def resize(self, capacity: int, pick: Tensor | None) -> None:
        """Keeps the slots `pick` [B, H, n <= capacity] (None: all, in place) and add empty ones up to `capacity`."""
        self.move(lambda values, fill: resized(values, capacity, pick, fill))

    def move(self, moved: Callable[[Tensor, float], Tensor]) -> None:
        """Puts in place of each [B, H, N, ...] and what fills an empty slot what `moved` returns."""
        self.position = moved(self.position, EMPTY)
        for column in self.spec:
            self.columns[column.name] = moved(self.columns[column.name], column.fill)
        self.first = first_rows(self.position)

    def enter(self, index: Tensor, position: Tensor, state: dict[str, Tensor]) -> None:
        """Writes fresh tokens into slots counted over rows and heads, int64 [n]: position int32 [n], state {name: [n, ...]}."""
        self.position.view(-1).index_copy_(0, index, position)
        for column in self.spec:
            target = self.columns[column.name] = self.columns[column.name].contiguous()  # a scorer may have made it
            flat = target.view(-1, *column.shape)
            if column.name in state:
                flat.index_copy_(0, index, state[column.name].to(column.dtype))
            else:
                flat.index_fill_(0, index, column.fill)

    def tensors(self) -> list[Tensor]:
        return [self.position, *self.columns.values()]

    def select(self, index: Tensor) -> None:
        self.position = self.position.index_select(0, index)
        self.columns = {name: column.index_select(0, index) for name, column in self.columns.items()}
        self.first = first_rows(self.position)


class SlotPool:
    """Keys, values and per-slot state of one layer; every head owns `capacity` slots.

    Shapes: keys [B, H, N, d], values [B, H, N, dv], position int32 [B, H, N].
    """

    in_torch: str | None = None
    """Why a decode step cannot be left to a kernel, where it cannot."""

    def __init__(self, key: Tensor, value: Tensor, columns: tuple[StateColumn, ...]) -> None:
        batch, heads = key.shape[:2]
        self.keys = key.new_empty(batch, heads, 0, key.shape[-1])
        self.values = value.new_empty(batch, heads, 0, value.shape[-1])
        self.state = SlotStates(batch, heads, columns, key.device)
        self.cursor = [0] * batch
        self._list_free()

    @property
    def position(self) -> Tensor:
        return self.state.position

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def room(self) -> int:
        return self.capacity

    @property
    def stored(self) -> list[Tensor]:
        return [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def aux_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self.state.tensors(), self.bias, self.order])

    def resize(self, capacity: int) -> Tensor | None:
        """Grows with empty slots, or shrinks by dropping empty ones: to the slots that it returns, int64 [B, H, capacity]."""
        pick = None
        if capacity < self.capacity:
            pick = (self.position < 0).to(torch.int8).argsort(dim=-1, stable=True)[..., :capacity]
        self.keys = resized(self.keys, capacity, pick, 0.0)
        self.values = resized(self.values, capacity, pick, 0.0)
        self.state.resize(capacity, pick)
        self._list_free()
        return pick

    def write(
        self,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        state: dict[str, Tensor],
        sizes: tuple[int, ...],
        real: Picked | None,
    ) -> None:
        """Enters fresh tokens: key [B, H, W, d], value [B, H, W, dv], position int32 [B, W], state {name: [B, H, W, ...]}.

        The first sizes[b] tokens of row b are real; `real` are their rows and places in W, None if all are.
        """
        # By row of the flattened pool: scatter_ of bf16 on a CPU takes time in proportion to the pool.
        index, (keys, values, bias) = self.free(key.shape[2], real), self.flat
        keys.index_copy_(0, index, flattened(key, real))
        values.index_copy_(0, index, flattened(value, real))
        bias.index_fill_(0, index, 0.0)
        places = position.unsqueeze(1).expand(-1, key.shape[1], -1)
        self.state.enter(index, flattened(places, real), {name: flattened(part, real) for name, part in state.items()})
        self.cursor = list(map(add, self.cursor, sizes))

    def free(self, width: int, real: Picked | None) -> Tensor:
        """Returns the slots that the next tokens take, counted over all rows and heads, int64 [n]."""
        start = self.cursor[0]
        if real is None and self.cursor.count(start) == len(self.cursor):
            return self.order[start] if width == 1 else self.order[start : start + width].t().flatten()
        offsets = torch.tensor(self.cursor).to(self.order.device, non_blocking=True).view(-1, 1, 1)
        index = (offsets + torch.arange(width, device=self.order.device)).clamp_max(self.capacity - 1)
        free = self.order.t().view(*self.keys.shape[:2], -1)
        return flattened(free.gather(2, index.expand(-1, free.shape[1], -1)), real)

    def evict(self, drop: Tensor) -> None:
        """Empties the slots of `drop`, bool [B, H, N]; zeros until the next tokens overwrite them."""
        self.position.masked_fill_(drop, EMPTY)
        for pool in (self.keys, self.values):
            pool.masked_fill_(drop.unsqueeze(-1), 0.0)  # infinity or NaN would survive a weight of 0
        self._list_free()

    def _list_free(self) -> None:
        """Looks anew which slots are empty: `order`, int64 [N, B * H], holds those of each head first, counted over all."""
        occupied = self.position >= 0
        free = occupied.to(torch.int8).argsort(dim=-1, stable=True)
        self.order = (free + self.state.first).flatten(0, 1).t().contiguous()
        self.bias = torch.zeros_like(occupied, dtype=self.keys.dtype).masked_fill_(~occupied, -torch.inf)
        self.flat = self.keys.flatten(0, 2), self.values.flatten(0, 2), self.bias.flatten()
        self.cursor = [0] * len(self.cursor)

    def logits(self, query: Tensor) -> Tensor:
        return query @ self.keys.transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """Returns values weighed by [B, H, R, N], [B, H, R, dv]."""
        return weights.to(self.values.dtype) @ self.values

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        step = max(1, -(-self.capacity // 4))
        for start in range(0, self.capacity, step):
            part = slice(start, min(start + step, self.capacity))
            yield part, self.keys[:, :, part], self.values[:, :, part]

    def still(self) -> SlotPool:
        """Returns the same slots in memory of their own: a gradient needs them as they are, and the cache may go on."""
        found = copy(self)
        found.keys, found.values = self.keys.clone(), self.values.clone()
        return found

    def select(self, index: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.state.select(index)
        self.cursor = [0] * len(index)
        self._list_free()


def flattened(values: Tensor, real: Picked | None) -> Tensor:
    """Returns the tokens of [B, H, W, ...], all or those picked, one after the other for each head: [n, ...]."""
    return values.flatten(0, 2) if real is None else values.transpose(1, 2)[real].flatten(0, 1)


def first_rows(slots: Tensor) -> Tensor:
    """Returns where each head of [B, H, N] starts once the three are flattened, int64 [B, H, 1]."""
    batch, heads, capacity = slots.shape
    return torch.arange(batch * heads, device=slots.device).view(batch, heads, 1) * capacity


def resized(values: Tensor, capacity: int, pick: Tensor | None, fill: float) -> Tensor:
    """Returns slots `pick` (or all) of [B, H, N, ...], followed by `fill` up to `capacity`."""
    out = values.new_full((*values.shape[:2], capacity, *values.shape[3:]), fill)
    if pick is None:
        out[:, :, : values.shape[2]] = values
        return out
    index = pick.view(*pick.shape, *([1] * (values.ndim - 3))).expand(*pick.shape, *values.shape[3:])
    out[:, :, : pick.shape[2]] = values.gather(2, index)
    return out
