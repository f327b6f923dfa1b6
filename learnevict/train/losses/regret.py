"""Regret over all budgets, of one ranking (KVP, arXiv 2602.10238).

A ranking s_1, s_2, ... of n candidates loses, summed over the budgets 1 .. n-1, C(s) = sum over r of (r - 1) I_{s_r}, I being
what the future pays a candidate; no ranking loses less than the one by I, whose cost is C*. Scores f stand for the
Plackett-Luce law over rankings (sort f + Gumbel noise). Under it j comes before i with probability sigmoid(f_j - f_i), so

    E[C] = sum over i of I_i sum over j != i of sigmoid(f_j - f_i)

exactly: the policy gradient that the paper samples has a closed form. Costs are given as multiples of C*, or of the sum of
I where almost all of it lies on one candidate.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.ops.distributed import ratio
from learnevict.ops.random import hashed
from learnevict.oracle.metrics import ranking_cost
from learnevict.train.losses.objectives import sample_slots, uniform_of

OUTSIDE = -1e9  # score of what is no candidate: behind all others, and nothing in a sum of exponentials


def best_cost(targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]) -> Float[Tensor, "M H"]:
    """C*, but at least the sum of I: the unit of cost."""
    paid = targets.masked_fill(~candidates, 0.0)
    return ranking_cost(paid, paid, candidates).maximum(paid.sum(-1))


def regret(
    scores: Float[Tensor, "M H N"], targets: Float[Tensor, "M H N"], candidates: Bool[Tensor, "M H N"]
) -> Float[Tensor, ""]:
    """C / C* of the ranking by scores, 1 at best: KVP's measure of all budgets at once; mean over heads that have a choice."""
    unit = best_cost(targets, candidates)
    return _mean(ranking_cost(scores, targets, candidates), unit)


def expected_regret(
    scores: Float[Tensor, "M H N"],
    targets: Float[Tensor, "M H N"],
    candidates: Bool[Tensor, "M H N"],
    *,
    pairs: int = 0,
    words: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, ""]:
    """E[C] / C* under Plackett-Luce, mean over heads that have a choice.

    Args:
        scores: higher = keep.
        targets: I, at least 0.
        candidates: slots that compete.
        pairs: 0 takes all pairs at once, [M, H, N, N]; else so many are drawn per head, and the result is unbiased.
        words: of ops.hashing, that each row's draws come from; None: they come from the global generator.
    """
    paid = targets.masked_fill(~candidates, 0.0)
    if pairs == 0:
        behind = torch.sigmoid(scores.unsqueeze(-2) - scores.unsqueeze(-1))  # [i, j]: j comes before i
        both = candidates.unsqueeze(-2) & ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        expected = (paid * (behind * both).sum(-1)).sum(-1)
    else:
        sides = (None, None) if words is None else (hashed(words, 0), hashed(words, 1))
        left, right = (sample_slots(candidates, pairs, side) for side in sides)
        behind = torch.sigmoid(scores.gather(-1, right) - scores.gather(-1, left)) * (left != right)
        expected = candidates.sum(-1).square() * (paid.gather(-1, left) * behind).mean(-1)
    return _mean(expected, best_cost(targets, candidates))


def rloo(
    scores: Float[Tensor, "M H N"],
    targets: Float[Tensor, "M H N"],
    candidates: Bool[Tensor, "M H N"],
    *,
    samples: int = 8,
    words: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, ""]:
    """A loss whose gradient is the paper's: REINFORCE with a leave-one-out baseline over `samples` drawn rankings.

    Its mean gradient is that of `expected_regret`. The paper also divides advantages by their spread over the batch.
    `words` as in `expected_regret`.
    """
    free = scores.masked_fill(~candidates, OUTSIDE)
    unit = best_cost(targets, candidates)
    rewards, chances = [], []
    for sample in range(samples):
        noise = torch.rand_like(scores) if words is None else uniform_of(hashed(words, sample), scores.shape)
        order = (free.detach() - (-noise.clamp_min(1e-20).log()).log()).masked_fill(~candidates, OUTSIDE)
        rank = order.argsort(dim=-1, descending=True)
        rewards.append(-ranking_cost(order, targets, candidates) / unit.clamp_min(torch.finfo(unit.dtype).tiny))
        chances.append(log_chance(free.gather(-1, rank), candidates.gather(-1, rank)))
    reward, chance = torch.stack(rewards), torch.stack(chances)
    advantage = (reward - reward.mean(0)) * samples / (samples - 1)  # less the mean of the others
    return _mean(-(advantage * chance).mean(0) * unit, unit)


def log_chance(ordered: Float[Tensor, "*M N"], candidates: Bool[Tensor, "*M N"]) -> Float[Tensor, "*M"]:
    """Logarithm of the probability of a ranking: sum over r of f_r - log(sum over j >= r of exp f_j).

    Args:
        ordered: scores along the ranking, candidates first.
        candidates: along the ranking.
    """
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return ((ordered - rest) * candidates).sum(-1)


def _mean(value: Tensor, unit: Tensor) -> Tensor:
    """Mean of value / unit over heads where the unit is not 0, in the batch of all processes."""
    counted = unit > 0
    return ratio((value / unit.clamp_min(torch.finfo(unit.dtype).tiny) * counted).sum(), counted.sum())
