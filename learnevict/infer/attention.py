"""How layers attend: the run that decides it in a forward, and the one place where queries meet keys.

One Run is active in a thread at a time, of nested ones the innermost: it serves a cache, replays a trace, weighs softly, or
asks a probe. Hooks on the model (infer.attach) call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from learnevict.infer.store.slots import SlotPool
from learnevict.infer.store.tiers import Pool
from learnevict.ops import Kernels, slot_attention, unfit
from learnevict.signals import NEVER, Attention, Signals

Arguments = dict[str, Any]


class Run(ABC):
    """Decides how the layers of a forward attend."""

    def begin(self, given: Arguments) -> Arguments | None:
        """Called before a forward with its arguments by name; returns those it is to run with, None if they are the same."""
        return None

    def end(self, output: Any) -> Any:
        """Called after a forward with what it returned, None after an error; returns what it returns instead, or None."""
        return None

    @abstractmethod
    def takes(self, layer: int) -> bool:
        """Returns whether this layer attends through `attend`, asked before its module runs; if not, it attends as always."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> Tensor:
        """Returns the attention of one layer, [B, Hq, S, dv].

        Args:
            query: [B, Hq, S, d]; key [B, H, S, d]; value [B, H, S, dv]; post-RoPE.
            hidden: inputs of the attention module [B, S, E].
        """

    def masks(self, window: int | None) -> bool:
        """Returns whether visibility in layers with this sliding window (None: full attention) is decided without a mask."""
        return window is None


RUN: ContextVar[Run | None] = ContextVar("learnevict_run", default=None)


@contextmanager
def running(run: Run) -> Generator[None]:
    """Makes `run` the active one inside."""
    token = RUN.set(run)
    try:
        yield
    finally:
        RUN.reset(token)


class Step(NamedTuple):
    """What the hook on an attention module hands to its attention function; `hidden` are the module's inputs [B, S, E]."""

    run: Run
    hidden: Tensor | None
    frequencies: Tensor | None


def step_attention(store: Pool, query: Tensor, attention: Attention, kernels: Kernels, layer: int) -> Tensor:
    """Returns attention of one query per row [B, Hq, 1, d] over every occupied slot, its own included: [B, Hq, 1, dv]."""
    batch, query_heads = query.shape[:2]
    heads, in_torch = store.position.shape[1], store.in_torch
    if attention.softcap is not None or attention.sinks is not None:
        in_torch = in_torch or "layers have a softcap or attention sinks"
    wanted = kernels.wanted(query.device)
    kernel = wanted and kernels.serve(layer, query.device, in_torch or unfit(query, heads))
    if in_torch is not None or not isinstance(store, SlotPool):
        return observed_step(store, query, attention)[0]
    grouped = query.view(batch, heads, -1, query.shape[3])
    out = slot_attention(grouped, store.keys, store.values, store.bias, attention.scaling, kernel)
    return out.reshape(batch, query_heads, 1, -1)


def observed_step(store: Pool, query: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """Returns what `step_attention` does, and probabilities float32 [B, H, G, 1, N]; the query sees every occupied slot."""
    batch, query_heads = query.shape[:2]
    logits = store.logits(query.view(batch, store.position.shape[1], -1, query.shape[3]))
    bias = store.bias.unsqueeze(2)
    if attention.sinks is None:
        weights = (attention.scores(logits) + bias).softmax(-1)
    else:
        weights = attention.probabilities(logits.unsqueeze(3), (bias == 0).unsqueeze(3)).squeeze(3)
    return store.mix(weights).reshape(batch, query_heads, 1, -1), weights.unsqueeze(3)


def block_attention(store: Pool, signals: Signals) -> tuple[Tensor, Tensor]:
    """Returns causal attention of fresh queries over the slots, [B, Hq, S, dv], and probabilities float32 [B, H, G, S, N]."""
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
    expiry: Tensor | None,
    valid: Tensor | None,
    attention: Attention,
    block: int = 128,
) -> Tensor:
    """Returns causal attention in which token i of a head is visible to query t iff i <= t < expiry[i]: [B, Hq, T, dv].

    Args:
        query: [B, Hq, T, d]; key [B, H, T, d]; value [B, H, T, dv].
        expiry: int32 [B, H, T]; None if nothing is evicted, which torch's fused attention computes where it can.
        valid: bool [B, T], False for padding, which no real token sees; None if there is none.
        block: queries per tile; never [T, T].
    """
    # torch's fused kernels know no softcap and no sinks, and without them it would make [T, T], as it does where dv != d
    if expiry is None and attention.softcap is attention.sinks is None and query.shape[-1] == value.shape[-1]:
        return full_attention(query, key, value, valid, attention.scaling)
    length = query.shape[2]
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    column = torch.arange(length, device=query.device)
    until = column.new_full((1, 1, length), length)
    if expiry is not None:
        until = torch.where(expiry == NEVER, length, expiry).long()
    real = torch.ones(len(query), length, dtype=torch.bool, device=query.device) if valid is None else valid
    for start in range(0, length, block):
        stop = min(start + block, length)
        now = column[start:stop].view(1, 1, 1, -1, 1)
        alive = (column[:stop] <= now) & (now < until[:, :, None, None, :stop]) & real[:, None, None, None, :stop]
        tile = query[:, :, start:stop]
        out[:, :, start:stop] = masked_attention(tile, key[:, :, :stop], value[:, :, :stop], alive, attention)
    return out


def full_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float) -> Tensor:
    """Returns causal attention over all real tokens by torch's fused kernels; arguments as of `replay_attention`.

    Padding is moved behind the real tokens, which then do not see it: no mask is needed, and no query is without a key.
    """
    group = query.shape[1] // key.shape[1]
    # repeated, as not every fused kernel shares keys between query heads
    parts = [query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)]
    if valid is None:
        return scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True, scale=scaling)
    order = (~valid).to(torch.int8).argsort(dim=-1, stable=True)[:, None, :, None].expand(query.shape)
    parts = [part.gather(2, order) for part in parts]
    out = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True, scale=scaling)
    return torch.zeros_like(out).scatter(2, order, out).masked_fill(~valid[:, None, :, None], 0.0)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
    """Returns attention of a layer that keeps its stock cache, [B, Hq, S, dv].

    Args:
        query: [B, Hq, S, d]; key [B, H, N, d]; value [B, H, N, dv].
        mask: additive [B, 1, S, N], 0 where visible and negative elsewhere.
    """
    visible = torch.ones((), dtype=torch.bool, device=query.device)
    if mask is not None:
        visible = mask[:, :, None, :, : key.shape[2]] >= 0
    return masked_attention(query, key, value, visible, attention)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, attention: Attention, bias: Tensor | None = None
) -> Tensor:
    """Returns attention of queries [B, Hq, S, d] over whole keys [B, H, N, d] and values [B, H, N, dv]: [B, Hq, S, dv].

    `visible` and `bias` are as of Attention.probabilities.
    """
    batch, query_heads, size, width = query.shape
    heads, num = key.shape[1:3]
    logits = (query.reshape(batch, heads, -1, width) @ key.transpose(-1, -2)).view(batch, heads, -1, size, num)
    weights = attention.probabilities(logits, visible, bias).flatten(2, 3).to(value.dtype)
    return (weights @ value).view(batch, query_heads, size, -1)
