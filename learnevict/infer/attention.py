"""Attention over stored slots: the one place where queries meet keys, for the event loop and for replay."""

from __future__ import annotations

import torch
from torch import Tensor

from learnevict.infer.pages import PagePool
from learnevict.infer.slots import SlotPool
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
    heads = store.position.shape[1]
    grouped = query.view(batch, heads, query_heads // heads, -1)
    bias = store.bias.unsqueeze(2)
    plain = attention.softcap is None and attention.sinks is None
    if plain and isinstance(store, SlotPool):
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, store.keys, store.values, attn_mask=bias, scale=attention.scaling
        )
    else:
        logits = store.logits(grouped).unsqueeze(3)
        weights = attention.probabilities(logits, (bias == 0).unsqueeze(3))
        out = store.mix(weights.squeeze(3))
    return out.reshape(batch, query_heads, 1, -1)


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
