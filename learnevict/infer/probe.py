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


@dataclass(frozen=True)
class ProbeRun(Run):
    """A probe on its way through the layers; `receive` is told every evicting layer and its float32 [B, H, G, P, N]."""

    cache: EvictingCache
    receive: Receive

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
            store = held.store.still() if torch.is_grad_enabled() else held.store
            out, attended = attend_with_probe(store, query, key, value, attention)
            self.receive(layer, attended)
            return out
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
    check_probed(cache.layers)
    if not cache.clock.seen:
        raise CacheError("a probe questions what has been read, and this cache has read nothing; run the model first")
    place = device_of(decoder)
    tokens = probe.embeddings.to(place, next(decoder.parameters()).dtype)
    batch, num = len(cache.clock.seen), len(tokens)
    run = ProbeRun(cache, receive)
    ahead = torch.arange(num, device=place)
    places = (ahead + run.columns_read).unsqueeze(0) if cache.places is None else cache.places + 1 + ahead
    with running(run), probe.adapted(decoder):
        decoder(
            inputs_embeds=tokens.expand(batch, -1, -1),
            attention_mask=torch.ones(batch, num, dtype=torch.int64, device=place),
            position_ids=places,
            use_cache=False,
        )


def attend_with_probe(
    store: Pool, query: Tensor, key: Tensor, value: Tensor, attention: Attention
) -> tuple[Tensor, Tensor]:
    """Returns attention of a probe over all occupied slots and, causally, over its own keys; no copy of the slots is made.

    Args:
        query: [B, Hq, P, d]; key [B, H, P, d]; value [B, H, P, dv]; post-RoPE.

    Returns:
        output [B, Hq, P, dv] and the slots' probabilities, float32 [B, H, G, P, N].
    """
    batch, query_heads, num, width = query.shape
    heads = key.shape[1]
    grouped = query.reshape(batch, heads, -1, width)
    shape = (batch, heads, query_heads // heads, num, -1)
    stored, own = store.logits(grouped).view(shape), (grouped @ key.transpose(-1, -2)).view(shape)
    occupied = (store.position >= 0)[:, :, None, None, :]
    causal = torch.ones(num, num, dtype=torch.bool, device=query.device).tril()
    stored = attention.scores(stored).masked_fill(~occupied, -torch.inf)
    own = attention.scores(own).masked_fill(~causal, -torch.inf)
    top = torch.maximum(stored.detach().amax(-1, keepdim=True), own.detach().amax(-1, keepdim=True))
    drain: Tensor | float = 0.0
    if attention.sinks is not None:
        sink = attention.sinks.float().view(1, heads, -1, 1, 1)
        top = torch.maximum(top, sink.detach())
        drain = (sink - top).exp()
    stored, own = (stored - top).exp(), (own - top).exp()
    total = stored.sum(-1, keepdim=True) + own.sum(-1, keepdim=True) + drain
    attended, own = stored / total, own / total
    out = store.mix(attended.flatten(2, 3)) + own.flatten(2, 3).to(value.dtype) @ value
    return out.reshape(batch, query_heads, num, -1), attended
