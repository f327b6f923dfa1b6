"""EvictingCache: a transformers cache governed by a policy."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from learnevict.errors import CacheError, ModelError, PromptInPiecesWarning, StockLayersWarning, TraceError
from learnevict.infer.clock import Clock
from learnevict.infer.layer import NO_CROP, EvictingLayer
from learnevict.infer.model.supported import check_rope, evicting_layers, state_shape
from learnevict.infer.rows.conversation import Conversation, as_batch
from learnevict.infer.rows.ends import Ends, warn_of_padding
from learnevict.infer.store.recording import ordinary_tensors
from learnevict.infer.store.storage import Meter, Place, targets
from learnevict.ops import KernelChoice, Kernels
from learnevict.policy import AnyPolicy, governor
from learnevict.signals import Trace


class EvictingCache(Cache):
    """Keys and values in slots; a policy decides which stay. One cache serves one conversation batch.

    Layers whose stock cache is already bounded (sliding window) stay stock and are named in a StockLayersWarning.

    Args:
        config: of the model it will serve.
        policy: governs every full-attention layer: a Policy, an object with `keep(signals)`, or a function; see
            learnevict.policy.governor.
        record: keep the expiry trace (see `trace`).
        prompt_length: real tokens of each row's prompt, for prompt protection when prompt and answer are read in one
            forward; by default the prompt is what is read before the first single-token step.
        kernels: decode steps by Triton kernels: "on", "off", or "auto" (on a CUDA device with Triton); None: what
            learnevict.ops.using_kernels says, by default "auto".

    Attributes:
        mask: [B, columns read] of the last forward, 0 = padding; None if it had none, or one of its own columns only.
        places: position ids of the last forward's last column, [..., 1]; None if it had none.

    Raises:
        ModelError: layers that can neither be evicted from nor left stock, or kernels="on" where none can run.
        BudgetError: a byte budget that cannot hold guards and slack.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: AnyPolicy,
        *,
        record: bool = False,
        prompt_length: list[int] | None = None,
        kernels: KernelChoice | None = None,
    ) -> None:
        self.kernels = Kernels(kernels)
        self.policy = policy = governor(policy)
        self.record = record
        self._warned = False
        self.clock = Clock(policy.schedule, prompt_length, deferred=policy.deferred)
        self.conversation = Conversation(self.clock)
        self.used = False
        self.mask: Tensor | None = None
        self.places: Tensor | None = None
        self.text_config = text = config.get_text_config(decoder=True)
        check_rope(text)
        stock = DynamicCache(config=text).layers
        evicting = evicting_layers(stock)
        states = sum(heads * width for heads, width in (state_shape(text, index) for index in evicting))
        dtype = getattr(text, "dtype", None) or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.meter = Meter()
        row_bytes = 2 * states * torch.empty(0, dtype=dtype).element_size()
        layers = list(stock)
        for rank, index in enumerate(evicting):
            layers[index] = EvictingLayer(
                policy, self.clock, Place(index, rank, len(evicting), row_bytes), record, self.meter, self.kernels
            )
        super().__init__(layers=layers)
        self.evicting = evicting
        if policy.probing:
            check_probed(self.layers)
        if policy.schedule.active and evicting:
            targets(policy, self.clock, self._slots()[0].place, [0])
        if len(evicting) < len(layers) and policy.schedule.active:
            kept = [i for i in range(len(layers)) if i not in set(evicting)]
            kinds = " and ".join(sorted({type(stock[i]).__name__ for i in kept}))
            warnings.warn(
                f"layers {kept} keep their stock cache ({kinds}: bounded already); the policy "
                f"governs {len(evicting)} of {len(layers)} layers",
                StockLayersWarning,
                stacklevel=2,
            )

    def _slots(self) -> list[EvictingLayer]:
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    def admit(
        self, source: Tensor, tokens: Tensor | None, mask: Tensor | None, position_ids: Tensor | None, ends: Ends
    ) -> None:
        """Checks and records a forward before any layer runs; what `mask` hides although it was read as text is taken back."""
        hidden = self.conversation.admit(source, tokens, mask, position_ids, self.places, ends)
        self._warn_of_pieces()
        if hidden is not None:
            self.conversation.hide(hidden)
            lost = self.clock.hide(hidden)
            for layer in self._slots():
                layer.hide(hidden)
            warn_of_padding(max(lost) if self.policy.schedule.active else 0)

    def begin(self, source: Tensor, tokens: Tensor | None, mask: Tensor | None, position_ids: Tensor | None) -> None:
        size, talk = source.shape[1], self.conversation
        shown = None if talk.step and talk.turn_end else mask
        self.clock.read(source.shape[0], size, shown, tokens, source.device, single=talk.step, padded=talk.padded)
        for layer in self._slots():
            layer.attended = False
        whole = mask is not None and mask.shape[1] == self.clock.length + size
        self.mask = mask if whole else None
        self.places = None if position_ids is None else position_ids[..., -1:]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if isinstance(layer, EvictingLayer):
            return layer.update(key_states, value_states)
        with ordinary_tensors():
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def end(self) -> None:
        self.clock.commit()
        if self.kernels.refused:
            self.kernels.tell(len(self.evicting))

    def starts_with(self, ids: Any, attention_mask: Tensor | None = None) -> bool:
        """Returns whether a text [T] or [B, T], tensor or lists, begins with all that was read (padding aside) and goes on."""
        return self.conversation.starts(as_batch(ids), attention_mask)

    def check_served(self) -> None:
        """Raises ModelError if, after a forward, an evicting layer was not served by learnevict's attention."""
        missed = [layer.place.index for layer in self._slots() if not layer.attended]
        if missed:
            raise ModelError(
                f"the attention of layers {missed} did not pass through learnevict, so nothing they computed can be trusted; "
                "this model's attention modules do not hand keyword arguments on: use its stock cache"
            )

    def _warn_of_pieces(self) -> None:
        """Warns once per conversation that where the prompt ends cannot be seen when it comes in several forwards."""
        schedule, clock = self.policy.schedule, self.clock
        waits = self.policy.guard.prompt or schedule.prompt == "end"
        again = not self.conversation.step and clock.length and not clock.decoding and clock.prompt_length is None
        if waits and again and schedule.active and not self._warned:
            self._warned = True
            warnings.warn(
                "the prompt comes in several forwards, and this policy depends on where it ends: every forward counts as a "
                "prompt of its own; give prompt_length to attach() or EvictingCache()",
                PromptInPiecesWarning,
                stacklevel=4,
            )

    # --- figures ---

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now, all layers."""
        return sum(stored_bytes(layer) for layer in self.layers)

    @property
    def peak_nbytes(self) -> int:
        """Most bytes of keys and values held at any time by evicting layers, and what stock layers hold now."""
        stock = sum(stored_bytes(layer) for layer in self.layers if not isinstance(layer, EvictingLayer))
        return self.meter.peak + stock

    @property
    def full_nbytes(self) -> int:
        """Bytes a full cache of the tokens read so far would hold."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, EvictingLayer) and layer.store is not None:
                keys, values = layer.store.keys, layer.store.values
                rows, heads = layer.store.position.shape[:2]
                per_slot = keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
                total += rows * heads * per_slot * self.clock.length
            else:
                total += stored_bytes(layer)
        return total

    @property
    def aux_nbytes(self) -> int:
        """Bytes of positions, per-slot state, query rings and tables."""
        return sum(layer.aux_nbytes for layer in self._slots())

    def positions(self, layer: int) -> Tensor:
        """Returns which token each slot of an evicting layer that has run holds, int32 [B, H, slots], -1 = empty."""
        found = self.layers[layer]
        if not isinstance(found, EvictingLayer) or found.store is None:
            raise CacheError(f"layer {layer} holds no slots (evicting layers: {self.evicting}; run the model first)")
        return found.store.position

    def trace(self) -> Trace:
        """Returns the recorded history: expiry int32 [L, B, H, T]; layers that stay stock never expire."""
        slots = self._slots()
        if not self.record or any(layer.expiry is None for layer in slots):
            raise TraceError(
                "no trace was recorded; create the cache with record=True and run the model (beams record none)"
            )
        length = self.clock.length
        parts = {layer.place.index: layer.expiry[..., :length] for layer in slots if layer.expiry is not None}
        if not parts:
            raise TraceError("no layer of this model evicts, so there is no trace")
        like = next(iter(parts.values()))
        never = torch.full_like(like, torch.iinfo(torch.int32).max)
        expiry = torch.stack([parts.get(i, never) for i in range(len(self.layers))])
        budget = self.policy.budget
        return Trace(
            expiry,
            source=self.policy.name,
            budget=int(budget.amount) if budget.unit == "tokens" else None,
            period=self.policy.schedule.period,
            guard=self.policy.guard.terms,
        )

    # --- what transformers asks of a cache ---

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        raise CacheError(NO_CROP)

    def reset(self) -> None:
        self.clock.reset()
        self.conversation.reset()
        self.mask = self.places = None
        self._warned = False
        self.meter.reset()
        stock = DynamicCache(config=self.text_config).layers  # older releases keep zeros in place of tokens on reset()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, EvictingLayer):
                layer.reset()
            else:
                self.layers[index] = stock[index]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row beam_idx[i] was (beam search); refused while a trace is recorded: beams have several."""
        if self.record and any(layer.expiry is not None for layer in self._slots()):
            raise CacheError("beams record no trace; create the cache with record=False")
        with ordinary_tensors():
            self._reorder(beam_idx)

    def _reorder(self, beam_idx: Tensor) -> None:
        self.clock.reorder(beam_idx.tolist())
        self.conversation.select(beam_idx)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, beam_idx.to(self.mask.device))
        if self.places is not None and self.places.shape[-2] > 1:
            self.places = self.places.index_select(-2, beam_idx.to(self.places.device))
        for layer in self.layers:
            layer.reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.clock.seen)).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


def check_probed(layers: list[Any]) -> None:
    """Raises ModelError for cache layers of which a probe cannot see all that a token would."""
    wrong = sorted(
        {type(one).__name__ for one in layers if not isinstance(one, EvictingLayer | DynamicSlidingWindowLayer)}
    )
    if wrong:
        raise ModelError(
            f"a probe cannot be run beside cache layers of kind {', '.join(wrong)}: reading it would change their state; use a "
            "method without a probe"
        )


def stored_bytes(layer: object) -> int:
    """Returns bytes of keys and values of one cache layer, stock or evicting."""
    if isinstance(layer, EvictingLayer):
        return layer.nbytes
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))


def bytes_held(cache: Any) -> dict[str, int]:
    """Returns bytes of keys and values: `end` now, `peak` at any time, `full` if nothing were evicted."""
    if isinstance(cache, EvictingCache):
        return {"peak": cache.peak_nbytes, "end": cache.nbytes, "full": cache.full_nbytes}
    return dict.fromkeys(("peak", "end", "full"), sum(map(stored_bytes, cache.layers)))
