"""The law by which evictions and layer budgets are sampled, and its exact log-probability.

ForesightKV's code samples by one law and optimises the log-probability of another; here both are the Plackett-Luce law of the
sampled permutation over the stored candidates (Kool et al., arXiv 1903.06059).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.ops.random import hashed, uniform
from learnevict.ops.select import eviction_order

NOTHING = -1
"""Stands in a permutation behind the last eviction."""
LOWEST = -1e30
"""A finite stand-in for minus infinity, whose gradient is zero and not undefined."""


def lowest_scores(
    scores: Float[Tensor, "*B N"], candidates: Bool[Tensor, "*B N"], count: Int[Tensor, "*B"]
) -> Bool[Tensor, "*B N"]:
    """Returns the `count` candidates of lowest score (the paper: twice as many as are evicted)."""
    return candidates & (eviction_order(scores.masked_fill(~candidates, torch.inf)) < count.unsqueeze(-1))


def sample_evictions(
    scores: Float[Tensor, "*B N"],
    candidates: Bool[Tensor, "*B N"],
    count: Int[Tensor, "*B"],
    temperature: float,
    noise: Float[Tensor, "*B N"] | None = None,
) -> Int[Tensor, "*B K"]:
    """Samples a permutation of slots to evict by Gumbel-top-k, NOTHING behind the last; K is the largest count.

    Args:
        scores: higher = keep.
        candidates: slots that may be evicted.
        count: slots to evict, at most as many as there are candidates.
        temperature: 0 evicts the lowest scores in order; the higher, the more uniform.
        noise: uniform in [0, 1), from which the Gumbel noise is made; needed above temperature 0.
    """
    logits = -scores
    if temperature > 0:
        assert noise is not None
        logits = logits / temperature - torch.log(-torch.log(noise.clamp_min(1e-20)))
    order = logits.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order[..., : int(count.max())]
    sampled = torch.arange(order.shape[-1], device=order.device) < count.unsqueeze(-1)
    return torch.where(sampled, order, NOTHING)


def log_probability(
    scores: Float[Tensor, "*B N"],
    candidates: Bool[Tensor, "*B N"],
    permutation: Int[Tensor, "*B K"],
    temperature: float,
) -> Float[Tensor, "*B K"]:
    """Returns the log-probability of every eviction given those before it, 0 for NOTHING; differentiable in the scores.

    It is log exp(-s_j / tau) / sum over the candidates that are left; summed over K it is that of the permutation.
    """
    logits = (-scores / temperature).masked_fill(~candidates, LOWEST)
    sampled = permutation != NOTHING
    where = permutation.clamp_min(0)
    evicted = torch.zeros_like(candidates).scatter(-1, where, sampled) & candidates
    left = logits.masked_fill(evicted, LOWEST).logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, where).masked_fill(~sampled, LOWEST)
    behind = chosen.flip(-1).logcumsumexp(-1).flip(-1)
    return (chosen - torch.logaddexp(left, behind)).masked_fill(~sampled, 0.0)


def entropy(scores: Float[Tensor, "*B N"], candidates: Bool[Tensor, "*B N"], temperature: float) -> Float[Tensor, "*B"]:
    """Returns the entropy of the first eviction, in nats; 0 without candidates."""
    log_share = (-scores / temperature).masked_fill(~candidates, LOWEST).log_softmax(-1)
    return -(log_share.exp() * log_share).masked_fill(~candidates, 0.0).sum(-1)


def sample_perturbations(random_keys: Int[Tensor, "B"], num_layers: int, spread: float) -> Float[Tensor, "B L"]:
    """Samples what is added to the logits of the layers' budget allocation in each row: normal noise less its mean.

    `spread` is its standard deviation before the mean is taken off."""
    noise = uniform(hashed(random_keys.unsqueeze(-1), -1, torch.arange(num_layers, device=random_keys.device)))
    found = spread * torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6).double()).float()
    return found - found.mean(-1, keepdim=True)


def allocation_log_probability(
    sampled: Float[Tensor, "B L"], logits: Float[Tensor, "L"], spread: float
) -> Float[Tensor, "B"]:
    """Returns the log-probability of sampled allocation logits, but for a constant; differentiable in `logits`, their mean."""
    return -(sampled - logits).square().sum(-1) / (2 * spread**2)
