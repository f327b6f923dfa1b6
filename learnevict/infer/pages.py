"""Ragged storage: heads of one layer hold different numbers of slots and share one pool of pages.

Each (row, head) has a table of pages. Its occupied slots are always the first `count` logical slots, so an event moves
survivors from its last pages into the holes of its first (tail swap) and hands emptied pages back; before its next block
every head gets the pages that block needs. All of it is tensor arithmetic of static shape: nothing waits for the device.
Page 0 belongs to nobody; unassigned table entries point there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from learnevict.infer.slots import Ledger
from learnevict.signals import EMPTY, Column


class PagePool:
    """Keys, values and ledger of one layer with ragged heads.

    Args:
        page: slots per page.

    Shapes: keys [P, page, d], values [P, page, dv], table int64 [B, H, M], count int64 [B, H],
    position and columns logical, [B, H, M * page, ...].
    """

    def __init__(self, key: Tensor, value: Tensor, columns: tuple[Column, ...], page: int) -> None:
        batch, heads = key.shape[:2]
        self.page = page
        self.keys = key.new_zeros(1, page, key.shape[-1])
        self.values = value.new_zeros(1, page, value.shape[-1])
        self.ledger = Ledger(batch, heads, columns, key.device)
        self.table = torch.zeros(batch, heads, 0, dtype=torch.int64, device=key.device)
        self.count = torch.zeros(batch, heads, dtype=torch.int64, device=key.device)

    @property
    def position(self) -> Tensor:
        """int32 [B, H, N], -1 = empty; N = pages of the widest head times page size."""
        return self.ledger.position

    @property
    def room(self) -> int:
        """See signals.Slots."""
        return self.keys.shape[0] * self.page // (self.table.shape[0] * self.table.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def aux_nbytes(self) -> int:
        """Bytes of positions, ledger and tables."""
        return sum(tensor.nbytes for tensor in [*self.ledger.tensors(), self.table, self.count])

    @property
    def bias(self) -> Tensor:
        """0 where a slot is occupied, -inf elsewhere, [B, H, N]."""
        empty = self.position < 0
        return torch.zeros_like(empty, dtype=self.keys.dtype).masked_fill_(empty, -torch.inf)

    def fit(self, total: int, widest: int) -> None:
        """Make room for `total` slots over all rows and heads, and `widest` in one head. Grows and shrinks storage."""
        batch, heads, _ = self.table.shape
        pages = 1 + (total + batch * heads * (self.page - 1)) // self.page
        depth = -(-widest // self.page)
        if depth > self.table.shape[2]:
            self.table = torch.nn.functional.pad(self.table, (0, depth - self.table.shape[2]))
            self.ledger.resize(depth * self.page, None)
        if pages != self.keys.shape[0]:
            self._move(pages)

    def _move(self, pages: int) -> None:
        """Renumber pages in use to the front of a pool of `pages` pages."""
        used = self._in_use()
        old = used.argsort(descending=True, stable=True)[:pages]
        new_name = torch.zeros(self.keys.shape[0], dtype=torch.int64, device=self.keys.device)
        new_name[old] = torch.arange(old.shape[0], device=old.device)
        self.table = new_name[self.table] * self._held()
        for name in ("keys", "values"):
            source = getattr(self, name)
            target = source.new_zeros(pages, *source.shape[1:])
            target[: old.shape[0]] = source[old]
            setattr(self, name, target)

    def _held(self) -> Tensor:
        """Table entries that hold occupied slots, bool [B, H, M]."""
        entry = torch.arange(self.table.shape[2], device=self.table.device)
        return entry * self.page < self.count.unsqueeze(-1)

    def _in_use(self) -> Tensor:
        used = torch.zeros(self.keys.shape[0], dtype=torch.int8, device=self.keys.device)
        used.scatter_(0, torch.where(self._held(), self.table, 0).flatten(), 1)
        used[:1] = 2
        return used

    def assign(self, ahead: list[int]) -> None:
        """Give every head of row b pages for its occupied slots and the next ahead[b] tokens."""
        held = self._held()
        room = torch.tensor(ahead).to(self.count.device, non_blocking=True).view(-1, 1)
        need = ((self.count + room + self.page - 1) // self.page).clamp_max(self.table.shape[2])
        have = held.sum(-1)
        extra = (need - have).clamp_min(0).flatten()
        start = (extra.cumsum(0) - extra).view(*have.shape, 1)
        entry = torch.arange(self.table.shape[2], device=self.table.device)
        free = self._in_use().argsort(stable=True)
        fresh = free[(start + entry - have.unsqueeze(-1)).clamp(0, free.shape[0] - 1)]
        wanted = (entry >= have.unsqueeze(-1)) & (entry < need.unsqueeze(-1))
        self.table = torch.where(held, self.table, torch.where(wanted, fresh, 0))

    def _physical(self, slot: Tensor) -> Tensor:
        """Flat index into the pool of logical slots int64 [b, H, n]; rows follow `slot`."""
        return self.table.gather(2, slot // self.page) * self.page + slot % self.page

    def write(
        self, key: Tensor, value: Tensor, position: Tensor, notes: dict[str, Tensor], sizes: tuple[int, ...]
    ) -> None:
        """Enter fresh tokens behind the occupied slots; see SlotPool.write."""
        width = key.shape[2]
        slot = self.count.unsqueeze(-1) + torch.arange(width, device=key.device)
        slot = slot.clamp_max(self.position.shape[2] - 1)
        where = self._physical(slot)
        if all(size == width for size in sizes):
            self._store(where, key, value)
            self.ledger.write(slot, position, notes, slice(None))
        else:
            for row, size in enumerate(sizes):
                one = slice(row, row + 1)
                self._store(where[one, :, :size], key[one, :, :size], value[one, :, :size])
                part = {name: note[one, :, :size] for name, note in notes.items()}
                self.ledger.write(slot[one, :, :size], position[one, :size], part, one)
        self.count = self.count + torch.tensor(sizes).to(key.device, non_blocking=True).unsqueeze(-1)

    def _store(self, where: Tensor, key: Tensor, value: Tensor) -> None:
        flat = where.flatten()
        self.keys.view(-1, self.keys.shape[-1]).index_copy_(0, flat, key.reshape(-1, key.shape[-1]))
        self.values.view(-1, self.values.shape[-1]).index_copy_(0, flat, value.reshape(-1, value.shape[-1]))

    def evict(self, drop: Tensor) -> None:
        """Empty the slots of `drop`, bool [B, H, N], close the holes and hand emptied pages back."""
        position = self.position.masked_fill(drop, EMPTY)
        alive = position >= 0
        count = alive.sum(-1)
        slot = torch.arange(position.shape[2], device=position.device)
        inside = slot < count.unsqueeze(-1)
        hole, tail = ~alive & inside, alive & ~inside
        target = (~hole).to(torch.int8).argsort(dim=-1, stable=True)
        source = (~tail).to(torch.int8).argsort(dim=-1, stable=True)
        moved = hole.gather(-1, target)
        source = torch.where(moved, source, target)
        self._swap(target, source, moved)
        order = slot.expand_as(position).scatter(-1, target, source)
        self.ledger.position = torch.where(inside, position.gather(-1, order), EMPTY)
        for column in self.ledger.spec:
            old = self.ledger.columns[column.name]
            index = order.view(*order.shape, *([1] * len(column.shape))).expand_as(old)
            self.ledger.columns[column.name] = old.gather(2, index)
        self.count = count

    def _swap(self, target: Tensor, source: Tensor, moved: Tensor) -> None:
        """Copy survivors into holes, a few slots at a time; entries that do not move copy page 0 onto itself."""
        for start in range(0, target.shape[2], self._step):
            part = slice(start, start + self._step)
            live = moved[..., part]
            to = torch.where(live, self._physical(target[..., part]), 0)
            source_flat = torch.where(live, self._physical(source[..., part]), 0).flatten()
            for pool in (self.keys, self.values):
                flat = pool.view(-1, pool.shape[-1])
                flat.index_put_((to.flatten(),), flat[source_flat])

    @property
    def _step(self) -> int:
        """Logical slots per gather such that no temporary is as large as half of the layer's keys."""
        batch, heads, _ = self.table.shape
        slots = self.keys.shape[0] * self.page // (2 * batch * heads)
        return max(self.page, slots // self.page * self.page)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """See signals.Slots; each chunk is gathered from its pages."""
        pages = self._step // self.page
        for start in range(0, self.table.shape[2], pages):
            table = self.table[:, :, start : start + pages]
            part = slice(start * self.page, (start + table.shape[2]) * self.page)
            yield part, self._gather(self.keys, table), self._gather(self.values, table)

    @staticmethod
    def _gather(pool: Tensor, table: Tensor) -> Tensor:
        return pool[table].flatten(2, 3)

    def logits(self, query: Tensor) -> Tensor:
        """[B, H, R, d] -> [B, H, R, N]."""
        out = query.new_empty(*query.shape[:3], self.position.shape[2])
        pages = self._step // self.page
        for start in range(0, self.table.shape[2], pages):
            keys = self._gather(self.keys, self.table[:, :, start : start + pages])
            out[..., start * self.page : start * self.page + keys.shape[2]] = query @ keys.transpose(-1, -2)
        return out

    def mix(self, weights: Tensor) -> Tensor:
        """[B, H, R, N] -> [B, H, R, dv]."""
        out = self.values.new_zeros(*weights.shape[:3], self.values.shape[-1])
        pages = self._step // self.page
        for start in range(0, self.table.shape[2], pages):
            values = self._gather(self.values, self.table[:, :, start : start + pages])
            out += weights[..., start * self.page : start * self.page + values.shape[2]].to(values.dtype) @ values
        return out

    def select(self, index: Tensor) -> None:
        """Rows of the batch, int64 [b]; pages are copied, never shared."""
        batch, _, depth = self.table.shape
        table = self.table.index_select(0, index)
        count = self.count.index_select(0, index)
        rows = index.shape[0]
        pages = 1 + -(-(self.keys.shape[0] - 1) * rows // batch)
        pages = max(pages, 1 + int(((count + self.page - 1) // self.page).sum()))
        held = torch.arange(depth, device=table.device) * self.page < count.unsqueeze(-1)
        number = torch.where(held, held.flatten().cumsum(0).view_as(held), 0)
        for name in ("keys", "values"):
            source = getattr(self, name)
            target = source.new_zeros(pages, *source.shape[1:])
            target[number[held]] = source[table[held]]
            setattr(self, name, target)
        self.table, self.count = number, count
        self.ledger.select(index)
