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

from learnevict.ops.random import hashed
from learnevict.oracle.metrics import ranking_cost
from learnevict.train.losses.objectives import masked_mean, sample_pairs, uniform_of

OUTSIDE = -1e9
"""The score of what is no candidate: behind all others, and 0 in a sum of exponentials."""


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


def rloo(
    scores: Float[Tensor, "M H N"],
    targets: Float[Tensor, "M H N"],
    candidates: Bool[Tensor, "M H N"],
    *,
    samples: int = 8,
    seeds: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, ""]:
    """Returns a loss whose gradient is the paper's: REINFORCE with a leave-one-out baseline over `samples` drawn rankings.

    Its mean gradient is that of `expected_regret`. The paper also divides advantages by their spread over the batch.
    `seeds` as in `expected_regret`.
    """
    logits = scores.masked_fill(~candidates, OUTSIDE)
    unit = best_cost(targets, candidates)
    rewards, log_probs = [], []
    for sample in range(samples):
        noise = uniform_of(None if seeds is None else hashed(seeds, sample), scores.shape, scores.device)
        order = (logits.detach() - (-noise.clamp_min(1e-20).log()).log()).masked_fill(~candidates, OUTSIDE)
        rank = order.argsort(dim=-1, descending=True)
        rewards.append(-ranking_cost(order, targets, candidates) / unit.clamp_min(torch.finfo(unit.dtype).tiny))
        log_probs.append(log_probability(logits.gather(-1, rank), candidates.gather(-1, rank)))
    reward, log_prob = torch.stack(rewards), torch.stack(log_probs)
    advantage = (reward - reward.mean(0)) * samples / (samples - 1)  # less the mean of the others
    return _mean(-(advantage * log_prob).mean(0) * unit, unit)


def log_probability(ordered: Float[Tensor, "*M N"], candidates: Bool[Tensor, "*M N"]) -> Float[Tensor, "*M"]:
    """Returns the log-probability of a ranking, sum over r of f_r - log(sum over j >= r of exp f_j), from scores along it."""
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return ((ordered - rest) * candidates).sum(-1)


def _mean(value: Tensor, unit: Tensor) -> Tensor:
    """Returns the mean of value / unit over heads where the unit is not 0."""
    return masked_mean(value / unit.clamp_min(torch.finfo(unit.dtype).tiny), unit > 0)
