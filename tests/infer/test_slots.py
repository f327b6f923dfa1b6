"""Slot storage against a dumb model of it: lists of tokens per row and head, and nothing clever.

Both storages run the same rules: SlotPool (uniform) and PagePool (ragged heads in shared pages).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from learnevict.infer.attention import block_attention, observed_step, step_attention
from learnevict.infer.store.pages import PagePool
from learnevict.infer.store.slots import SlotPool
from learnevict.ops import Kernels
from learnevict.signals import Attention, Rows, Signals, StateColumn
from tests.closeness import close

HEADS, WIDTH, VALUE_WIDTH = 2, 4, 3
COLUMNS = (StateColumn("note", (2,)), StateColumn("tag", dtype=torch.int32, fill=7.0))


def picked(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Rows and places of the first sizes[b] tokens of every row; None if rows are of one size."""
    if len(set(sizes)) == 1:
        return None
    return (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(-1)).nonzero(as_tuple=True)


@dataclass
class Token:
    """What one slot should hold."""

    position: int
    key: list[float]
    value: list[float]
    note: list[float]
    tag: int = 7


@dataclass
class Shelf:
    """The dumb model: tokens by row and head, and the next position of each row."""

    rows: list[list[list[Token]]] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def most(self) -> int:
        return max(len(head) for row in self.rows for head in row)

    def total(self) -> int:
        return sum(len(head) for row in self.rows for head in row)


