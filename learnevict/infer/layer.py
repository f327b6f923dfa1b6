"""One evicting layer: the event loop of a forward, between the model's attention module and the slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from learnevict.errors import CacheError, NotAttachedError
from learnevict.infer.attention import block_attention, step_attention
from learnevict.infer.clock import Block, Clock
from learnevict.infer.pages import PagePool
from learnevict.infer.slots import SlotPool
from learnevict.policy import Governor
from learnevict.signals import NEVER, Attention, Signals

PAGE_SLOTS = 16
PAGE_OVERHEAD = 40  # a page is at most 1/40 of a head's slots, so rounding stays below 5 %


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its index in the model, its rank among the evicting layers, and how many of those there are."""

    index: int
    rank: int
    num_evicting: int
    row_bytes_per_token: int


class EvictingLayer(CacheLayerMixin):
    """Cache layer that holds slots instead of a growing sequence.

    `update` only hands fresh keys and values to the attention function, which calls `attend`: the event loop. Each block of
    fresh tokens is written, attended, observed and, when due, evicted from.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, policy: Governor, clock: Clock, place: Place, record: bool) -> None:
        super().__init__()
        self.policy, self.clock, self.place = policy, clock, place
        self.record = record
        self.expecting = False
        self.clear()

    def clear(self) -> None:
        """Forget everything held."""
        self.store: SlotPool | PagePool | None = None
        self.ring: tuple[Tensor, Tensor] | None = None
        self.expiry: Tensor | None = None
        self.live: list[int] = []
        self.fitted = 0
        self.unassigned = True
        self.peak_nbytes = 0
        self.is_initialized = False

    # --- what transformers asks of a cache layer ---

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create empty storage of the right head sizes."""
        columns = self.policy.scorer.columns
        if self.policy.allocator.ragged:
            self.store = PagePool(key_states, value_states, columns, self._page())
        else:
            self.store = SlotPool(key_states, value_states, columns)
        self.live = [0] * key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Hand the fresh states on to `attend`; they are stored there.

        Raises:
            NotAttachedError: the model carries no learnevict hooks, so nothing would ever be stored.
        """
        if not self.expecting:
            raise NotAttachedError(
                "this EvictingCache met a model without learnevict hooks; wrap the call in `with attach(model, policy) as "
                "cache:` or call `attach(model)` first"
            )
        self.expecting = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Logical length: columns read before the current forward, padding included."""
        return self.clock.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes; visibility is decided from slot positions, never from this."""
        return self.clock.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, max_length: int) -> None:
        """Refused: evicted tokens cannot be brought back."""
        raise CacheError(
            "an EvictingCache cannot be cropped, so assisted and prompt-lookup decoding are not possible; drop "
            "`assistant_model` / `prompt_lookup_num_tokens`, or use a stock cache"
        )

    def reset(self) -> None:
        """Forget everything held."""
        self.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch by index; called through EvictingCache, which also moves the clock."""
        if self.store is None:
            return
        index = beam_idx.to(self.store.position.device)
        self.store.select(index)
        self.live = [self.live[i] for i in index.tolist()]
        if self.ring is not None:
            self.ring = (self.ring[0].index_select(0, index), self.ring[1].index_select(0, index))

    # --- storage ---

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values now."""
        return 0 if self.store is None else self.store.nbytes

    @property
    def aux_nbytes(self) -> int:
        """Bytes of positions, ledger, rings and tables now."""
        ring = sum(tensor.nbytes for tensor in self.ring) if self.ring is not None else 0
        return ring + (0 if self.store is None else self.store.aux_nbytes)

    def _page(self) -> int:
        """Slots per page, small enough for tiny budgets."""
        target = self._targets([0])[0] + self.clock.schedule.period
        return max(1, min(PAGE_SLOTS, target // PAGE_OVERHEAD))

    def _targets(self, seen: list[int]) -> list[int]:
        """Slots per kv head after an event, for rows that have seen so many tokens."""
        policy, schedule, place = self.policy, self.clock.schedule, self.place
        floor = policy.guard.reserved(schedule.period) + 1
        targets = []
        for row, tokens in enumerate(seen):
            budget = policy.budget.tokens(tokens, floor, place.row_bytes_per_token, place.num_evicting, schedule.slack)
            budget = policy.allocator.layer_budget(budget, place.rank, place.num_evicting, floor)
            if policy.guard.prompt:
                budget += min(self.clock.prompt_tokens(row), tokens)
            targets.append(budget - (schedule.slack == 0))
        return targets

    def _reserve(self, block: Block, rest: list[int]) -> None:
        """Room for a block. `rest`: tokens still to come in this forward, for storage that will have to hold them all."""
        assert self.store is not None
        schedule = self.clock.schedule
        coming = block.sizes if schedule.bounded and schedule.prompt == "blocks" else rest
        need = max(live + size for live, size in zip(self.live, coming, strict=True))
        if isinstance(self.store, PagePool):
            self._fit_pages(self.store, need)
            pairs = zip(block.sizes, block.before, strict=True)
            if self.unassigned or any(size and before % schedule.period == 0 for size, before in pairs):
                self.store.assign([schedule.period - before % schedule.period for before in block.before])
                self.unassigned = False
        elif need > self.store.capacity:
            steady = self._steady()
            roomy = max(need, self.store.capacity + self.store.capacity // 4 + schedule.period)
            self.store.resize(steady if need <= steady <= 2 * roomy else roomy)

    def _steady(self) -> int:
        """Slots per head that a bounded policy ends up with; 0 if it has none yet."""
        schedule = self.clock.schedule
        if not schedule.bounded:
            return 0
        return max(self._targets(self.clock.seen)) + max(schedule.slack, 1)

    def _fit_pages(self, store: PagePool, need: int) -> None:
        heads, period = store.position.shape[1], self.clock.schedule.period
        need = max(need, self._steady()) if need > self._steady() // 2 else need
        total = heads * sum(max(live, need - period) + period for live in self.live)
        widest = heads * need
        if total > self.fitted or widest > store.position.shape[2]:
            store.fit(total, widest)
            self.fitted, self.unassigned = total, True

    # --- the event loop ---

    def attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention) -> Tensor:
        """Run the fresh tokens of one forward through the slots.

        Args:
            query: [B, Hq, S, d]; key [B, H, S, d]; value [B, H, S, dv]; post-RoPE.
            hidden: inputs of the attention module, [B, S, E].
            attention: scaling, softcap and sinks of this layer.

        Returns:
            [B, Hq, S, dv]
        """
        single = query.shape[2] == 1
        out = query.new_zeros(*query.shape[:3], value.shape[-1]) if not single else query
        rest = [sum(block.sizes[row] for block in self.clock.plan) for row in range(query.shape[0])]
        for block in self.clock.plan:
            signals = self._signals(block, query, hidden, attention)
            part_key, part_value = block.take(key, 2), block.take(value, 2)
            self._reserve(block, rest)
            self._write(block, signals, part_key, part_value)
            answer = self._answer(signals, single)
            if single:
                out = answer
            else:
                block.put(out, answer)
            self._maybe_evict(block, signals)
            rest = [left - size for left, size in zip(rest, block.sizes, strict=True)]
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        return out

    def _signals(self, block: Block, query: Tensor, hidden: Tensor | None, attention: Attention) -> Signals:
        assert self.store is not None
        tokens = self.clock.tokens
        return Signals(
            layer=self.place.index,
            slots=self.store,
            rows=block.rows,
            budget=self._budget(block, query.device),
            ledger=self.store.ledger.columns,
            query=block.take(query, 2),
            query_position=block.position,
            attention=attention,
            hidden=None if hidden is None else block.take(hidden, 1),
            tokens=None if tokens is None else block.take(tokens, 1),
            ring=self.ring,
        )

    def _budget(self, block: Block, device: torch.device) -> Tensor:
        if not any(block.due):
            return block.rows.seen
        seen = [before + size for before, size in zip(block.before, block.sizes, strict=True)]
        return torch.tensor(self._targets(seen), dtype=torch.int32).to(device, non_blocking=True)

    def _write(self, block: Block, signals: Signals, key: Tensor, value: Tensor) -> None:
        assert self.store is not None
        notes = self.policy.scorer.write(signals)
        self.store.write(key, value, block.position, notes, block.sizes)
        self.live = [live + size for live, size in zip(self.live, block.sizes, strict=True)]
        if self.policy.scorer.window:
            self._remember(block, signals.query)
        if self.record:
            self._open_expiry(block)

    def _answer(self, signals: Signals, single: bool) -> Tensor:
        assert self.store is not None
        scorer = self.policy.scorer
        if single and not scorer.observes:
            return step_attention(self.store, signals.query, signals.attention)
        out, weights = block_attention(self.store, signals)
        if scorer.observes:
            seen = Signals(**{**vars(signals), "fresh_attention": weights, "ring": self.ring, "memo": {}})
            for name, column in scorer.observe(seen).items():
                self.store.ledger.columns[name] = column
        return out

    def _maybe_evict(self, block: Block, signals: Signals) -> None:
        if not any(block.due):
            return
        assert self.store is not None
        now = Signals(**{**vars(signals), "ring": self.ring, "ledger": self.store.ledger.columns, "memo": {}})
        if self.policy.scorer.refreshes:
            self._refresh(block, now)
        targets = self._targets([before + size for before, size in zip(block.before, block.sizes, strict=True)])
        over = [due and live > target for due, live, target in zip(block.due, self.live, targets, strict=True)]
        if not any(over):
            return
        keep = self.policy.keep(now)
        if keep is None:
            return
        drop = ~keep & now.occupied
        if not all(over):
            drop &= torch.tensor(over).to(drop.device, non_blocking=True).view(-1, 1, 1)
        if self.record:
            self._note_expiry(drop, block)
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        self.store.evict(drop)
        self.live = [target if was else live for was, live, target in zip(over, self.live, targets, strict=True)]
        self._give_back()

    def _refresh(self, block: Block, now: Signals) -> None:
        """Let the scorer bring its notes up to date in the rows whose event this is."""
        assert self.store is not None
        columns = self.store.ledger.columns
        for name, fresh in self.policy.scorer.refresh(now).items():
            if not all(block.due):
                due = torch.tensor(block.due).to(fresh.device, non_blocking=True)
                fresh = torch.where(due.view(-1, *([1] * (fresh.ndim - 1))), fresh, columns[name])
            columns[name] = fresh.to(columns[name].dtype)

    def _give_back(self) -> None:
        """Free what a long prompt needed and the steady state does not."""
        steady = self._steady()
        if isinstance(self.store, SlotPool):
            if steady and self.store.capacity > steady and max(self.live) <= steady:
                self.store.resize(steady)
        elif self.store is not None and steady:
            total = self.store.position.shape[1] * len(self.live) * steady
            if self.fitted > total and max(self.live) <= steady:
                self.store.fit(total, self.store.position.shape[2])
                self.fitted = total
        self.unassigned = True

    def _remember(self, block: Block, query: Tensor) -> None:
        """Keep the last `window` queries of every row in a ring, post-RoPE."""
        window = self.policy.scorer.window
        if self.ring is None:
            shape = (query.shape[0], query.shape[1], window, query.shape[3])
            position = torch.full((shape[0], window), -1, dtype=torch.int32, device=query.device)
            self.ring = (query.new_zeros(shape), position)
        queries, positions = self.ring
        size = block.sizes[0]
        if all(s == size for s in block.sizes) and len({b % window for b in block.before}) == 1:
            spans = [(slice(None), block.before[0], size)]
        else:
            spans = [(slice(row, row + 1), block.before[row], size) for row, size in enumerate(block.sizes)]
        for row, before, size in spans:
            for start, stop, at in ring_spans(before, size, window):
                queries[row, :, at : at + stop - start] = query[row, :, start:stop]
                positions[row, at : at + stop - start] = block.position[row, start:stop]

    def _open_expiry(self, block: Block) -> None:
        """Extend the recorded trace to the columns read so far; a last spare column takes what is not evicted."""
        assert self.store is not None
        length = self.clock.length + self.clock.pending
        if self.expiry is None or self.expiry.shape[-1] < length + 1:
            room = max(length + 1, length + length // 4)
            old = self.expiry
            shape = (*self.store.position.shape[:2], room)
            self.expiry = torch.full(shape, NEVER, dtype=torch.int32, device=block.position.device)
            if old is not None:
                self.expiry[..., : old.shape[-1] - 1] = old[..., :-1]

    def _note_expiry(self, drop: Tensor, block: Block) -> None:
        assert self.store is not None and self.expiry is not None
        last = self.expiry.shape[-1] - 1
        column = torch.where(drop, self.store.position, last).long()
        when = (block.rows.now + 1).view(-1, 1, 1).expand_as(column)
        self.expiry.scatter_(-1, column, when)


def ring_spans(before: int, size: int, window: int) -> list[tuple[int, int, int]]:
    """Where the last tokens of a block go in a ring: (start, stop, ring offset) pieces."""
    start = max(0, size - window)
    spans = []
    while start < size:
        at = (before + start) % window
        stop = min(size, start + window - at)
        spans.append((start, stop, at))
        start = stop
    return spans
