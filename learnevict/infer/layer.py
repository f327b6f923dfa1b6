"""One evicting layer: the event loop of a forward, between the model's attention module and the slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from learnevict.errors import CacheError, ModelError, NotAttachedError
from learnevict.infer.attention import block_attention, observed_step, step_attention
from learnevict.infer.clock import Block, Clock
from learnevict.infer.eviction import Event, check_room
from learnevict.infer.store.recording import Expiries, Ring, ordinary_tensors
from learnevict.infer.store.storage import Meter, Place, Storage
from learnevict.infer.store.tiers import Pool
from learnevict.ops import Kernels
from learnevict.policy import Governor, Scorer
from learnevict.signals import Attention, Signals

NO_CROP = (
    "an EvictingCache cannot be cropped, so assisted and prompt-lookup decoding are not possible; drop `assistant_model` / "
    "`prompt_lookup_num_tokens`, or use a stock cache"
)


class EvictingLayer(CacheLayerMixin):
    """Cache layer that holds slots instead of a growing sequence.

    `update` only hands fresh keys and values to the attention function, which calls `attend`: each block of fresh tokens is
    written, attended, observed and, when due, evicted from.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, policy: Governor, clock: Clock, place: Place, record: bool, meter: Meter, kernels: Kernels
    ) -> None:
        super().__init__()
        self.policy, self.clock, self.place = policy, clock, place
        self.record, self.meter, self.kernels = record, meter, kernels
        scorer = policy.scorer
        self.quiet = (
            type(scorer).write is Scorer.write and not scorer.observes
        )  # is shown nothing but at the end of a period
        self.expecting = False
        self.attended = False
        self.handed: tuple[Tensor, Tensor] | None = None
        self.clear()

    def clear(self) -> None:
        self.storage: Storage | None = None
        self.due: list[Event] = []
        self.ring = Ring(self.policy.scorer.window)
        self.history = Expiries()
        self.is_initialized = False

    # --- what transformers asks of a cache layer ---

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.storage = Storage(self.policy, self.clock, self.place, key_states, value_states, self.meter)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the fresh states on to `attend`, which stores them."""
        if not self.expecting:
            raise NotAttachedError(
                "this EvictingCache met a model without learnevict hooks; wrap the call in `with attach(model, policy) as "
                "cache:` or call `attach(model)` first"
            )
        self.expecting = False
        if not self.is_initialized:
            with ordinary_tensors():
                self.lazy_initialization(key_states, value_states)
        self.handed = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns read before the current forward, padding included."""
        return self.clock.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns logical sizes; visibility is decided from slot positions, never from this."""
        return self.clock.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        raise CacheError(NO_CROP)

    def reset(self) -> None:
        self.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.storage is None:
            return
        index = beam_idx.to(self.storage.pool.position.device)
        self.storage.select(index)
        self.ring.select(index)

    # --- figures ---

    @property
    def store(self) -> Pool | None:
        """The slots; None before the first forward."""
        return None if self.storage is None else self.storage.pool

    @property
    def nbytes(self) -> int:
        return 0 if self.store is None else self.store.nbytes

    @property
    def peak_nbytes(self) -> int:
        return 0 if self.storage is None else self.storage.peak_nbytes

    @property
    def aux_nbytes(self) -> int:
        return self.ring.nbytes + (0 if self.store is None else self.store.aux_nbytes)

    @property
    def expiry(self) -> Tensor | None:
        """The recorded history, int32 [B, H, columns read or more]; None if nothing was recorded."""
        return self.history.table

    # --- the event loop ---

    def attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention) -> Tensor:
        """Runs the fresh tokens of one forward through the slots: [B, Hq, S, dv].

        Args:
            query: [B, Hq, S, d]; key [B, H, S, d]; value [B, H, S, dv]; post-RoPE.
            hidden: inputs of the attention module, [B, S, E].
        """
        handed, self.handed = self.handed, None
        if self.storage is None or handed is None or key is not handed[0] or value is not handed[1]:
            raise ModelError(
                f"layer {self.place.index} calls its attention function twice, or with other keys and values than its cache "
                "was given (latent or differential attention); learnevict cannot serve it: use the model's stock cache"
            )
        self.attended = True
        clock, storage = self.clock, self.storage
        out = query if clock.single else query.new_zeros(*query.shape[:3], value.shape[-1])
        for block, rest in zip(clock.plan, clock.rest, strict=True):
            storage.reserve(block, rest)
            if self.quiet and clock.single and clock.all_begun and not block.ends:
                self._write(storage, block, query, key, value, {})
                out = step_attention(storage.pool, query, attention, self.kernels, self.place.index)
                continue
            signals = self._signals(storage, block, (query, key, value), hidden, attention)
            assert signals.key is not None
            assert signals.value is not None
            state = self.policy.scorer.write(signals)
            self._write(storage, block, signals.query, signals.key, signals.value, state)
            answer = self._answer(storage.pool, signals)
            if clock.single:
                out = answer
            else:
                block.put(out, answer)
            if block.ends:
                self._close(storage, block, signals)
        storage.note_peak()
        return out

    def _signals(
        self,
        storage: Storage,
        block: Block,
        states: tuple[Tensor, Tensor, Tensor],
        hidden: Tensor | None,
        attention: Attention,
    ) -> Signals:
        """Returns what the policy sees of a block; `states`: query, key and value of the whole forward."""
        tokens = self.clock.tokens
        if not self.clock.single:
            states = (block.take(states[0], 2), block.take(states[1], 2), block.take(states[2], 2))
            hidden = None if hidden is None else block.take(hidden, 1)
            tokens = None if tokens is None else block.take(tokens, 1)
        query, key, value = states
        budget = block.rows.seen  # read at events only
        if any(block.due):
            targets = torch.tensor(storage.targets_after(block), dtype=torch.int32)
            budget = targets.to(query.device, non_blocking=True)
        return Signals(
            layer=self.place.index,
            slots=storage.pool,
            rows=block.rows,
            budget=budget,
            state=storage.pool.state.columns,
            query=query,
            query_position=block.position,
            attention=attention,
            key=key,
            value=value,
            hidden=hidden,
            tokens=tokens,
            ring=self.ring.held,
        )

    def _write(
        self, storage: Storage, block: Block, query: Tensor, key: Tensor, value: Tensor, state: dict[str, Tensor]
    ) -> None:
        storage.write(block, key, value, state)
        self.ring.add(block, query)
        if self.record:
            self.history.cover(self.clock.length + self.clock.pending, storage.pool.position)

    def _answer(self, pool: Pool, signals: Signals) -> Tensor:
        scorer, clock = self.policy.scorer, self.clock
        single = clock.single and clock.all_begun and (not scorer.observes or all(clock.plan[0].sizes))
        if single and not scorer.observes:
            return step_attention(pool, signals.query, signals.attention, self.kernels, self.place.index)
        if single:
            if self.kernels.wanted(signals.query.device):
                self.kernels.serve(self.place.index, signals.query.device, "the scorer watches every step")
            out, weights = observed_step(pool, signals.query, signals.attention)
        else:
            out, weights = block_attention(pool, signals)
        if scorer.observes:
            seen = replace(signals, fresh_attention=weights, ring=self.ring.held, memo={})
            for name, column in scorer.observe(seen).items():
                pool.state.columns[name] = column
        return out

    def _close(self, storage: Storage, block: Block, signals: Signals) -> None:
        now = replace(signals, ring=self.ring.held, state=storage.pool.state.columns, memo={})
        event = Event(storage, block, now)
        if any(block.full) and self.policy.scorer.refreshes:
            event.refresh(self.policy)
        if not any(block.due):
            return
        self.due.append(event.waiting() if self.clock.deferred else event)
        if not self.clock.deferred:
            self.decide()

    def decide(self, probe_attention: Tensor | None = None) -> None:
        """Holds the events that are due; `probe_attention` is float32 [B, H, G, P, N]."""
        storage, events, self.due = self.storage, self.due, []
        drop = leave = None
        before, touched = [] if storage is None else list(storage.live), [False] * len(self.clock.seen)
        for event in events:
            assert storage is not None
            rows = event.crowded()
            shown = replace(event.signals, probe_attention=probe_attention)
            part = event.decide(self.policy, shown, rows) if any(rows) else None
            if part is None:
                continue
            drop, leave = part if drop is None or leave is None else (drop | part[0], leave | part[1])
            touched = [row or old for row, old in zip(rows, touched, strict=True)]
            storage.settle_rows(rows, event.block)
        if drop is None or leave is None or storage is None:
            return
        check_room(storage, (storage.pool.position >= 0) & ~drop, self.policy, self.place.index)
        self.evict(drop, events[-1].block.rows.now + 1)
        if self.policy.store.bits:
            storage.demote(leave, max(old - new for old, new in zip(before, storage.live, strict=True)), touched)
        storage.give_back()

    def hide(self, hidden: Tensor) -> None:
        """Takes back tokens that the caller has since marked as padding, bool [B, columns read]."""
        if self.storage is None:
            return
        position = self.storage.pool.position
        index = position.clamp_min(0).flatten(1).long()
        drop = hidden.gather(1, index).view_as(position) & (position >= 0)
        end = torch.full((hidden.shape[0],), hidden.shape[1], device=hidden.device)
        self.evict(drop, end)
        self.storage.recount()
        self.ring.hide(hidden)

    def evict(self, drop: Tensor, end: Tensor) -> None:
        """Empties the slots `drop`, bool [B, H, N]; their tokens are gone from column `end` [B] on."""
        assert self.storage is not None
        if self.record:
            self.history.note(drop, self.storage.pool.position, end.view(-1, 1, 1))
        self.storage.evict(drop)
