"""Losses between a gate's scores and the oracle's labels; their one home."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def pairwise(
    scores: Float[Tensor, "M H N"],
    targets: Float[Tensor, "M H N"],
    candidates: Bool[Tensor, "M H N"],
    *,
    pairs: int = 512,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Order candidates as the labels do: mean over sampled pairs of |y_i - y_j| softplus(s_j - s_i), y_i > y_j.

    ForesightKV (arXiv 2602.03203) takes all pairs with a hinge of margin 0.01 and equal weights. Here the logistic loss on
    sampled pairs is weighted by how far apart the labels are, so a fact that will be needed outweighs orderings of filler.

    Args:
        scores: higher = keep.
        targets: any monotone transform of the future's attention.
        candidates: slots that compete; pairs with another slot count nothing.
        pairs: sampled per row and head.
        generator: for the sampling.
    """
    shape = (*scores.shape[:2], pairs)
    left, right = (sample_slots(candidates, shape, generator) for _ in range(2))
    gap = targets.gather(-1, left) - targets.gather(-1, right)
    margin = (scores.gather(-1, left) - scores.gather(-1, right)) * gap.sign()
    weight = gap.abs() * candidates.any(-1, keepdim=True)
    return (weight * torch.nn.functional.softplus(-margin)).sum() / weight.sum().clamp_min(1e-6)


def sample_slots(
    candidates: Bool[Tensor, "M H N"], shape: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """Uniform random candidates, int64 of `shape`; slot 0 where a head has none."""
    order = candidates.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    count = candidates.sum(-1, keepdim=True).clamp_min(1)
    draw = torch.rand(shape, generator=generator, device=candidates.device)
    return order.gather(-1, (draw * count).long().clamp_max(candidates.shape[-1] - 1))


def regression(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]
) -> Float[Tensor, ""]:
    """Mean squared error over candidates; makes scores comparable across heads."""
    error = (scores - targets).square() * candidates
    return error.sum() / candidates.sum().clamp_min(1)


def kept_share(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"], drop: int
) -> Float[Tensor, ""]:
    """Share of the oracle's `drop` evictions that the scores choose too (ForesightKV's accuracy)."""
    worst = [
        values.masked_fill(~candidates, torch.inf).argsort(dim=-1, stable=True)[..., :drop]
        for values in (scores, targets)
    ]
    marks = [torch.zeros_like(candidates).scatter_(-1, index, value=True) & candidates for index in worst]
    return (marks[0] & marks[1]).sum() / marks[1].sum().clamp_min(1)