class Storage(RuleBasedStateMachine):
    """Rules shared by both storages; a subclass makes room the way its layer would."""

    @initialize(batch=st.integers(1, 3), seed=st.integers(0, 2**16))
    def start(self, batch, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.shelf = Shelf([[[] for _ in range(HEADS)] for _ in range(batch)], [0] * batch)
        like = torch.zeros(batch, HEADS, 0, WIDTH), torch.zeros(batch, HEADS, 0, VALUE_WIDTH)
        self.store = self.make(*like)
        self.ahead = [0] * batch

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    @rule(sizes=st.lists(st.integers(0, 5), min_size=3, max_size=9), even=st.booleans())
    def append(self, sizes, even):
        batch = len(self.shelf.rows)
        sizes = tuple(sizes[:1] * batch if even else [sizes[row % 3] for row in range(batch)])
        if not max(sizes):
            return
        self.make_room(sizes)
        width = max(sizes)
        key, value = self.numbers(batch, HEADS, width, WIDTH), self.numbers(batch, HEADS, width, VALUE_WIDTH)
        notes = self.numbers(batch, HEADS, width, 2)
        position = torch.full((batch, width), -1, dtype=torch.int32)
        for row, size in enumerate(sizes):
            for column in range(size):
                position[row, column] = self.shelf.next[row]
                self.shelf.next[row] += 1
                for head in range(HEADS):
                    at = row, head, column
                    token = Token(self.shelf.next[row] - 1, *(part[at].tolist() for part in (key, value, notes)))
                    self.shelf.rows[row][head].append(token)
        self.store.write(key, value, position, {"note": notes}, sizes, picked(sizes))
        self.ahead = [room - size for room, size in zip(self.ahead, sizes, strict=True)]

    @rule(share=st.sampled_from([0.1, 0.5, 0.9, 1.0]), one_row=st.booleans())
    def evict(self, share, one_row):
        gone = torch.rand(self.store.position.shape, generator=self.random) < share
        if one_row:
            gone[1:] = False
        gone &= self.store.position >= 0
        lost = [[set(head[mask].tolist()) for head, mask in zip(*pair, strict=True)] for pair in self.pairs(gone)]
        self.store.evict(gone)
        for row, heads in zip(self.shelf.rows, lost, strict=True):
            for head, positions in enumerate(heads):
                row[head] = [token for token in row[head] if token.position not in positions]
        self.forget_room()

    def pairs(self, gone: Tensor):
        return zip(self.store.position, gone, strict=True)

    @rule(picks=st.lists(st.integers(0, 8), min_size=1, max_size=4))
    def select(self, picks):
        rows = [pick % len(self.shelf.rows) for pick in picks]
        self.store.select(torch.tensor(rows))
        self.shelf.rows = [[[Token(**vars(token)) for token in head] for head in self.shelf.rows[row]] for row in rows]
        self.shelf.next = [self.shelf.next[row] for row in rows]
        self.forget_room(rows)

    @rule()
    def update_column(self):
        """An observing scorer replaces a whole column."""
        position = self.store.position
        self.store.state.columns["tag"] = torch.where(position >= 0, position * 3, 0)
        for row in self.shelf.rows:
            for head in row:
                for token in head:
                    token.tag = token.position * 3

    @invariant()
    def same_tokens(self):
        """Positions as sets, and beside each position its own key, value and notes."""
        position, columns = self.store.position, self.store.state.columns
        keys, values = torch.zeros(*position.shape, WIDTH), torch.zeros(*position.shape, VALUE_WIDTH)
        for part, some_keys, some_values in self.store.chunks():
            keys[:, :, part], values[:, :, part] = some_keys, some_values
        parts = [part.tolist() for part in (position, keys, values, columns["note"], columns["tag"])]
        for row, heads in enumerate(self.shelf.rows):
            for head, tokens in enumerate(heads):
                slots = zip(*(part[row][head] for part in parts), strict=True)
                found = sorted(slot for slot in slots if slot[0] >= 0)
                assert found == [tuple(vars(token).values()) for token in tokens]
        if position.shape[2]:
            query, weights = self.numbers(*position.shape[:2], 3, WIDTH), self.numbers(*position.shape[:2], 3, 1)
            taken = (position >= 0).unsqueeze(2)
            wanted = (query @ keys.mT).masked_fill(~taken, 0)
            close(self.store.logits(query).masked_fill(~taken, 0), wanted)
            weights = weights.masked_fill(~taken, 0)
            close(self.store.mix(weights), weights @ values)

    @invariant()
    def chunks_are_small(self):
        for _, keys, _ in self.store.chunks():
            assert keys.nbytes <= max(
                self.store.keys.nbytes // 2, keys.nbytes // max(keys.shape[2], 1) * self.smallest()
            )


class SlotPoolRules(Storage):
    """Every head owns the same number of slots."""

    def make(self, key: Tensor, value: Tensor) -> SlotPool:
        return SlotPool(key, value, COLUMNS)

    def smallest(self) -> int:
        return 1

    def make_room(self, sizes: tuple[int, ...]) -> None:
        need = self.shelf.most() + max(sizes)
        if need > self.store.capacity:
            self.store.resize(need)

    def forget_room(self, rows: list[int] | None = None) -> None:
        self.ahead = [0] * len(self.shelf.rows)

    @rule(spare=st.integers(0, 6))
    def resize(self, spare):
        self.store.resize(self.shelf.most() + spare)
        assert self.store.capacity == self.shelf.most() + spare

    @invariant()
    def bias_hides_the_empty(self):
        assert torch.equal(self.store.bias == 0, self.store.position >= 0)
        assert torch.equal(self.store.bias == -torch.inf, self.store.position < 0)

    @invariant()
    def bytes_are_slots(self):
        slots = len(self.shelf.rows) * HEADS * self.store.capacity
        assert self.store.nbytes == slots * (WIDTH + VALUE_WIDTH) * 4
        held = self.store.keys.untyped_storage().nbytes() + self.store.values.untyped_storage().nbytes()
        assert held == self.store.nbytes


class PagePoolRules(Storage):
    """Heads of all rows share pages."""

    page = 3

    def make(self, key: Tensor, value: Tensor) -> PagePool:
        self.total = 0
        return PagePool(key, value, COLUMNS, self.page)

    def smallest(self) -> int:
        return self.page

    def make_room(self, sizes: tuple[int, ...]) -> None:
        """As the layer does: fit when the pool is too small, hand out pages when a block begins."""
        if all(size <= room for size, room in zip(sizes, self.ahead, strict=True)):
            return
        self.ahead = [size + 2 for size in sizes]
        total = self.shelf.total() + HEADS * sum(self.ahead)
        widest = self.shelf.most() + max(self.ahead)
        if total > self.total or widest > self.store.position.shape[2]:
            self.fit(total, widest)
        self.store.assign(self.ahead)

    def forget_room(self, rows: list[int] | None = None) -> None:
        self.ahead = [0] * len(self.shelf.rows)
        if rows is not None:
            self.total = 0

    def fit(self, total: int, widest: int) -> None:
        self.store.fit(total, widest)
        self.total = total

    @rule(spare=st.integers(0, 9))
    def fit_tightly(self, spare):
        """Shrinking keeps what is held; pages handed out ahead are taken back."""
        self.fit(self.shelf.total() + spare, self.shelf.most())
        self.forget_room()

    @invariant()
    def no_two_heads_share_a_slot(self):
        taken = self.store.position >= 0
        slots = torch.arange(self.store.position.shape[2]).expand_as(self.store.position)
        if slots.shape[2]:
            physical = self.store._physical(slots)[taken]
            assert physical.unique().numel() == physical.numel()
            assert bool((physical >= self.page).all()), "page 0 belongs to nobody"

    @invariant()
    def the_first_slots_are_taken(self):
        slots = torch.arange(self.store.position.shape[2])
        assert torch.equal(self.store.position >= 0, slots < self.store.count.unsqueeze(-1))

    @invariant()
    def owners_are_the_table_turned_round(self):
        store = self.store
        owner = [len(self.shelf.rows) * HEADS] * store.keys.shape[0]
        for head, pages in enumerate(store.table.flatten(0, 1).tolist()):
            for rank, page in enumerate(pages):
                if page:
                    owner[page] = head
                    assert store.rank[page] == rank
        assert store.owner.tolist() == owner

    @rule()
    def bytes_follow_what_is_held(self):
        """At most one page per head, and page 0, beyond the slots asked for."""
        total = self.shelf.total()
        self.fit(total, self.shelf.most())
        self.forget_room()
        rounding = self.page * (len(self.shelf.rows) * HEADS + 2)
        assert self.store.nbytes <= (total + rounding) * (WIDTH + VALUE_WIDTH) * 4
        held = self.store.keys.untyped_storage().nbytes() + self.store.values.untyped_storage().nbytes()
        assert held == self.store.nbytes


class OneSlotPages(PagePoolRules):
    """Pages of one slot, as tiny budgets have them."""

    page = 1


QUICK = settings(max_examples=15, stateful_step_count=15)
TestSlotPool = SlotPoolRules.TestCase
TestPagePool = PagePoolRules.TestCase
TestOneSlotPages = OneSlotPages.TestCase
TestSlotPool.settings = TestPagePool.settings = TestOneSlotPages.settings = QUICK


class Ragged:
    """A PagePool of 2 rows and 4 heads whose keys and values are known by row, head and position."""

    def __init__(self, page: int, length: int = 90) -> None:
        self.random = torch.Generator().manual_seed(page)
        self.keys = torch.randn(2, 4, length, WIDTH, generator=self.random)
        self.values = torch.randn(2, 4, length, VALUE_WIDTH, generator=self.random)
        self.store = PagePool(self.keys, self.values, (), page)
        self.next = 0

    def read(self, size: int, spare: int = 0) -> None:
        """Give every head pages for `size` + `spare` tokens and write `size`."""
        part = slice(self.next, self.next + size)
        position = torch.arange(part.start, part.stop, dtype=torch.int32).expand(2, -1)
        self.store.assign([size + spare] * 2)
        self.store.write(self.keys[:, :, part], self.values[:, :, part], position, {}, (size,) * 2, None)
        self.next += size

    def evict(self, share: list[float]) -> None:
        chance = torch.tensor(share).view(1, 4, 1)
        drop = torch.rand(self.store.position.shape, generator=self.random) < chance
        self.store.evict(drop & (self.store.position >= 0))

    def select(self, rows: list[int]) -> None:
        self.store.select(torch.tensor(rows))
        self.keys, self.values = self.keys[rows], self.values[rows]

    def compare(self, num: int) -> None:
        """`num` queries a head against keys and values gathered by position; pages of nobody are poisoned, page 0 is zero."""
        store = self.store
        assert torch.equal((store.position >= 0).sum(-1), store.count)
        unassigned = torch.ones(store.keys.shape[0], dtype=torch.bool).scatter(0, store.table.flatten(), False)
        assert not unassigned[0] or not bool(store.keys[0].any() | store.values[0].any()), "page 0 holds something"
        unassigned[0] = False
        store.keys[unassigned], store.values[unassigned] = torch.nan, torch.nan
        at, taken = store.position.clamp_min(0).long().unsqueeze(-1), (store.position >= 0).unsqueeze(2)
        keys = self.keys.gather(2, at.expand(-1, -1, -1, WIDTH))
        values = self.values.gather(2, at.expand(-1, -1, -1, VALUE_WIDTH))
        query = torch.randn(*keys.shape[:2], num, WIDTH, generator=self.random)
        logits = store.logits(query)
        assert logits.isfinite().all()
        close(logits.where(taken, 0.0), (query @ keys.mT).where(taken, 0.0))
        weights = torch.rand(logits.shape, generator=self.random).where(taken, 0.0)
        close(store.mix(weights), weights @ values)
        store.keys[unassigned], store.values[unassigned] = 0.0, 0.0


@pytest.mark.parametrize("num", [1, 3, 40])
@pytest.mark.parametrize("page", [1, 3, 16])
def test_products_by_page_are_products_by_slot(page, num):
    """40 queries need several rounds of pages; some pages are free, and heads are of very different length."""
    pool = Ragged(page)
    pool.store.fit(2 * 4 * 40, 60)
    pool.read(30)
    pool.compare(num)
    pool.evict([0.1, 0.9, 1.0, 0.5])
    pool.compare(num)
    pool.read(7, spare=5)
    pool.compare(num)
    count = pool.store.count
    assert count.amax() > 2 * count.amin()
    pool.select([1, 0, 1])
    pool.compare(num)
    pool.select([2, 0])
    pool.store.fit(2 * 4 * 60, 75)
    pool.compare(num)
    pool.read(20)
    pool.compare(num)


@pytest.mark.parametrize("page", [1, 3, 16])
def test_half_of_a_full_pool_may_move(page):
    """As many survivors change places as ever can: every head is full and loses its first half."""
    pool = Ragged(page)
    pool.store.fit(2 * 4 * 48, 48)
    pool.read(48)
    pool.store.evict(pool.store.position < 24)
    assert pool.store.count.eq(24).all()
    pool.compare(2)


def poisoned(kind: type[SlotPool] | type[PagePool], poison: float) -> SlotPool | PagePool:
    """Eight tokens of two rows, of which every head has lost two that held `poison`; one more has been written since."""
    random = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, HEADS, 9, WIDTH, generator=random), torch.randn(2, HEADS, 9, WIDTH, generator=random)
    key[:, :, [2, 7]], value[:, :, [2, 7]] = poison, poison
    store = SlotPool(key, value, ()) if kind is SlotPool else PagePool(key, value, (), 3)
    if isinstance(store, PagePool):
        store.fit(2 * HEADS * 9, 9)
        store.assign([9, 9])
    else:
        store.resize(9)
    place = torch.arange(9, dtype=torch.int32).expand(2, -1)
    store.write(key[:, :, :8], value[:, :, :8], place[:, :8], {}, (8, 8), None)
    store.evict((store.position == 2) | (store.position == 7))
    if isinstance(store, PagePool):
        store.assign([9, 9])
    store.write(key[:, :, 8:], value[:, :, 8:], place[:, 8:], {}, (1, 1), None)
    return store


