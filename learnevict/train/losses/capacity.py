"""Losses on how many tokens a soft gate holds, a sum of weights. Nothing here is [T, T].

Retention gates pay for what exceeds a budget (arXiv 2512.03324, 2605.09649), admission gates for every token they admit (arXiv
2512.17452) or for evicting less than a share (arXiv 2506.05345).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learnevict.ops.distributed import ratio
from learnevict.train.losses.objectives import masked_mean


def occupancy(
    retention: Float[Tensor, "B H T"], valid: Bool[Tensor, "B T"], *, chunk: int | None = None
) -> Float[Tensor, "B H T"]:
    """Returns what each head holds after each token: S_t = sum over i <= t of exp((t - i) r_i) (arXiv 2512.03324).

    Every token has a log-retention of its own, so there is no recurrence; but over chunks of C tokens, t = b C + u, earlier
    tokens factor into exp((b C - i) r_i) exp(u r_i): a product of [T / C, T] and [T, C]. All exponents are at most 0.

    Args:
        retention: log retention r at most 0, in columns of the text.
        valid: False for padding, which holds nothing.
        chunk: C; None: about the square root of T.
    """
    length = retention.shape[-1]
    size = chunk or max(16, 2 ** round(math.log2(max(length, 1)) / 2))
    num = -(-length // size)
    log_retention = torch.nn.functional.pad(retention.float(), (0, num * size - length))
    real = torch.nn.functional.pad(valid, (0, num * size - length)).unsqueeze(1)
    column = torch.arange(num * size, device=log_retention.device)
    step = column[:size]

    distance = step.view(-1, 1) - step  # [u, v] within a chunk
    own = log_retention.unflatten(-1, (num, 1, size))
    inside = (distance.clamp_min(0) * own).exp() * ((distance >= 0) & real.unflatten(-1, (num, 1, size)))

    before = (
        step.new_tensor(range(0, num * size, size)).view(-1, 1) - column
    )  # [b, i]: from token i to the chunk's start
    decayed = (before.clamp_min(0) * log_retention.unsqueeze(-2)).exp() * ((before > 0) & real.unsqueeze(-2))
    then = (step * log_retention.unsqueeze(-1)).exp()
    return (inside.sum(-1) + decayed @ then).flatten(-2)[..., :length]


def hinge(
    retention: Sequence[Float[Tensor, "B H T"]], valid: Bool[Tensor, "B T"], budget: float, *, together: bool = False
) -> Float[Tensor, ""]:
    """Returns the share of what a head could hold beyond its budget that it holds, averaged over real tokens, heads, layers.

    max(0, S_t - M) / max(t - M, 1), t counting real tokens from 1 (arXiv 2512.03324): beyond M tokens 1 where nothing was
    forgotten, and 0 before. Divided as in the authors' code, where the text has t; but the mean is the text's, over all
    tokens, where the code takes those that exceed alone: theirs asks for as much from a head that exceeds at one token as
    from one that always does, and jumps when a token stops to.

    Args:
        budget: M, tokens per layer and head.
        together: one hinge on the mean over all layers and heads: they share a budget (arXiv 2605.09649).
    """
    held = torch.stack([checkpoint(occupancy, part, valid, use_reentrant=False) for part in retention], 1).flatten(1, 2)
    if together:
        held = held.mean(1, keepdim=True)
    beyond = (valid.cumsum(-1) - budget).clamp_min(1).unsqueeze(1)
    excess = (held - budget).clamp_min(0) / beyond * valid.unsqueeze(1)
    return ratio(excess.sum(), valid.sum() * held.shape[1])


def admitted(log_gates: Sequence[Float[Tensor, "B H T"]], valid: Bool[Tensor, "B T"], window: int) -> Float[Tensor, ""]:
    """Returns the mean over tokens, heads and layers of o + (1 - o)(1 - (1 - g)^2), o = min(W / (T - i), 1) (arXiv 2512.17452).

    Concave in the gate g, so gates are pushed to 0 or 1; in the window, a share o of the text's rest, all are held.

    Args:
        log_gates: log g of each layer, at most 0.
        window: W, tokens that are not weighed.
    """
    gates = torch.stack(list(log_gates), 1).exp()
    left = valid.flip(-1).cumsum(-1).flip(-1).clamp_min(1)
    inside = (window / left).clamp_max(1.0)[:, None, None]
    cost = inside + (1 - inside) * (1 - (1 - gates).square())
    return masked_mean(cost, valid[:, None, None].expand_as(cost))


def shortfall(
    log_gates: Sequence[Float[Tensor, "B H T"]], valid: Bool[Tensor, "B T"], target: float
) -> Float[Tensor, ""]:
    """Returns how far the evicted share lies below `target`: max(0, target - mean), over all layers, heads and tokens.

    A token counts as evicted where its gate is below one half, with the gradient of 1 - g (straight through; arXiv 2506.05345).

    Args:
        log_gates: log g of each layer, at most 0.
        target: 1 - 1 / compression ratio.
    """
    gone = -torch.expm1(torch.stack(list(log_gates), 1))
    rounded = (gone > 0.5).to(gone.dtype) + gone - gone.detach()
    return (target - masked_mean(rounded, valid[:, None, None].expand_as(rounded))).clamp_min(0)
