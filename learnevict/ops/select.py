"""Selection with a defined order: of equal scores the older token goes first."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(scores: Tensor, position: Tensor) -> Tensor:
    """Rank of each slot within its head, 0 = best, int64 [B, H, N].

    Args:
        scores: float [B, H, N], higher is better; give empty slots -inf.
        position: int32 [B, H, N], -1 where empty. Of equal scores the newer token ranks better, empty slots last.
    """
    newest_first = position.argsort(dim=-1, descending=True, stable=True)
    best_first = scores.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    order = newest_first.gather(-1, best_first)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def keep_top(scores: Tensor, position: Tensor, counts: Tensor) -> Tensor:
    """The `counts` best occupied slots of each head, bool [B, H, N].

    Args:
        scores: float [B, H, N].
        position: int32 [B, H, N], -1 where empty.
        counts: int [B, H]; a head with fewer occupied slots keeps them all.
    """
    return (ranks(scores, position) < counts.unsqueeze(-1)) & (position >= 0)
