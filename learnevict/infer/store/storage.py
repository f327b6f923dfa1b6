"""How much room a layer's slots get: a pool sized to what the policy may hold, and no larger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add

import torch
from torch import Tensor

from learnevict.infer.clock import Block, Clock
from learnevict.infer.store.pages import PagePool
from learnevict.infer.store.slots import SlotPool
from learnevict.infer.store.tiers import Pool, TieredPool
from learnevict.policy import Governor

PAGE_SLOTS = 16
PAGE_OVERHEAD = 40  # a page is at most 1/40 of a head's slots, so rounding stays below 5 %


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its index in the model, its rank among the evicting layers, and how many of those there are."""

    index: int
    rank: int
    num_evicting: int
    row_bytes_per_token: int


class Meter:
    """Bytes of keys and values held by all evicting layers together, and the most they ever held at one time."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.held: dict[int, int] = {}
        self.total = self.peak = 0

    def note(self, layer: int, num_bytes: int) -> None:
        self.total += num_bytes - self.held.get(layer, 0)
        self.held[layer] = num_bytes
        self.peak = max(self.peak, self.total)


class Storage:
    """The pool of one layer, and how many slots per head of each row are taken in it (on the host): `live` in full precision,
    `low` in few bits.

    Heads of a uniform pool hold the same number; for a ragged one `live` is the average, an upper bound either way. Where
    heads of all layers compete (scope "model"), a layer's share is known only once an event has told it (`settle`): `held`
    slots of each row in all heads, `longest` in its fullest one, and pages are fitted to that.
    """

    def __init__(self, policy: Governor, clock: Clock, place: Place, key: Tensor, value: Tensor, meter: Meter) -> None:
        batch, heads = key.shape[:2]
        per_slot = key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()
        self.policy, self.clock = policy, clock
        self.place = replace(place, row_bytes_per_token=place.num_evicting * heads * per_slot)
        self.live, self.low = [0] * batch, [0] * batch
        self.shared = policy.scope == "model"
        self.held, self.longest = [0] * batch, [0] * batch
        self.meter = meter
        self.peak_nbytes, self.noted = 0, -1
        self.known: tuple[Block | None, list[tuple[int, int]]] = None, []
        self.fitted, self.unassigned = 0, True
        self.rounding = 0
        self.slot_bytes = per_slot, per_slot
        self.pool: Pool = SlotPool(key, value, policy.scorer.columns)
        if policy.store.bits:
            self.pool = TieredPool(key, value, policy.scorer.columns, policy.store.bits)
            self.slot_bytes = self.pool.slot_bytes
        elif policy.allocator.ragged or self.shared:
            slots = self.full_targets([0])[0] + clock.schedule.period
            page = max(1, min(PAGE_SLOTS, slots // PAGE_OVERHEAD))
            self.rounding = page - 1 + -(-page // heads)  # the last pages of heads are partly empty, page 0 is nobody's
            self.pool = PagePool(key, value, policy.scorer.columns, page)

    def tiers(self, seen: list[int]) -> list[tuple[int, int]]:
        """Returns the slots in full precision and in few bits, per kv head, that each row may hold after an event."""
        policy = self.policy
        budgets = targets(policy, self.clock, self.place, seen, self.rounding)
        return [policy.store.split(budget, policy.floor, *self.slot_bytes) for budget in budgets]

    def full_targets(self, seen: list[int]) -> list[int]:
        return [full for full, _ in self.tiers(seen)]

    def tiers_after(self, block: Block) -> list[tuple[int, int]]:
        """Returns the same after a block's event, computed once."""
        if self.known[0] is not block:
            self.known = block, self.tiers(block.after)
        return self.known[1]

    def targets_after(self, block: Block) -> list[int]:
        """Returns the slots per kv head that each row may hold in all after a block's event."""
        return [full + low for full, low in self.tiers_after(block)]

    def settle_rows(self, rows: list[bool], block: Block) -> None:
        """Counts what an event has left to `rows`, after which no head holds more than it may."""
        for row, (full, low) in enumerate(self.tiers_after(block)):
            if rows[row]:
                held = min(self.live[row] + self.low[row], full + low)
                self.live[row] = min(self.live[row], full)
                self.low[row] = held - self.live[row]

    def reserve(self, block: Block, rest: list[int]) -> None:
        """Makes room for a block; `rest`: tokens still to come in this forward, for storage that will have to hold them all."""
        schedule, pool = self.clock.schedule, self.pool
        coming = block.sizes if schedule.bounded and schedule.prompt == "blocks" else rest
        need = max(map(add, self.live, coming))
        if isinstance(pool, PagePool):
            ahead = self._ahead(block.before)
            if self.shared:
                total, widest = self._share(pool, [max(pair) for pair in zip(ahead, coming, strict=True)])
            else:
                total, widest = self._pages(pool, need, ahead)
            if total > self.fitted or widest > pool.position.shape[2]:
                pool.fit(total, widest)
                self.fitted, self.unassigned = total, True
            if self.unassigned or any(
                size and room == schedule.period for size, room in zip(block.sizes, ahead, strict=True)
            ):
                pool.assign(ahead)
                self.unassigned = False
        elif need > pool.capacity:
            steady = self._steady()
            roomy = max(need, pool.capacity + pool.capacity // 4 + schedule.period)
            pool.resize(steady if need <= steady <= 2 * roomy else roomy)

    def _steady(self) -> int:
        """Returns slots per head that a bounded policy ends up with; 0 if it has none yet."""
        schedule = self.clock.schedule
        if not schedule.bounded:
            return 0
        return max(self.full_targets(self.clock.seen)) + schedule.period

    def _pages(self, pool: PagePool, need: int, ahead: list[int]) -> tuple[int, int]:
        """Returns slots in all, and in the fullest head; `ahead`: tokens to the end of each row's block, for every head."""
        heads, steady = pool.position.shape[1], self._steady()
        need = max(need, steady) if need > steady // 2 else need
        total = heads * sum(max(live + room, need) for live, room in zip(self.live, ahead, strict=True))
        return total, heads * need

    def _ahead(self, seen: Sequence[int]) -> list[int]:
        """Returns the tokens to the end of each row's block."""
        period = self.clock.schedule.period
        return [period - tokens % period for tokens in seen]

    def _share(self, pool: PagePool, room: list[int]) -> tuple[int, int]:
        """Returns slots in all, and in the fullest head, if room[b] tokens come to every head of row b."""
        heads = pool.position.shape[1]
        total = sum(held + heads * tokens for held, tokens in zip(self.held, room, strict=True))
        return total, max(longest + tokens for longest, tokens in zip(self.longest, room, strict=True))

    def settle(self, held: list[int], longest: list[int]) -> None:
        """Fits pages to what an event of all layers has left here, and to the blocks that come next."""
        pool = self.pool
        assert isinstance(pool, PagePool)
        self.held, self.longest = held, longest
        self.live = [-(-slots // pool.position.shape[1]) for slots in held]
        room = self._ahead(self.clock.seen)
        total, widest = self._share(pool, room)
        pool.narrow(widest)
        pool.fit(total, widest)
        pool.assign(room)
        self.fitted, self.unassigned = total, False
        self.note_peak()

    def write(self, block: Block, key: Tensor, value: Tensor, state: dict[str, Tensor]) -> None:
        self.pool.write(key, value, block.position, state, block.sizes, block.real)
        self.live = list(map(add, self.live, block.sizes))
        if self.shared:
            heads = key.shape[1]
            self.held = [held + heads * size for held, size in zip(self.held, block.sizes, strict=True)]
            self.longest = [longest + size for longest, size in zip(self.longest, block.sizes, strict=True)]

    def evict(self, drop: Tensor) -> None:
        """Empties the slots `drop`, bool [B, H, N]; the caller says how many are left by setting `live`."""
        self.note_peak()
        self.pool.evict(drop)
        self.unassigned = True

    def demote(self, leave: Tensor, most: int, rows: list[bool]) -> None:
        """Moves slots `leave`, bool [B, H, N], at most `most` of a head, to the low tier, which has room for `low` of them."""
        pool, need = self.pool, max(self.low)
        assert isinstance(pool, TieredPool)
        if need > pool.low_capacity:
            steady = max(low for _, low in self.tiers(self.clock.seen))
            pool.resize_low(max(need, min(steady, need + need // 4 + self.clock.schedule.period)))
        pool.demote(leave, min(most, need), rows)

    def recount(self) -> None:
        """Asks the pool what is left in it, after tokens were taken back; the host waits for it."""
        taken = self.pool.position >= 0
        if isinstance(self.pool, TieredPool):
            split = self.pool.capacity
            counts = torch.stack([taken[..., :split].sum(-1).amax(-1), taken[..., split:].sum(-1).amax(-1)])
            self.live, self.low = counts.tolist()
            return
        counts = taken.sum(-1)
        self.held, self.longest = torch.stack([counts.sum(-1), counts.amax(-1)]).tolist()
        ragged = isinstance(self.pool, PagePool)
        self.live = [-(-held // counts.shape[1]) for held in self.held] if ragged else list(self.longest)

    def note_peak(self) -> None:
        """Remembers the most bytes ever held, and tells the meter what is held now."""
        held = self.pool.nbytes
        if held != self.noted:
            self.peak_nbytes, self.noted = max(self.peak_nbytes, held), held
            self.meter.note(self.place.index, held)

    def give_back(self) -> None:
        """Frees what a long prompt needed and the steady state does not."""
        steady, pool = self._steady(), self.pool
        if not steady or max(self.live) > steady:
            return
        if isinstance(pool, PagePool):
            total = pool.position.shape[1] * len(self.live) * steady
            if self.fitted > total:
                pool.fit(total, pool.position.shape[2])
                self.fitted = total
        elif pool.capacity > steady:
            pool.resize(steady)
        self.note_peak()

    def select(self, index: Tensor) -> None:
        self.pool.select(index)
        for name in ("live", "low", "held", "longest"):
            old = getattr(self, name)
            setattr(self, name, [old[i] for i in index.tolist()])
        self.fitted, self.unassigned = 0, True  # pages beyond the occupied ones were not copied


def targets(policy: Governor, clock: Clock, place: Place, seen: list[int], rounding: int = 0) -> list[int]:
    """Returns slots per kv head after an event, for rows that have seen so many tokens.

    A protected prompt is held on top of the budget, but inside a budget in bytes, which is a hard total; so are `rounding`
    slots per head that storage may take.
    """
    schedule = clock.schedule
    floor, reserve = policy.floor, schedule.slack + rounding
    found = []
    for row, tokens in enumerate(seen):
        prompt = min(clock.prompt_tokens(row), tokens) if policy.guard.prompt else 0
        inside = prompt if policy.budget.unit == "bytes" else 0
        budget = policy.budget.tokens(tokens, floor + inside, place.row_bytes_per_token, place.num_evicting, reserve)
        budget = policy.allocator.row_budget(row, budget - inside, place.rank, place.num_evicting, floor)
        found.append(budget + prompt - (schedule.bounded and schedule.slack == 0))  # the next token fits in
    return found
