"""What is drawn, and the exact probability of it: evictions without replacement by Gumbel-top-k, and shares of layers.

ForesightKV's code samples from a pool by one law and optimises the log-probability of another; here both are the
Plackett-Luce law of the drawn order over the stored pool (7.4 of the methods' maths; Kool et al., arXiv 1903.06059).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.ops.random import hashed, uniform
from learnevict.ops.select import eviction_order

NOTHING = -1
"""Stands in an order where nothing was drawn."""
LOWEST = -1e30
"""A finite stand-in for minus infinity, whose gradient is zero and not undefined."""


def lowest_scores(
    scores: Float[Tensor, "*B N"], candidates: Bool[Tensor, "*B N"], count: Int[Tensor, "*B"]
) -> Bool[Tensor, "*B N"]:
    """The `count` candidates that the scores would evict first: the pool of a draw (the paper: twice as many as go)."""
    return candidates & (eviction_order(scores.masked_fill(~candidates, torch.inf)) < count.unsqueeze(-1))


def draw_evictions(
    scores: Float[Tensor, "*B N"],
    pool: Bool[Tensor, "*B N"],
    count: Int[Tensor, "*B"],
    temperature: float,
    noise: Float[Tensor, "*B N"] | None = None,
) -> Int[Tensor, "*B K"]:
    """Slots to evict, first drawn first, NOTHING behind the last; K is the largest count.

    Args:
        scores: higher = keep.
        pool: what may be drawn.
        count: slots to draw, at most as many as the pool holds.
        temperature: 0 evicts the lowest scores in order; the higher, the more uniform.
        noise: uniform in [0, 1), what the Gumbel noise is made of; needed above temperature 0.
    """
    wish = -scores
    if temperature > 0:
        assert noise is not None
        wish = wish / temperature - torch.log(-torch.log(noise.clamp_min(1e-20)))
    order = wish.masked_fill(~pool, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order[..., : int(count.max())]
    drawn = torch.arange(order.shape[-1], device=order.device) < count.unsqueeze(-1)
    return torch.where(drawn, order, NOTHING)


def log_probability(
    scores: Float[Tensor, "*B N"], pool: Bool[Tensor, "*B N"], order: Int[Tensor, "*B K"], temperature: float
) -> Float[Tensor, "*B K"]:
    """Of every draw given the draws before it: log exp(-s_j / tau) / sum over what is left of the pool; 0 for NOTHING.

    Summed over K it is the log-probability of the ordered draw. Differentiable in the scores.
    """
    wish = (-scores / temperature).masked_fill(~pool, LOWEST)
    drawn = order != NOTHING
    where = order.clamp_min(0)
    taken = torch.zeros_like(pool).scatter(-1, where, drawn) & pool
    left = wish.masked_fill(taken, LOWEST).logsumexp(-1, keepdim=True)
    picked = wish.gather(-1, where).masked_fill(~drawn, LOWEST)
    behind = picked.flip(-1).logcumsumexp(-1).flip(-1)
    return (picked - torch.logaddexp(left, behind)).masked_fill(~drawn, 0.0)


def entropy(scores: Float[Tensor, "*B N"], pool: Bool[Tensor, "*B N"], temperature: float) -> Float[Tensor, "*B"]:
    """Of the first draw from a pool, in nats; 0 for an empty pool."""
    log_share = (-scores / temperature).masked_fill(~pool, LOWEST).log_softmax(-1)
    return -(log_share.exp() * log_share).masked_fill(~pool, 0.0).sum(-1)


def draw_shifts(words: Int[Tensor, "B"], num_layers: int, spread: float) -> Float[Tensor, "B L"]:
    """How far each row departs from the logits of the layers' shares: normal, of this spread, less its mean.

    Args:
        words: what each row's noise is hashed from (ops.hashing).
        num_layers: L.
        spread: standard deviation before the mean is taken off.
    """
    noise = uniform(hashed(words.unsqueeze(-1), -1, torch.arange(num_layers, device=words.device)))
    shifts = spread * torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6).double()).float()
    return shifts - shifts.mean(-1, keepdim=True)


def shift_log_probability(tried: Float[Tensor, "B L"], logits: Float[Tensor, "L"], spread: float) -> Float[Tensor, "B"]:
    """Of logits tried around those of mean 0, but for a constant. Differentiable in the logits."""
    return -(tried - logits).square().sum(-1) / (2 * spread**2)
