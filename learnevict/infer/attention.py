"""Attention over stored slots: the one place where queries meet keys, for the event loop and for replay."""

from __future__ import annotations

import torch
from torch import Tensor

from learnevict.infer.store.pages import PagePool
from learnevict.infer.store.slots import SlotPool
from learnevict.ops import runs_in_torch, slot_attention
from learnevict.signals import NEVER, Attention, Signals


def step_attention(store: SlotPool | PagePool, query: Tensor, attention: Attention) -> Tensor:
    """One query per row over every occupied slot, without keeping the probabilities.

    Args:
        store: slots of the layer, the query's own token included.
        query: [B, Hq, 1, d], post-RoPE.

    Returns:
        [B, Hq, 1, dv]
    """
    batch, query_heads = query.shape[:2]
    plain = attention.softcap is None and attention.sinks is None
    if not plain or isinstance(store, PagePool):
        runs_in_torch("heads are ragged" if plain else "the layer has a softcap or attention sinks")
        return observed_step(store, query, attention)[0]
    grouped = query.view(batch, store.position.shape[1], -1, query.shape[3])
    out = slot_attention(grouped, store.keys, store.values, store.bias, attention.scaling)
    return out.reshape(batch, query_heads, 1, -1)


def observed_step(store: SlotPool | PagePool, query: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """As `step_attention`, with probabilities float32 [B, H, G, 1, N]: every occupied slot is visible to the newest query."""
    batch, query_heads = query.shape[:2]
    logits = store.logits(query.view(batch, store.position.shape[1], -1, query.shape[3]))
    bias = store.bias.unsqueeze(2)
    if attention.sinks is None:
        weights = (attention.scores(logits) + bias).softmax(-1)
    else:
        weights = attention.probabilities(logits.unsqueeze(3), (bias == 0).unsqueeze(3)).squeeze(3)
    return store.mix(weights).reshape(batch, query_heads, 1, -1), weights.unsqueeze(3)


def block_attention(store: SlotPool | PagePool, signals: Signals) -> tuple[Tensor, Tensor]:
    """A block of fresh queries over the slots; causal inside the block, padding sees nothing.

    Returns:
        output [B, Hq, S, dv] and probabilities float32 [B, H, G, S, N].
    """
    batch, query_heads, size, width = signals.query.shape
    heads = store.position.shape[1]
    logits = store.logits(signals.query.reshape(batch, heads, -1, width))
    logits = logits.view(batch, heads, query_heads // heads, size, -1)
    weights = signals.attention.probabilities(logits, signals.visible(signals.query_position))
    out = store.mix(weights.flatten(2, 3))
    return out.reshape(batch, query_heads, size, -1), weights


def replay_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    valid: Tensor | None,
    attention: Attention,
    block: int = 128,
) -> Tensor:
    """Causal attention in which token i of a head is visible to query t iff i <= t < expiry[i].

    Args:
        query: [B, Hq, T, d]; key [B, H, T, d]; value [B, H, T, dv].
        expiry: int32 [B, H, T].
        valid: bool [B, T], False for padding; None if there is none.
        block: queries per tile; never [T, T].

    Returns:
        [B, Hq, T, dv]
    """
    batch, query_heads, length, _ = query.shape
    heads = key.shape[1]
    out = query.new_empty(batch, query_heads, length, value.shape[-1])
    column = torch.arange(length, device=query.device)
    until = torch.where(expiry == NEVER, length, expiry).long()
    real = torch.ones(batch, length, dtype=torch.bool, device=query.device) if valid is None else valid
    for start in range(0, length, block):
        stop = min(start + block, length)
        tile = query[:, :, start:stop].reshape(batch, heads, -1, query.shape[-1])
        logits = (tile @ key[:, :, :stop].transpose(-1, -2)).view(batch, heads, -1, stop - start, stop)
        now = column[start:stop].view(1, 1, 1, -1, 1)
        alive = (column[:stop] <= now) & (now < until[:, :, None, None, :stop]) & real[:, None, None, None, :stop]
        weights = attention.probabilities(logits, alive).flatten(2, 3).to(value.dtype)
        out[:, :, start:stop] = (weights @ value[:, :, :stop]).view(batch, query_heads, stop - start, -1)
    return out


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
    """Attention of a layer that keeps its stock cache.

    Args:
        query: [B, Hq, S, d]; key [B, H, N, d]; value [B, H, N, dv].
        mask: additive [B, 1, S, N], 0 where visible and negative elsewhere.

    Returns:
        [B, Hq, S, dv]
    """
    batch, query_heads, size, width = query.shape
    heads, num = key.shape[1:3]
    logits = (query.reshape(batch, heads, -1, width) @ key.transpose(-1, -2)).view(batch, heads, -1, size, num)
    visible = torch.ones((), dtype=torch.bool, device=query.device) if mask is None else mask[:, :, None, :, :num] >= 0
    weights = attention.probabilities(logits, visible).flatten(2, 3).to(value.dtype)
    return (weights @ value).view(batch, query_heads, size, -1)
