"""Regret over all budgets: the closed form against all permutations, drawn rankings, and sampled pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from learnevict.oracle.metrics import ranking_cost
from learnevict.train.losses.objectives import LEAST, cross_entropy, log_error
from learnevict.train.losses.regret import best_cost, expected_regret, regret
from tests.closeness import close

N = 6


def problem(seed: int = 0, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 1, n, generator=generator, dtype=torch.float64)
    return scores, torch.rand(1, 1, n, generator=generator, dtype=torch.float64)


def everyone(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def chance(scores: list[float], order: tuple[int, ...]) -> float:
    """Plackett-Luce, one draw after the other."""
    found = 1.0
    for r, i in enumerate(order):
        found *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in order[r:])
    return found


def lost(targets: list[float], order: tuple[int, ...]) -> float:
    """What all budgets of 1 to n - 1 slots lose, budget by budget."""
    return sum(sum(targets[i] for i in order[budget:]) for budget in range(1, len(order)))


def test_cost_counts_what_every_budget_loses():
    scores, targets = problem()
    order = tuple(scores.flatten().argsort(descending=True).tolist())
    assert float(ranking_cost(scores, targets, everyone(scores))) == pytest.approx(
        lost(targets.flatten().tolist(), order)
    )
    best = min(lost(targets.flatten().tolist(), order) for order in itertools.permutations(range(N)))
    assert float(best_cost(targets, everyone(scores))) == pytest.approx(best)
    assert float(regret(targets, targets, everyone(scores))) == pytest.approx(1.0)
    assert float(regret(-targets, targets, everyone(scores))) > 1.5


def test_closed_form_is_the_mean_over_all_permutations():
    scores, targets = problem()
    f, paid = scores.flatten().tolist(), targets.flatten().tolist()
    orders = list(itertools.permutations(range(N)))
    assert sum(chance(f, order) for order in orders) == pytest.approx(1.0)
    mean = sum(chance(f, order) * lost(paid, order) for order in orders)
    unit = float(best_cost(targets, everyone(scores)))
    assert float(expected_regret(scores, targets, everyone(scores))) == pytest.approx(mean / unit, rel=1e-9)


def test_closed_form_is_what_gumbel_rankings_cost():
    scores, targets = problem(1)
    noise = -(-torch.rand(100_000, 1, N, generator=torch.Generator().manual_seed(0)).double().log()).log()
    drawn = ranking_cost(scores + noise, targets.expand(100_000, 1, N), everyone(noise)).mean()
    expected = expected_regret(scores, targets, everyone(scores)) * best_cost(targets, everyone(scores))
    assert float(drawn) == pytest.approx(float(expected), rel=5e-3)


def gradient(
    objective, scores: torch.Tensor, targets: torch.Tensor, candidates: torch.Tensor, **options
) -> torch.Tensor:
    leaf = scores.clone().requires_grad_()
    objective(leaf, targets, candidates, **options).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("hidden", [0, 2])
def test_gradients_of_sampled_pairs_have_the_closed_one_as_their_mean(hidden):
    """With slots that are no candidates among them."""
    scores, targets = problem(2)
    candidates = everyone(scores)
    candidates[..., 1 : 1 + hidden] = False
    many = (2000, 1, N)  # as many heads: their mean is one head's, averaged
    wide = [part.expand(many) for part in (scores, targets, candidates)]
    exact = gradient(expected_regret, scores, targets, candidates)
    seeds = torch.arange(len(wide[0]))
    found = gradient(expected_regret, *wide, seeds=seeds, pairs=200).sum(0, keepdim=True)
    close(found, exact, 0.05)
    assert not found[~candidates].any()


def test_what_is_no_candidate_changes_nothing():
    scores, targets = problem(3)
    candidates = everyone(scores)
    candidates[..., 4:] = False
    short = (scores[..., :4], targets[..., :4], candidates[..., :4])
    for objective in (expected_regret, regret):
        assert float(objective(scores, targets, candidates)) == pytest.approx(float(objective(*short)))
    wild, odd = scores.clone(), targets.clone()
    wild[..., 4:], odd[..., 4:] = 50.0, 9.0
    assert float(expected_regret(wild, odd, candidates)) == pytest.approx(float(expected_regret(*short)))


def test_heads_without_a_choice_weigh_nothing():
    scores, targets = (part.expand(3, 1, N) for part in problem(4))
    candidates, none = everyone(scores), torch.zeros(3, 1, N, dtype=torch.bool)
    candidates = torch.where(torch.tensor([True, False, True]).view(3, 1, 1), candidates, none)
    one = expected_regret(scores[:1], targets[:1], everyone(scores[:1]))
    assert float(expected_regret(scores, targets, candidates)) == pytest.approx(float(one))
    for objective in (expected_regret, regret):
        assert float(objective(scores, targets, none)) == 0.0
        assert float(objective(scores, 0 * targets, candidates)) == 0.0
    lone = torch.tensor([[[0.0, 3.0, 0.0]]])  # C* is 0: the unit is the sum
    assert float(best_cost(lone, everyone(lone))) == 3.0


def test_cross_entropy_and_log_error_by_hand():
    candidates = torch.tensor([[[True, True, False]]])
    scores, targets = torch.tensor([[[0.8, 0.1, 0.5]]]), torch.tensor([[[1.0, 0.25, 1.0]]])
    want = -(math.log(0.8) + 0.25 * math.log(0.1) + 0.75 * math.log(0.9)) / 2
    close(cross_entropy(scores, targets, candidates), want)
    assert math.isfinite(float(cross_entropy(torch.tensor([[[1.0, 0.0, 0.5]]]), 1 - targets, candidates)))
    targets = torch.tensor([[[math.e, 0.0, 1.0]]])
    want = ((0.8 - 1) ** 2 + (0.1 - math.log(LEAST)) ** 2) / 2
    close(log_error(scores, targets, candidates), want)
