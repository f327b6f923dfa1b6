"""What soft gates pay for holding, and what they must not change: against float64 by brute force, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learnevict import Gates
from learnevict.train.losses import capacity, objectives
from tests.closeness import close
from tests.laws import zoo
from tests.parts.test_soft_gates import signals_of

LENGTH, PADS = 37, (0, 5, 14)


def valid() -> Tensor:
    return torch.arange(LENGTH) >= torch.tensor(PADS).unsqueeze(-1)


def retentions(low: float, high: float, seed: int = 0) -> Tensor:
    """Log retentions between -10^low and -10^high, float32 [3, 2, T]."""
    draw = torch.rand(3, 2, LENGTH, generator=torch.Generator().manual_seed(seed))
    return -(10 ** (low + (high - low) * draw))


def held(log_retention: Tensor, real: Tensor) -> Tensor:
    """float64, every pair of tokens."""
    age = (torch.arange(LENGTH).view(-1, 1) - torch.arange(LENGTH)).double()
    weight = (age.clamp_min(0) * log_retention.double().unsqueeze(-2)).exp()
    return (weight * ((age >= 0) & real[:, None, None])).sum(-1)


RANGES = {"forgetting": (-2.0, 0.5), "near one": (-9.0, -7.0), "near zero": (1.0, 37.0), "all": (-9.0, 5.0)}


@pytest.mark.parametrize("chunk", [1, 8, 37, 64, None])
@pytest.mark.parametrize("name", RANGES)
def test_occupancy_is_the_sum_over_all_pairs(name, chunk):
    log_retention = retentions(*RANGES[name]).requires_grad_()
    towards = torch.randn(3, 2, LENGTH, generator=torch.Generator().manual_seed(1)) * valid()[:, None]
    found = capacity.occupancy(log_retention, valid(), chunk=chunk)
    (slope,) = torch.autograd.grad((found * towards).sum(), log_retention)
    double = log_retention.detach().double().requires_grad_()
    expected = held(double, valid())
    (other,) = torch.autograd.grad((expected * towards.double()).sum(), double)
    close(found, expected)
    close(slope, other)
    assert torch.isfinite(slope).all()


def test_untrained_gates_still_tell_tokens_apart():
    """Regression: at a bias of 18 retention is 1 - 1.5e-8, which float16 and log(sigmoid) both round to 1."""
    gate = Gates.make("trimkv", zoo.build("llama"), hidden=8).gate.eval()
    with torch.no_grad():
        gate.weight_out.zero_()
        gate.bias_out[0] = torch.tensor([18.0, 19.0])
    signals = signals_of(zoo.build("llama"))
    log_retention = gate.write(signals)["retention"]
    low, high = log_retention.detach().unbind(1)
    assert float(low.min()) > -2e-8 and bool((low < high).all()) and bool((high < 0).all())
    (slope,) = torch.autograd.grad(
        capacity.occupancy(log_retention, torch.ones_like(low, dtype=torch.bool)).sum(),
        log_retention,
        retain_graph=True,
    )
    later = torch.arange(log_retention.shape[-1]).flip(0)
    close(slope, (later * (later + 1) / 2).expand_as(slope))  # every later token counts its distance
    (learned,) = torch.autograd.grad(log_retention, gate.bias_out, slope)
    close(learned[0], -(torch.expm1(log_retention.detach()) * slope).sum((0, 2)))  # d log beta / d b = 1 - beta


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("budget", [4, 12, 100])
def test_the_hinge_by_brute_force(budget, together):
    layers = [retentions(-2.0, 0.0, seed).requires_grad_() for seed in range(3)]
    found = capacity.hinge(layers, valid(), budget, together=together)
    slopes = torch.autograd.grad(found, layers)
    doubles = [layer.detach().double().requires_grad_() for layer in layers]
    total, count = torch.zeros((), dtype=torch.double), 0
    stacked = torch.stack([held(layer, valid()) for layer in doubles])
    for b, pad in enumerate(PADS):
        for t in range(pad, LENGTH):
            read = t - pad + 1
            if together:
                over = (stacked[:, b, :, t].sum() - budget * 6).clamp_min(0) / (6 * max(read - budget, 1))
                total, count = total + over, count + 1
                continue
            for layer in range(3):
                for head in range(2):
                    over = (stacked[layer, b, head, t] - budget).clamp_min(0) / max(read - budget, 1)
                    total, count = total + over, count + 1
    expected = total / count
    others = torch.autograd.grad(expected, doubles)
    found, expected = found.detach(), expected.detach()
    close(found, expected)
    for one, other in zip(slopes, others, strict=True):
        close(one, other)
    assert (float(found) > 0) == (budget < LENGTH)


def test_the_hinge_of_a_full_cache_is_the_share_of_tokens_beyond_the_budget():
    full = [torch.zeros(3, 2, LENGTH)]
    close(capacity.hinge(full, torch.ones(3, LENGTH, dtype=torch.bool), 0), 1.0)
    share = float(capacity.hinge(full, torch.ones(3, LENGTH, dtype=torch.bool), 20))
    close(share, (LENGTH - 20) / LENGTH)


def test_what_is_admitted_by_hand():
    gates = torch.tensor([[[0.25, 0.5, 1.0, 0.1]]])
    real = torch.tensor([[False, True, True, True]])
    costs = []
    for i, g in ((1, 0.5), (2, 1.0), (3, 0.1)):
        share = min(2 / (4 - i), 1)
        costs.append(share + (1 - share) * (1 - (1 - g) ** 2))
    close(capacity.admitted([gates.log()], real, 2), sum(costs) / 3)


def test_the_shortfall_is_one_sided_and_straight_through():
    log_gates = torch.tensor([[[0.9, 0.2, 0.4, 0.05]]]).log().requires_grad_()
    real = torch.tensor([[True, True, True, False]])
    found = capacity.shortfall([log_gates], real, 0.9)
    close(found.detach(), 0.9 - 2 / 3)
    found.backward()
    close(log_gates.grad, torch.tensor([[[0.9, 0.2, 0.4, 0.0]]]) / 3)  # d g / d log g = g
    assert float(capacity.shortfall([log_gates.detach()], real, 0.6)) == 0.0


def test_divergence_and_next_token_by_hand():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 5, 7)
    scored = torch.tensor([[False, True, True, True, False], [True, False, False, False, False]])
    tokens = torch.randint(7, (2, 5))
    kl, surprise = 0.0, 0.0
    for b, t in scored.nonzero().tolist():
        p, q = teacher[b, t].double().softmax(-1), student[b, t].double().softmax(-1)
        kl += float((p * (p / q).log()).sum())
        surprise -= math.log(float(q[tokens[b, t + 1]]))
    close(objectives.divergence(teacher, student, scored), kl / 4)
    close(objectives.next_token(student, tokens, scored), surprise / 4)
    close(objectives.divergence(teacher, teacher, scored), 0.0, scale=1.0)
    error = (teacher - student).square()[scored].mean()
    close(objectives.hidden_error(teacher, student, scored), error)


def test_nothing_scored_costs_nothing():
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    logits, tokens = torch.randn(2, 5, 7), torch.zeros(2, 5, dtype=torch.long)
    assert float(objectives.divergence(logits, -logits, nothing)) == 0.0
    assert float(objectives.next_token(logits, tokens, nothing)) == 0.0
