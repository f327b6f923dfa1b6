"""Storage in two tiers: slots in full precision, which fresh tokens enter, and slots in few bits, to which losers are demoted.

Keys go down in units of their channels: less the middle, and divided by the reach, that a channel of the head had among the
tokens which were in full precision when the first one left. That does what a step per channel does, but every token has its own
steps, so no tokens have to live and die together. A token is quantised once and never moves again.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import TypeAlias

import torch
from torch import Tensor

from learnevict.infer.store.pages import PagePool
from learnevict.infer.store.slots import Picked, SlotPool, SlotStates, flattened, resized
from learnevict.ops.quantise import dequantise, num_groups, packed_width, quantise
from learnevict.signals import EMPTY, StateColumn

NARROWEST = 0.1
"""Of the mean reach of a head's channels: none counts as narrower, however few tokens were there to measure."""


class Packed:
    """Vectors in a few bits, [B, H, N, width]: codes uint8 [B, H, N, bytes], lowest values and steps [B, H, N, groups]."""

    def __init__(self, like: Tensor, bits: int) -> None:
        batch, heads, _, self.width = like.shape
        self.bits = bits
        self.codes = like.new_empty(batch, heads, 0, packed_width(self.width, bits), dtype=torch.uint8)
        self.low = like.new_empty(batch, heads, 0, num_groups(self.width))
        self.step = self.low.clone()

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.low, self.step

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one head, lowest values and steps included."""
        return sum(part.shape[-1] * part.element_size() for part in self.parts)

    def resize(self, capacity: int) -> None:
        self.codes, self.low, self.step = (resized(part, capacity, None, 0) for part in self.parts)

    def read(self, part: slice) -> Tensor:
        """Returns the vectors of some slots, [B, H, n, width]."""
        codes, low, step = (one[:, :, part] for one in self.parts)
        return dequantise(codes, low, step, self.width, self.bits)

    def write(self, slot: Tensor, real: Tensor, vectors: Tensor) -> None:
        """Enters vectors [B, H, n, width] into slots int64 [B, H, n]; others than `real`, bool [B, H, n], stay as they are."""
        for part, new in zip(self.parts, quantise(vectors, self.bits), strict=True):
            put(part, slot, real, new)

    def clear(self, drop: Tensor) -> None:
        for part in self.parts:
            part.masked_fill_(drop.unsqueeze(-1), 0)

    def select(self, index: Tensor) -> None:
        self.codes, self.low, self.step = (part.index_select(0, index) for part in self.parts)


class TieredPool:
    """Keys, values and per-slot state of one layer; the first `capacity` slots of a head are in full precision.

    Shapes: position and columns [B, H, N, ...]; middle and reach of a head's key channels [B, H, 1, d].
    """

    in_torch: str | None = "some slots are held in few bits"

    def __init__(self, key: Tensor, value: Tensor, columns: tuple[StateColumn, ...], bits: int) -> None:
        batch, heads = key.shape[:2]
        self.full = SlotPool(key, value, ())
        self.low_keys, self.low_values = Packed(key, bits), Packed(value, bits)
        self.state = SlotStates(batch, heads, columns, key.device)
        self.middle = key.new_zeros(batch, heads, 1, key.shape[-1])
        self.reach = torch.ones_like(self.middle)
        self.measured = [False] * batch

    @property
    def position(self) -> Tensor:
        return self.state.position

    @property
    def keys(self) -> Tensor:
        """Those in full precision."""
        return self.full.keys

    @property
    def values(self) -> Tensor:
        return self.full.values

    @property
    def capacity(self) -> int:
        """Slots in full precision."""
        return self.full.capacity

    @property
    def low_capacity(self) -> int:
        return self.low_keys.codes.shape[2]

    @property
    def slot_bytes(self) -> tuple[int, int]:
        """Bytes of a slot of one head in full precision and in few bits, scales included."""
        full = sum(part.shape[-1] * part.element_size() for part in (self.keys, self.values))
        return full, self.low_keys.slot_bytes + self.low_values.slot_bytes

    @property
    def room(self) -> int:
        full, low = self.slot_bytes
        return self.capacity + self.low_capacity * low // full

    @property
    def stored(self) -> list[Tensor]:
        """Keys and values of both tiers, with all that is needed to read them."""
        return [*self.full.stored, *self.low_keys.parts, *self.low_values.parts, self.middle, self.reach]

    @property
    def nbytes(self) -> int:
        return self.full.nbytes + self.low_keys.codes.nbytes + self.low_values.codes.nbytes

    @property
    def aux_nbytes(self) -> int:
        scales = sum(tensor.nbytes for tensor in self.stored) - self.nbytes
        return scales + self.full.aux_nbytes + sum(tensor.nbytes for tensor in self.state.tensors())

    @property
    def bias(self) -> Tensor:
        empty = self.position < 0
        return torch.zeros_like(empty, dtype=self.keys.dtype).masked_fill_(empty, -torch.inf)

    def resize(self, capacity: int) -> None:
        """Gives full precision more or fewer slots; see SlotPool."""
        self._lay_out(self.capacity, self.full.resize(capacity), capacity, self.low_capacity)

    def resize_low(self, capacity: int) -> None:
        """Gives the low tier more slots, empty ones."""
        for tier in (self.low_keys, self.low_values):
            tier.resize(capacity)
        self._lay_out(self.capacity, None, self.capacity, capacity)

    def _lay_out(self, before: int, pick: Tensor | None, full: int, low: int) -> None:
        """Moves per-slot state with the slots: of `before` ones in full precision those picked (None: all) stay."""

        def moved(values: Tensor, fill: float) -> Tensor:
            out = values.new_full((*values.shape[:2], full + low, *values.shape[3:]), fill)
            out[:, :, :full] = resized(values[:, :, :before], full, pick, fill)
            out[:, :, full : full + values.shape[2] - before] = values[:, :, before:]
            return out

        self.state.move(moved)

    def write(
        self,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        state: dict[str, Tensor],
        sizes: tuple[int, ...],
        real: Picked | None,
    ) -> None:
        """Enters fresh tokens in full precision; see SlotPool.write."""
        index = self.full.free(key.shape[2], real)
        self.full.write(key, value, position, {}, sizes, real)
        index = index + index // self.capacity * self.low_capacity  # heads have more slots here
        places = position.unsqueeze(1).expand(-1, key.shape[1], -1)
        self.state.enter(index, flattened(places, real), {name: flattened(part, real) for name, part in state.items()})

    def evict(self, drop: Tensor) -> None:
        """Empties the slots of `drop`, bool [B, H, N]."""
        self.full.evict(drop[:, :, : self.capacity])
        for tier in (self.low_keys, self.low_values):
            tier.clear(drop[:, :, self.capacity :])
        self.position.masked_fill_(drop, EMPTY)

    def demote(self, leave: Tensor, most: int, rows: list[bool]) -> None:
        """Moves slots of full precision, bool [B, H, N], to empty ones of the low tier.

        Args:
            leave: at most `most` of a head.
            rows: which rows any slots leave in.
        """
        new = [row and not known for row, known in zip(rows, self.measured, strict=True)]
        if any(new):
            self._measure(new)
        leave = leave[:, :, : self.capacity]
        source = (~leave).to(torch.int8).argsort(dim=-1, stable=True)
        taken = self.position[:, :, self.capacity :] >= 0
        target = taken.to(torch.int8).argsort(dim=-1, stable=True)
        real = torch.arange(most, device=leave.device) < leave.sum(-1, keepdim=True)
        step = max(1, self.room // 8)
        for start in range(0, most, step):
            part = slice(start, min(start + step, most))
            self._move(source[:, :, part], target[:, :, part], real[:, :, part])
        self.position[:, :, : self.capacity].masked_fill_(leave, EMPTY)
        self.full.evict(leave)

    def _move(self, source: Tensor, target: Tensor, real: Tensor) -> None:
        """Quantises slots `source` of full precision into slots `target` of the low tier, int64 [B, H, n], where `real`."""
        keys, values = (
            part.gather(2, source.unsqueeze(-1).expand(-1, -1, -1, part.shape[-1])) for part in (self.keys, self.values)
        )
        self.low_keys.write(target, real, (keys - self.middle) / self.reach)
        self.low_values.write(target, real, values)
        for name, column in self.state.columns.items():
            self.state.columns[name] = column.contiguous()  # a scorer may have made it
        for column in self.state.tensors():
            index = source.view(*source.shape, *[1] * (column.ndim - 3)).expand(*source.shape, *column.shape[3:])
            put(column, target + self.capacity, real, column.gather(2, index))

    def _measure(self, rows: list[bool]) -> None:
        """Takes the middle and reach of key channels in these rows from the slots in full precision."""
        lowest = torch.full_like(self.middle, torch.inf)
        highest = -lowest
        for part, keys, _ in self.full.chunks():
            empty = self.full.position[:, :, part].unsqueeze(-1) < 0
            lowest = torch.minimum(lowest, keys.masked_fill(empty, torch.inf).amin(2, keepdim=True))
            highest = torch.maximum(highest, keys.masked_fill(empty, -torch.inf).amax(2, keepdim=True))
        reach = (highest - lowest) / 2
        reach = reach.maximum(NARROWEST * reach.mean(-1, keepdim=True))
        whose = torch.tensor(rows).to(reach.device, non_blocking=True).view(-1, 1, 1, 1)
        self.middle = torch.where(whose, (highest + lowest) / 2, self.middle)
        self.reach = torch.where(whose, reach.masked_fill(reach == 0, 1.0), self.reach)
        self.measured = [row or known for row, known in zip(rows, self.measured, strict=True)]

    def chunks(self, *, keys: bool = True, values: bool = True) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields slots in full precision, then those of the low tier; what is not asked for is the first slots' instead."""
        yield from self.full.chunks()
        step, split = max(1, self.room // 4), self.capacity
        for start in range(0, self.low_capacity, step):
            part = slice(start, min(start + step, self.low_capacity))
            found = self.low_keys.read(part).mul_(self.reach).add_(self.middle) if keys else self.keys[:, :, :1]
            mixed = self.low_values.read(part) if values else self.values[:, :, :1]
            yield slice(split + part.start, split + part.stop), found, mixed

    def logits(self, query: Tensor) -> Tensor:
        """Returns products of [B, H, R, d] with every key, [B, H, R, N]."""
        out = query.new_empty(*query.shape[:3], self.position.shape[2])
        for part, keys, _ in self.chunks(values=False):
            out[..., part] = query @ keys.transpose(-1, -2)
        return out

    def mix(self, weights: Tensor) -> Tensor:
        """Returns values weighed by [B, H, R, N], [B, H, R, dv]; summed in float32."""
        total = torch.promote_types(self.values.dtype, torch.float32)
        mixed = self.values.new_zeros(*weights.shape[:3], self.values.shape[-1], dtype=total)
        for part, _, values in self.chunks(keys=False):
            mixed += (weights[..., part].to(values.dtype) @ values).to(total)
        return mixed.to(self.values.dtype)

    def still(self) -> TieredPool:
        """See SlotPool."""
        found = copy(self)
        found.full = self.full.still()
        return found

    def select(self, index: Tensor) -> None:
        self.full.select(index)
        for tier in (self.low_keys, self.low_values):
            tier.select(index)
        self.state.select(index)
        self.middle, self.reach = self.middle.index_select(0, index), self.reach.index_select(0, index)
        self.measured = [self.measured[row] for row in index.tolist()]


Pool: TypeAlias = SlotPool | PagePool | TieredPool


def put(target: Tensor, slot: Tensor, real: Tensor, new: Tensor) -> None:
    """Writes [B, H, n, ...] into slots int64 [B, H, n] of [B, H, N, ...] where `real`, bool [B, H, n]."""
    tail = [1] * (target.ndim - 3)
    index = slot.view(*slot.shape, *tail).expand_as(new)
    target.scatter_(2, index, torch.where(real.view(*real.shape, *tail), new, target.gather(2, index)))
