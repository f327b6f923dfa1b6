"""Questioning a cache: a probe's tokens run through the decoder, attend to the slots and to each other, and are forgotten.

Their forward has no cache: evicting layers lend their slots, sliding-window layers the window they keep. Positions are those of
the tokens that would come next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learnevict.errors import CacheError, ModelError, NotAttachedError
from learnevict.infer.attention import Run, plain_attention, running
from learnevict.infer.cache import EvictingCache, check_probed
from learnevict.infer.layer import EvictingLayer
from learnevict.infer.model.modules import decoder_of, device_of
from learnevict.infer.store.tiers import Pool
from learnevict.policy import Probe
from learnevict.signals import Attention

Receive = Callable[[int, Tensor], None]
States = tuple[Tensor, Tensor, Tensor]
Answer = Callable[[int, Pool, States, Attention], Tensor]
"""Attends in one evicting layer: its index, its slots, query, key and value of the probe; returns the output [B, Hq, P, dv]."""


@dataclass(frozen=True)
class ProbeRun(Run):
    """A probe on its way through the layers; `answer` attends in the evicting ones."""

    cache: EvictingCache
    answer: Answer

    @property
    def columns_read(self) -> int:
        """Those of a forward that is just ending included."""
        return self.cache.clock.length + self.cache.clock.pending

    def takes(self, layer: int) -> bool:
        return True

    def masks(self, window: int | None) -> bool:
        return True

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> Tensor:
        held = self.cache.layers[layer]
        if isinstance(held, EvictingLayer):
            assert held.store is not None
            return self.answer(layer, held.store, (query, key, value), attention)
        window = attention.window
        if window is None or window != held.sliding_window:
            raise ModelError(
                f"layer {layer} keeps a window of {held.sliding_window} tokens, but its attention names {window}; learnevict "
                "cannot run a probe through this model"
            )
        width = held.keys.shape[2]
        column = torch.arange(self.columns_read - width, self.columns_read + query.shape[2], device=query.device)
        now = column[width:].view(-1, 1)
        seen = (column <= now) & (now - column < window) & self._real(column).unsqueeze(1)
        keys, values = (torch.cat(pair, 2) for pair in ((held.keys, key), (held.values, value)))
        return plain_attention(query, keys, values, seen.unsqueeze(1).to(torch.int8) - 1, attention)

    def _real(self, column: Tensor) -> Tensor:
        """Returns which columns hold tokens, bool [B, n]."""
        first = torch.tensor(self.cache.clock.first).to(column.device, non_blocking=True)
        real = column >= first.unsqueeze(-1)
        if self.cache.mask is None:
            return real
        padded = self.cache.mask.bool()[:, column.clamp_max(self.columns_read - 1)]
        return real & (padded | (column >= self.columns_read))


def probe_attention(model: PreTrainedModel, cache: EvictingCache, probe: Probe) -> dict[int, Tensor]:
    """Returns what a probe attends to in every evicting layer, with gradient to its parameters where that is on.

    The model is attached and has read a text into `cache`, an EvictingCache in which nothing changes.

    Returns:
        {layer: float32 [B, H, G, P, N]}, probabilities over the slots and the probe's own keys, of which the slots' part
        is given: rows sum to at most 1. Empty slots get 0. With gradients on, slots are copied: the cache may go on.
    """
    found: dict[int, Tensor] = {}
    run_probe(decoder_of(model), cache, probe, found.__setitem__)
    if len(found) < sum(isinstance(layer, EvictingLayer) for layer in cache.layers):
        raise NotAttachedError("a probe met a model without learnevict hooks; call attach(model) first")
    return found


def run_probe(decoder: nn.Module, cache: EvictingCache, probe: Probe, receive: Receive) -> None:
    """Runs a probe through the decoder; `receive` is told what it attends to in each layer before the next layer runs."""

    def answer(layer: int, store: Pool, states: States, attention: Attention) -> Tensor:
        store = store.still() if torch.is_grad_enabled() else store
        out, attended = attend_with_probe(store, states, attention)
        receive(layer, attended)
        return out

    tokens = probe.embeddings.to(device_of(decoder), next(decoder.parameters()).dtype)
    with probe.adapted(decoder):
        run_tokens(decoder, cache, answer, inputs_embeds=tokens.expand(len(cache.clock.seen), -1, -1))


def run_tokens(decoder: nn.Module, cache: EvictingCache, answer: Answer, **inputs: Tensor) -> Tensor:
    """Runs tokens that come next and leave no trace; returns the decoder's last hidden states, [B, P, E].

    Args:
        answer: attends in evicting layers.
        **inputs: of the decoder, input_ids [B, P] or inputs_embeds [B, P, E].
    """
    check_probed(cache.layers)
    if not cache.clock.seen:
        raise CacheError("a probe questions what has been read, and this cache has read nothing; run the model first")
    batch, num = next(iter(inputs.values())).shape[:2]
    run, place = ProbeRun(cache, answer), device_of(decoder)
    ahead = torch.arange(num, device=place)
    places = (ahead + run.columns_read).unsqueeze(0) if cache.places is None else cache.places + 1 + ahead
    with running(run):
        mask = torch.ones(batch, num, dtype=torch.int64, device=place)
        return decoder(**inputs, attention_mask=mask, position_ids=places, use_cache=False)[0]


def attend_with_probe(
    store: Pool,
    states: tuple[Tensor, Tensor, Tensor],
    attention: Attention,
    visible: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns attention of a probe over occupied slots and, causally, over its own keys; no copy of the slots is made.

    Args:
        states: query [B, Hq, P, d], key [B, H, K, d], value [B, H, K, dv], post-RoPE.
        visible: bool [B, H, N], the slots that it sees; None: all occupied.
        first: number of the key that the first query belongs to.

    Returns:
        output [B, Hq, P, dv] and the slots' probabilities, float32 [B, H, G, P, N].
    """
    query, key, value = states
    batch, query_heads, num, width = query.shape
    heads = key.shape[1]
    grouped = query.reshape(batch, heads, -1, width)
    shape = (batch, heads, query_heads // heads, num, -1)
    stored, own = store.logits(grouped).view(shape), (grouped @ key.transpose(-1, -2)).view(shape)
    seen = store.position >= 0 if visible is None else visible & (store.position >= 0)
    attended, own = attention.beside(stored, own, seen[:, :, None, None, :], first)
    out = store.mix(attended.flatten(2, 3)) + own.flatten(2, 3).to(value.dtype) @ value
    return out.reshape(batch, query_heads, num, -1), attended
