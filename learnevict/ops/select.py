"""Selection with a defined order: of equal scores the older token goes first."""

from __future__ import annotations

import torch
from torch import Tensor


def eviction_order(scores: Tensor) -> Tensor:
    """Returns each score's place in the order of eviction along the last dimension, int64: 0 goes first.

    The lowest score goes first; of equal ones the first, which is the older token where entries stand in order of position.
    """
    return _places(scores.argsort(dim=-1, stable=True))


def highest(scores: Tensor, count: Tensor) -> Tensor:
    """Returns which `count` scores are evicted last, bool [..., N]: the highest; of equal ones the last.

    Args:
        scores: float [..., N].
        count: int [...].
    """
    return eviction_order(scores) >= scores.shape[-1] - count.unsqueeze(-1)


def ranks(scores: Tensor, position: Tensor) -> Tensor:
    """Returns the rank of each slot within its head, 0 = best, int64 [B, H, N].

    Args:
        scores: float [B, H, N], higher is better; give empty slots -inf.
        position: int32 [B, H, N], -1 where empty. Of equal scores the newer token ranks better, empty slots last.
    """
    newest_first = position.argsort(dim=-1, descending=True, stable=True)
    best_first = scores.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    return _places(newest_first.gather(-1, best_first))


def keep_top(scores: Tensor, position: Tensor, counts: Tensor) -> Tensor:
    """Returns the `counts` best occupied slots of each head, bool [B, H, N].

    Args:
        scores: float [B, H, N].
        position: int32 [B, H, N], -1 where empty.
        counts: int [B, H]; a head with fewer occupied slots keeps them all.
    """
    return (ranks(scores, position) < counts.unsqueeze(-1)) & (position >= 0)


def _places(order: Tensor) -> Tensor:
    """Returns where each entry stands in a permutation along the last dimension, int64."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
