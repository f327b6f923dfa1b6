"""Ragged storage: heads of one layer hold different numbers of slots and share one pool of pages.

Each (row, head) has a table of pages. Its occupied slots are always the first `count` logical slots, so an event moves
survivors from its last pages into the holes of its first (tail swap) and hands emptied pages back; before its next block
every head gets the pages that block needs. All of it is tensor arithmetic of static shape: nothing waits for the device.
Page 0 belongs to nobody and holds zeros; unassigned table entries point there.

A head may come to own nearly every page, so the logical view [B, H, N] is about H times as wide as what is stored. Products
with keys and values are therefore taken page by page, each with the queries of the head that owns it, and only their scalars
meet the logical view; or, where pages are small or queries many, in chunks of the view gathered one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from learnevict.infer.store.slots import Picked, SlotStates, flattened
from learnevict.signals import EMPTY, StateColumn

SMALL_PAGE = 8
"""Slots of a page below which a product per page takes longer than gathering the pages of a head side by side."""


class PagePool:
    """Keys, values and per-slot state of one layer with ragged heads.

    Args:
        page: slots per page.

    Shapes: keys [P, page, d], values [P, page, dv], table int64 [B, H, M], count int64 [B, H],
    position and columns logical, [B, H, M * page, ...]. The table read backwards: page p is number rank[p] of
    head owner[p], both int64 [P], heads counted over all rows; owner is B * H for the pages of nobody.
    """

    in_torch: str | None = "heads are ragged"

    def __init__(self, key: Tensor, value: Tensor, columns: tuple[StateColumn, ...], page: int) -> None:
        batch, heads = key.shape[:2]
        self.page = page
        self.keys = key.new_zeros(1, page, key.shape[-1])
        self.values = value.new_zeros(1, page, value.shape[-1])
        self.state = SlotStates(batch, heads, columns, key.device)
        self._set_table(torch.zeros(batch, heads, 0, dtype=torch.int64, device=key.device))
        self.count = torch.zeros(batch, heads, dtype=torch.int64, device=key.device)

    @property
    def position(self) -> Tensor:
        return self.state.position

    @property
    def room(self) -> int:
        return self.keys.shape[0] * self.page // (self.table.shape[0] * self.table.shape[1])

    @property
    def stored(self) -> list[Tensor]:
        return [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def aux_nbytes(self) -> int:
        own = (self.table, self.count, self.owner, self.rank)
        return sum(tensor.nbytes for tensor in [*self.state.tensors(), *own])

    @property
    def bias(self) -> Tensor:
        empty = self.position < 0
        return torch.zeros_like(empty, dtype=self.keys.dtype).masked_fill_(empty, -torch.inf)

    def fit(self, total: int, widest: int) -> None:
        """Makes room for `total` slots over all rows and heads, and `widest` in one head; storage grows or shrinks."""
        batch, heads, _ = self.table.shape
        pages = 1 + (total + batch * heads * (self.page - 1)) // self.page
        depth = -(-widest // self.page)
        if depth > self.table.shape[2]:
            self.table = torch.nn.functional.pad(self.table, (0, depth - self.table.shape[2]))
            self.state.resize(depth * self.page, None)
        if pages != self.keys.shape[0]:
            self._move(pages)
        self._set_table(self.table)

    def narrow(self, widest: int) -> None:
        """Gives up what the logical view has beyond `widest` slots, more than which no head holds."""
        depth = max(-(-widest // self.page), 1)
        if depth < self.table.shape[2]:
            slots = torch.arange(depth * self.page, device=self.table.device)
            self.state.resize(depth * self.page, slots.expand(*self.table.shape[:2], -1))
            self._set_table(self.table[:, :, :depth].contiguous())

    def _set_table(self, table: Tensor) -> None:
        """Takes `table`, which names no page twice, and turns it round."""
        batch, heads, depth = table.shape
        depth = max(depth, 1)
        nobody = batch * heads * depth
        entry = torch.full((self.keys.shape[0],), nobody, device=table.device)
        entry.scatter_(0, table.flatten(), torch.arange(table.numel(), device=table.device))
        entry[:1] = nobody
        self.table, self.owner, self.rank = table, entry // depth, entry % depth

    def _move(self, pages: int) -> None:
        """Renumbers pages in use to the front of a pool of `pages` pages."""
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
        """Returns the table entries that hold occupied slots, bool [B, H, M]."""
        entry = torch.arange(self.table.shape[2], device=self.table.device)
        return entry * self.page < self.count.unsqueeze(-1)

    def _in_use(self) -> Tensor:
        used = torch.zeros(self.keys.shape[0], dtype=torch.int8, device=self.keys.device)
        used.scatter_(0, torch.where(self._held(), self.table, 0).flatten(), 1)
        used[:1] = 2
        return used

    def assign(self, ahead: list[int]) -> None:
        """Gives every head of row b pages for its occupied slots and the next ahead[b] tokens."""
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
        self._set_table(torch.where(held, self.table, torch.where(wanted, fresh, 0)))

    def _physical(self, slot: Tensor) -> Tensor:
        """Returns the flat index into the pool of logical slots int64 [b, H, n]; rows follow `slot`."""
        return self.table.gather(2, slot // self.page) * self.page + slot % self.page

    def write(
        self,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        state: dict[str, Tensor],
        sizes: tuple[int, ...],
        real: Picked | None,
    ) -> None:
        """Enters fresh tokens behind the occupied slots; see SlotPool.write."""
        slot = self.count.unsqueeze(-1) + torch.arange(key.shape[2], device=key.device)
        slot = slot.clamp_max(self.position.shape[2] - 1)
        where = flattened(self._physical(slot), real)
        for pool, fresh in ((self.keys, key), (self.values, value)):
            pool.view(-1, pool.shape[-1]).index_copy_(0, where, flattened(fresh, real))
        index = flattened(slot + self.state.first, real)
        places = position.unsqueeze(1).expand_as(slot)
        self.state.enter(index, flattened(places, real), {name: flattened(part, real) for name, part in state.items()})
        self.count = self.count + torch.tensor(sizes).to(key.device, non_blocking=True).unsqueeze(-1)

    def evict(self, drop: Tensor) -> None:
        """Empties the slots of `drop`, bool [B, H, N], close the holes and hand emptied pages back."""
        position = self.position.masked_fill(drop, EMPTY)
        alive = position >= 0
        count = alive.sum(-1)
        slot = torch.arange(position.shape[2], device=position.device)
        inside = slot < count.unsqueeze(-1)
        order = self._close(~alive & inside, alive & ~inside)
        self.state.position = torch.where(inside, position.gather(-1, order), EMPTY)
        for column in self.state.spec:
            old = self.state.columns[column.name]
            index = order.view(*order.shape, *([1] * len(column.shape))).expand_as(old)
            self.state.columns[column.name] = old.gather(2, index)
        self.count = count
        self._clean(inside)

    def _close(self, hole: Tensor, tail: Tensor) -> Tensor:
        """Copies the survivors `tail` into as many holes of their head, bool [B, H, N]; returns each slot's origin [B, H, N].

        Counted over all heads, the i-th hole and the i-th tail are of one head, and at most half of what is stored moves.
        """
        most = (self.keys.shape[0] - 1) * self.page // 2
        target = (~hole).flatten().to(torch.int8).argsort(stable=True)[:most]
        source = (~tail).flatten().to(torch.int8).argsort(stable=True)[:most]
        moved = hole.flatten()[target]
        source = torch.where(moved, source, target)
        to, come = (torch.where(moved, self._stored(slot), 0) for slot in (target, source))
        for pool in (self.keys, self.values):
            flat = pool.view(-1, pool.shape[-1])
            flat.index_put_((to,), flat[come])  # what does not move copies page 0 onto itself
        slots = torch.arange(hole.numel(), device=hole.device)
        return slots.scatter_(0, target, source).view_as(hole) % max(hole.shape[2], 1)

    def _clean(self, held: Tensor) -> None:
        """Zeros wherever no slot of `held`, bool [B, H, N], is stored: infinity or NaN would survive a weight of 0."""
        stored = self._stored(torch.arange(held.numel(), device=held.device))
        kept = torch.zeros(self.keys.shape[0] * self.page, dtype=torch.bool, device=held.device)
        kept.index_fill_(0, torch.where(held.flatten(), stored, 0), True)  # page 0 holds zeros
        for pool in (self.keys, self.values):
            pool.view(-1, pool.shape[-1]).masked_fill_(~kept.unsqueeze(-1), 0.0)

    def _stored(self, slot: Tensor) -> Tensor:
        """Returns the flat index into the pool of logical slots counted over all rows and heads, int64 [n]."""
        return self.table.flatten()[slot // self.page] * self.page + slot % self.page

    @property
    def _step(self) -> int:
        """Logical slots per gather such that no temporary is as large as half of the layer's keys."""
        batch, heads, _ = self.table.shape
        slots = self.keys.shape[0] * self.page // (2 * batch * heads)
        return max(self.page, slots // self.page * self.page)

    def chunks(self, *, keys: bool = True, values: bool = True) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields chunks gathered from their pages; in place of what is not asked for, page 0."""
        pages = self._step // self.page
        for start in range(0, self.table.shape[2], pages):
            table = self.table[:, :, start : start + pages]
            part = slice(start * self.page, (start + table.shape[2]) * self.page)
            found = [
                pool[table].flatten(2, 3) if wanted else pool[:1]
                for pool, wanted in ((self.keys, keys), (self.values, values))
            ]
            yield part, found[0], found[1]

    def _gathers(self, num: int) -> bool:
        """Returns whether products with `num` rows are taken chunk by chunk, as pages are too small to be worth a call."""
        return self.page < SMALL_PAGE or num > self.page

    def _parts(self, width: int, whole: int) -> Iterator[slice]:
        """Yields pages but the first, so few at a time that `width` numbers for each stay below half of the keys' bytes.

        Beside a result of `whole` numbers it may be a quarter of them, as long as that fits a processor's cache.
        """
        step = max(1, max(self.keys.nbytes // 8, min(whole // 4, 1 << 20)) // width)  # numbers of at most 4 bytes
        for start in range(1, self.keys.shape[0], step):
            yield slice(start, start + step)

    def logits(self, query: Tensor) -> Tensor:
        """Returns products of [B, H, R, d] with every key, [B, H, R, N]; 0 where a head has no page."""
        batch, heads, num, width = query.shape
        if self._gathers(num):
            wide = query.new_empty(batch, heads, num, self.position.shape[2])
            for part, keys, _ in self.chunks(values=False):
                wide[..., part] = query @ keys.transpose(-1, -2)
            return wide
        grouped, owner = query.flatten(0, 1), self.owner.clamp_max(batch * heads - 1)
        out = query.new_zeros(batch * heads + 1, num, self.table.shape[2], self.page)
        for part in self._parts(num * max(width, self.page), out.numel()):
            out[self.owner[part], :, self.rank[part]] = grouped[owner[part]] @ self.keys[part].transpose(-1, -2)
        return out[:-1].view(batch, heads, num, -1)

    def mix(self, weights: Tensor) -> Tensor:
        """Returns values weighed by [B, H, R, N], [B, H, R, dv]; what pages add up to is summed in float32."""
        batch, heads, num, _ = weights.shape
        width, total = self.values.shape[-1], torch.promote_types(self.values.dtype, torch.float32)
        if self._gathers(num):
            mixed = self.values.new_zeros(batch, heads, num, width, dtype=total)
            for part, _, values in self.chunks(keys=False):
                mixed += (weights[..., part].to(values.dtype) @ values).to(total)
            return mixed.to(self.values.dtype)
        shares = weights.reshape(batch * heads, num, -1, self.page)
        owner = self.owner.clamp_max(batch * heads - 1)
        out = self.values.new_zeros(batch * heads + 1, num, width, dtype=total)
        for part in self._parts(num * max(width, self.page), weights.numel()):
            share = shares[owner[part], :, self.rank[part]].to(self.values.dtype)
            out.index_add_(0, self.owner[part], (share @ self.values[part]).to(total))
        return out[:-1].view(batch, heads, num, width).to(self.values.dtype)

    def still(self) -> PagePool:
        """See SlotPool."""
        found = copy(self)
        found.keys, found.values = self.keys.clone(), self.values.clone()
        return found

    def select(self, index: Tensor) -> None:
        """Takes rows of the batch, int64 [b]; pages are copied, never shared."""
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
        self.count = count
        self._set_table(number)
        self.state.select(index)
