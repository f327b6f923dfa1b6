"""The regret of one ranking over all budgets (KVP, arXiv 2602.10238).

A ranking s_1, s_2, ... of n candidates costs, summed over the budgets 1 .. n-1, C(s) = sum over r of (r - 1) I_{s_r}, I being
the future's attention to a candidate; the ranking by I has the least cost, C*. Scores f stand for the Plackett-Luce law over
rankings (sort f + Gumbel noise). Under it j comes before i with probability sigmoid(f_j - f_i), so

    E[C] = sum over i of I_i sum over j != i of sigmoid(f_j - f_i)

exactly: the policy gradient that the paper samples has a closed form. Costs are given as multiples of C*, or of the sum of
I where almost all of it lies on one candidate.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.oracle.metrics import ranking_cost
from learnevict.train.losses.objectives import masked_mean, sample_pairs


def best_cost(targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]) -> Float[Tensor, "M H"]:
    """Returns the unit of cost: C*, but at least the sum of I."""
    attention = targets.masked_fill(~candidates, 0.0)
    return ranking_cost(attention, attention, candidates).maximum(attention.sum(-1))


def regret(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]
) -> Float[Tensor, ""]:
    """Returns C / C* of the ranking by scores, 1 at best: KVP's measure of all budgets; mean over heads that have a choice."""
    return _mean(ranking_cost(scores, targets, candidates), best_cost(targets, candidates))


def expected_regret(
    scores: Float[Tensor, "M H N"],
    targets: Float[Tensor, "M H N"],
    candidates: Bool[Tensor, "M H N"],
    *,
    pairs: int = 0,
    seeds: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, ""]:
    """Returns E[C] / C* under Plackett-Luce, mean over heads that have a choice.

    Args:
        scores: higher = keep.
        targets: I, at least 0.
        pairs: 0 takes all pairs at once, [M, H, N, N]; else so many are drawn per head, and the result is unbiased.
        seeds: random keys (ops.random), one per row; None: pairs come from the global generator.
    """
    attention = targets.masked_fill(~candidates, 0.0)
    if pairs == 0:
        behind = torch.sigmoid(scores.unsqueeze(-2) - scores.unsqueeze(-1))  # [i, j]: j comes before i
        both = candidates.unsqueeze(-2) & ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        expected = (attention * (behind * both).sum(-1)).sum(-1)
    else:
        left, right = sample_pairs(candidates, pairs, seeds)
        behind = torch.sigmoid(scores.gather(-1, right) - scores.gather(-1, left)) * (left != right)
        expected = candidates.sum(-1).square() * (attention.gather(-1, left) * behind).mean(-1)
    return _mean(expected, best_cost(targets, candidates))


def _mean(value: Tensor, unit: Tensor) -> Tensor:
    """Returns the mean of value / unit over heads where the unit is not 0."""
    return masked_mean(value / unit.clamp_min(torch.finfo(unit.dtype).tiny), unit > 0)
