"""Losses between a gate's scores and the oracle's labels, and between the outputs of two models.

Means are over the batch of all processes (ops.distributed.ratio), so the number of processes changes no loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.ops.distributed import ratio
from learnevict.ops.random import hashed, uniform
from learnevict.ops.select import eviction_order


def pairwise(
    scores: Float[Tensor, "M H N"],
    targets: Float[Tensor, "M H N"],
    candidates: Bool[Tensor, "M H N"],
    *,
    pairs: int = 512,
    seeds: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the weighted logistic loss of the order of candidates: the mean over sampled pairs with y_i > y_j of
    |y_i - y_j| softplus(s_j - s_i).

    ForesightKV (arXiv 2602.03203) takes all pairs with a hinge of margin 0.01 and equal weights. Here the logistic loss on
    sampled pairs is weighted by how far apart the labels are, so a fact that will be needed outweighs orderings of filler.

    Args:
        scores: higher = keep.
        targets: any monotone transform of the future's attention.
        pairs: sampled per row and head.
        seeds: random keys (ops.random), one per row; None: pairs come from the global generator.
    """
    left, right = sample_pairs(candidates, pairs, seeds)
    gap = targets.gather(-1, left) - targets.gather(-1, right)
    margin = (scores.gather(-1, left) - scores.gather(-1, right)) * gap.sign()
    weight = gap.abs() * candidates.any(-1, keepdim=True)
    return ratio((weight * torch.nn.functional.softplus(-margin)).sum(), weight.sum(), 1e-6)


def log_label(target: Tensor) -> Tensor:
    """Returns labels on a logarithmic scale from 0 (below 1e-3) to 1 (all attention)."""
    return 1 + torch.log10(target.clamp_min(1e-3)) / 3


def pairwise_on_logs(
    scores: Float[Tensor, "M H N"],
    targets: Float[Tensor, "M H N"],
    candidates: Bool[Tensor, "M H N"],
    *,
    pairs: int = 256,
    seeds: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, ""]:
    """Returns `pairwise` plus a tenth of `regression`, both of labels on a logarithmic scale, as mode "replay" has it."""
    labels = log_label(targets)
    order = pairwise(scores, labels, candidates, pairs=pairs, seeds=seeds)
    return order + 0.1 * regression(scores, labels, candidates)


def sample_pairs(
    candidates: Bool[Tensor, "M H N"], pairs: int, seeds: Int[Tensor, "M"] | None
) -> list[Int[Tensor, "M H pairs"]]:
    """Returns the first and the second slots of random pairs of candidates; `seeds` as in `pairwise`."""
    return [sample_slots(candidates, pairs, None if seeds is None else hashed(seeds, side)) for side in range(2)]


def sample_slots(
    candidates: Bool[Tensor, "M H N"], number: int, seeds: Int[Tensor, "M"] | None
) -> Int[Tensor, "M H number"]:
    """Returns uniform random candidates, slot 0 where a head has none; `seeds` as in `pairwise`."""
    order = candidates.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    count = candidates.sum(-1, keepdim=True).clamp_min(1)
    draw = uniform_of(seeds, (*candidates.shape[:2], number), candidates.device)
    return order.gather(-1, (draw * count).long().clamp_max(candidates.shape[-1] - 1))


def uniform_of(seeds: Int[Tensor, "M"] | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns draws from [0, 1), float32 of `shape` [M, H, N]; a row depends on its seed alone. `seeds` as in `pairwise`."""
    if seeds is None:
        return torch.rand(shape, device=device)
    head, place = (torch.arange(size, device=device) for size in shape[1:])
    return uniform(hashed(seeds.view(-1, 1, 1), head.view(-1, 1), place))


def regression(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]
) -> Float[Tensor, ""]:
    """Returns the mean squared error over candidates; it makes scores comparable across heads."""
    return masked_mean((scores - targets).square(), candidates)


def kept_share(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"], drop: int
) -> Float[Tensor, ""]:
    """Returns the share of the oracle's `drop` evictions that the scores choose too (ForesightKV's accuracy)."""
    marks = [
        candidates & (eviction_order(values.masked_fill(~candidates, torch.inf)) < drop) for values in (scores, targets)
    ]
    return (marks[0] & marks[1]).sum() / marks[1].sum().clamp_min(1)


def divergence(
    teacher: Float[Tensor, "B T V"], student: Float[Tensor, "B T V"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Returns KL(teacher || student) of next-token distributions given by logits, in nats per scored position.

    Swap the two for the other direction, as DMS has it (arXiv 2506.05345): the argument that comes first is averaged over.
    """
    first, second = (part[loss_mask].float().log_softmax(-1) for part in (teacher, student))
    return ratio((first.exp() * (first - second)).sum(), loss_mask.sum())


def next_token(
    logits: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Returns the cross-entropy of the token after each scored position, in nats per position; the last one has none."""
    counted = loss_mask[:, :-1]
    found = torch.nn.functional.cross_entropy(logits[:, :-1][counted].float(), tokens[:, 1:][counted], reduction="sum")
    return ratio(found, counted.sum())


def hidden_error(
    teacher: Float[Tensor, "B T E"], student: Float[Tensor, "B T E"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Returns the mean squared error of last hidden states over scored positions and features (arXiv 2512.17452)."""
    return masked_mean((teacher.float() - student.float()).square().mean(-1), loss_mask)


LEAST = 1e-6
"""The smallest target of a regression on logarithms; smaller ones are raised to it."""


def cross_entropy(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]
) -> Float[Tensor, ""]:
    """Returns the binary cross-entropy between estimates in (0, 1) and targets in [0, 1], mean over candidates (Fast KVzip)."""
    scores, targets = scores.float(), targets.float()
    tiny = torch.finfo(torch.float32).eps
    likelihood = targets * scores.clamp_min(tiny).log() + (1 - targets) * (1 - scores).clamp_min(tiny).log()
    return masked_mean(-likelihood, candidates)


def log_error(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]
) -> Float[Tensor, ""]:
    """Returns the mean squared error between estimates and the logarithm of targets, over candidates (KVzap)."""
    return regression(scores, targets.clamp_min(LEAST).log(), candidates)


def attention_error(
    probe: Float[Tensor, "B H G N"], response: Float[Tensor, "B H G N"], rows: Bool[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Returns the squared error of a probe's mean attention, summed over keys, mean over query heads and `rows` (Judge Q, arXiv
    2509.10798).

    The paper's mean over keys would make short texts weigh more.
    """
    return masked_mean((probe - response).square().sum(-1).mean((1, 2)), rows)


def attention_divergence(
    probe: Float[Tensor, "B H G N"], response: Float[Tensor, "B H G N"], rows: Bool[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Returns KL(response || probe) of distributions over keys, mean over query heads and `rows` (arXiv 2603.10899)."""
    tiny = torch.finfo(torch.float32).tiny
    gain = response.clamp_min(tiny).log() - probe.clamp_min(tiny).log()
    return masked_mean((response * gain).sum(-1).mean((1, 2)), rows)


def masked_mean(values: Tensor, mask: Bool[Tensor, "*m"]) -> Float[Tensor, ""]:
    """Returns the mean of values where the mask is set, in the batch of all processes; 0 where it is set nowhere."""
    return ratio((values * mask).sum(), mask.sum())