def block(store: SlotPool | PagePool, query: Tensor, **options: Any) -> Tensor:
    rows = Rows(*torch.tensor([[0], [8], [9], [8], [8]], dtype=torch.int32).expand(-1, 2))
    here = rows.now.unsqueeze(-1)
    return block_attention(store, Signals(0, store, rows, rows.seen, {}, query, here, Attention(0.5, **options)))[0]


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "step": lambda store, query: step_attention(store, query, Attention(0.5), Kernels("off"), 0),
    "softcap": lambda store, query: step_attention(store, query, Attention(0.5, softcap=5.0), Kernels("off"), 0),
    "sinks": lambda store, query: observed_step(store, query, Attention(0.5, sinks=torch.zeros(4)))[0],
    "observed": lambda store, query: observed_step(store, query, Attention(0.5))[0],
    "block": block,
    "scores": lambda store, query: store.logits(query.flatten(2, 3).view(2, HEADS, -1, WIDTH)),
}


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [SlotPool, PagePool])
def test_a_poisoned_empty_slot_changes_nothing(kind, way, poison):
    """Keys and values that were evicted are not seen, whatever they were: 0 times infinity is no number."""
    query = torch.randn(2, 2 * HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    found = WAYS[way](poisoned(kind, poison), query)
    assert found.isfinite().all()
    assert torch.equal(found, WAYS[way](poisoned(kind, 1.0), query))
