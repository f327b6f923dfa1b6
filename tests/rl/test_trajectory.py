"""Sampling, trajectories, costs and credit are compared with Monte Carlo, brute force and the laws of the cache."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from transformers import DynamicCache

from learnevict import attach, methods
from learnevict.errors import BudgetError, DataError, StockLayersWarning, TrainedOtherwiseWarning, UsageError
from learnevict.hub import Gates
from learnevict.infer.model.supported import evicting_layers
from learnevict.infer.teacher_forcing import prefill, replay
from learnevict.ops.random import hashed, uniform
from learnevict.oracle.collect import full_trace
from learnevict.oracle.reference import token_losses
from learnevict.parts.allocators import GAIN, LayerAllocation
from learnevict.rl.config import RefineConfig
from learnevict.rl.distribution import (
    NOTHING,
    allocation_log_probability,
    entropy,
    log_probability,
    lowest_scores,
    sample_evictions,
    sample_perturbations,
)
from learnevict.rl.rewards import (
    attention_credit,
    group_relative,
    of_evictions,
    sure,
    to_go_credit,
    token_costs,
)
from learnevict.rl.rollout import (
    PromptAnswer,
    log_probabilities,
    noisy_layers,
    sample_budget,
    sample_group,
)
from learnevict.rl.trajectory import SamplingPolicy, TextTrajectory, expired, sample_trajectory
from learnevict.signals import NEVER
from tests.closeness import close
from tests.laws import zoo
from tests.methods.test_foresightkv import gate_for, tiny

BUDGET = 24
CONFIG = RefineConfig(min_budget=BUDGET, max_budget=BUDGET, period=8, draw_temperature=0.7, sinks=2, recent=4)
TOGETHER = replace(CONFIG, scope="model", pool=2)
SHARED = replace(CONFIG, share_spread=0.4)
LAWS = pytest.mark.parametrize("config", [CONFIG, TOGETHER, SHARED], ids=["layer", "model", "shares"])
PADS = (0, 5)


def texts(length: int = 61, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 64, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : PADS[row % 2]] = 0
    return ids * mask, mask


def sampled(model, scorer, ids, mask, config=CONFIG, *, noisy=None, random_keys=None) -> TextTrajectory:
    """A trace per row; evictions are random in the layers and rows that are noisy, by default in all."""
    noisy = torch.ones(model.config.num_hidden_layers, len(ids), dtype=torch.bool) if noisy is None else noisy
    keys = torch.arange(len(ids)) if random_keys is None else random_keys
    policy = SamplingPolicy(config, BUDGET, scorer, noisy, ids.shape[1], keys)
    return sample_trajectory(model, policy, ids, mask)


def trajectory(**changes: object):
    model = tiny()
    scorer = gate_for(model)
    ids, mask = texts()
    options = {"random_keys": torch.tensor([1, 2]), **changes}
    config = options.pop("config", CONFIG)
    if config.share_spread:
        demand = scorer.share_layers(2, 1, 40)
        with torch.no_grad():
            demand.level.copy_(torch.linspace(-0.1, 0.1, len(demand.level)))
            demand.slope.copy_(torch.linspace(0.05, -0.05, len(demand.slope)))
    return model, scorer, ids, mask, sampled(model, scorer, ids, mask, config, **options)


# --- sampling ---


def test_frequencies_of_permutations_are_what_the_log_probability_says():
    scores, candidates = torch.tensor([0.3, -0.5, 1.0, 0.2, -9.0]), torch.tensor([True, True, True, True, False])
    num = 40_000
    found = sample_evictions(
        scores.expand(num, 5),
        candidates.expand(num, 5),
        torch.full((num,), 2),
        0.7,
        uniform(hashed(torch.arange(num).view(-1, 1), torch.arange(5))),
    )
    for pair in permutations(range(4), 2):
        said = float(log_probability(scores, candidates, torch.tensor(pair), 0.7).sum().exp())
        seen = float((found == torch.tensor(pair)).all(-1).float().mean())
        assert seen == pytest.approx(said, abs=4 * math.sqrt(said / num))
    assert not bool((found == 4).any()), "a slot that is no candidate was sampled"


def test_log_probability_is_the_sequential_law_and_its_gradient():
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    candidates = torch.tensor([[True] * 7, [True] * 5 + [False] * 2, [False] * 7])
    permutation = torch.tensor([[2, 0, 6, 1], [4, 1, NOTHING, NOTHING], [NOTHING] * 4])
    found = log_probability(scores, candidates, permutation, 0.5)
    for row in range(3):
        left = [slot for slot in range(7) if candidates[row, slot]]
        for place, slot in enumerate(permutation[row].tolist()):
            if slot == NOTHING:
                assert float(found[row, place].detach()) == 0.0
                continue
            logits = torch.stack([-scores[row, other] / 0.5 for other in left])
            expected = (-scores[row, slot] / 0.5 - logits.logsumexp(0)).detach()
            assert float(found[row, place].detach()) == pytest.approx(float(expected), abs=1e-12)
            left.remove(slot)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    assert bool(torch.isfinite(gradient).all())
    assert torch.equal(gradient[2], torch.zeros(7, dtype=torch.float64))


def test_the_last_candidate_has_probability_one():
    scores = torch.randn(4, requires_grad=True)
    found = log_probability(scores, torch.ones(4, dtype=torch.bool), torch.tensor([3, 1, 0, 2]), 1.0)
    close(found[-1], 0.0, scale=1.0)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    close(gradient.sum(), 0.0, scale=float(gradient.abs().max()))


def test_without_temperature_the_lowest_scores_go_in_order():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    candidates = torch.tensor([[True, True, True, False]])
    assert sample_evictions(scores, candidates, torch.tensor([2]), 0.0).tolist() == [[1, 2]]


def test_the_lowest_scores_are_found_among_candidates():
    scores = torch.tensor([[0.1, 0.0, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0]])
    candidates = torch.tensor([[True, False, True, True], [True, True, True, True]])
    lowest = lowest_scores(scores, candidates, torch.tensor([2, 1]))
    assert lowest.tolist() == [[True, False, False, True], [True, False, False, False]]


def test_entropy_of_the_first_choice():
    candidates = torch.tensor([[True, True, True, False], [False] * 4])
    found = entropy(torch.zeros(2, 4), candidates, 1.0)
    close(found, [math.log(3), 0.0])


# --- trajectories ---


@LAWS
def test_a_trajectory_is_the_replay_of_its_trace(config):
    model, _, ids, mask, found = trajectory(config=config)
    assert found.trace.evictions > 0
    again = replay(model, ids, found.trace, mask).logits
    close(found.logits, again, 1e-5, mask)


@LAWS
def test_what_was_sampled_are_the_evictions_of_the_trace(config):
    _, _, _, _, found = trajectory(config=config)
    ends = expired(found.trace)
    heads, length = ends.shape[2:]
    counted = int((ends < length - 1).sum())
    assert 0 < counted == sum(int((sets.permutation != NOTHING).sum()) for sets in found.sets)
    for sets in found.sets:
        for row, event, number, place in (sets.permutation != NOTHING).nonzero().tolist():
            whose, token = divmod(int(sets.tokens[row, event, number, place]), length)
            layer, head = sets.layers[whose // heads], whose % heads
            assert int(ends[layer, row, head, token]) == int(sets.end[row, event])
            assert bool(sets.candidates[row, event, number, sets.permutation[row, event, number, place]])


@pytest.mark.parametrize("length", range(61, 69))
def test_evictions_that_no_later_prediction_sees_do_not_count(length):
    """What goes after the last token but one changes no prediction of the text: it would be noise with a full advantage."""
    model = tiny()
    ids, mask = texts(length)
    found = sampled(model, gate_for(model), ids, mask)
    due = [[end for end in range(1, length + 1) if (end - pad) % 8 == 0 and end - pad > 24] for pad in PADS]
    for sets in found.sets:
        sampled_at = (sets.permutation != NOTHING).flatten(2).any(-1)
        assert torch.equal(sampled_at, sets.candidates.flatten(2).any(-1) & (sets.tokens != NOTHING).flatten(2).any(-1))
        for row, ends in enumerate(due):
            assert sets.end[row][sampled_at[row]].tolist() == [end for end in ends if end < length - 1]


@LAWS
def test_the_log_probability_of_a_trajectory_can_be_had_again(config):
    _, scorer, _, _, found = trajectory(config=config)
    once, _ = log_probabilities(scorer, found, torch.tensor([0, 1]))
    swapped, spread = log_probabilities(scorer, found, torch.tensor([1, 0]))
    assert torch.equal(once, swapped.flip(0))
    assert bool((once <= 0).all())
    assert bool((spread >= 0).all())
    assert bool((once < 0).any())


@LAWS
def test_where_nothing_is_random_the_scorer_evicts_as_its_policy(config):
    model = tiny()
    nothing = torch.zeros(model.config.num_hidden_layers, 2, dtype=torch.bool)
    model, scorer, ids, mask, found = trajectory(noisy=nothing, config=config)
    assert all(bool((sets.permutation == NOTHING).all()) for sets in found.sets)
    rules = {"slack": CONFIG.period, "sinks": CONFIG.sinks, "recent": CONFIG.recent}
    scorer.scope = config.scope
    if found.allocation is not None:  # the allocation is perturbed whatever the noise of evictions
        scorer.demand.level.data = (found.allocation[0] / GAIN).clone()
        scorer.demand.slope.data.zero_()
        ids, mask = ids[:1], mask[:1]
    policy = methods.foresightkv.policy(BUDGET, gate=scorer, **rules)
    with torch.no_grad(), attach(model, policy, record=True) as cache:
        prefill(model, cache, ids, mask)
    assert torch.equal(cache.trace().expiry, found.trace.expiry[:, : len(ids)])


def test_padding_changes_no_trajectory():
    model, scorer, ids, mask, _ = trajectory()
    still = torch.zeros(model.config.num_hidden_layers, 2, dtype=torch.bool)
    both = sampled(model, scorer, ids, mask, noisy=still)
    alone = sampled(model, scorer, ids[1:, PADS[1] :], mask[1:, PADS[1] :], noisy=still[:, 1:])
    ends = torch.where(alone.trace.expiry == NEVER, NEVER, alone.trace.expiry + PADS[1])
    assert torch.equal(both.trace.expiry[:, 1:, :, PADS[1] :], ends)


def test_the_seed_makes_the_trajectory():
    first, second, other = (trajectory(random_keys=torch.tensor([seed, 5]))[-1] for seed in (1, 1, 2))
    assert torch.equal(first.trace.expiry, second.trace.expiry)
    assert not torch.equal(first.trace.expiry, other.trace.expiry)
    assert torch.equal(first.trace.expiry[:, 1], other.trace.expiry[:, 1]), "a row's noise depends on another's"


@LAWS
def test_noise_is_the_rows_own_whatever_the_batch(config):
    model, scorer, ids, mask, both = trajectory(config=config)
    own = (ids[1:, PADS[1] :], mask[1:, PADS[1] :])
    alone = sampled(model, scorer, *own, config, random_keys=torch.tensor([2]))
    ends = torch.where(alone.trace.expiry == NEVER, NEVER, alone.trace.expiry + PADS[1])
    assert torch.equal(both.trace.expiry[:, 1:, :, PADS[1] :], ends)


def test_allocations_are_perturbed_row_by_row_and_spend_the_budget():
    *_, found = trajectory(config=SHARED)
    ends, length = expired(found.trace), found.trace.expiry.shape[-1]
    held = (ends == length).sum((2, 3)) - ends.shape[2] * torch.tensor(PADS)  # [L, B], over heads
    free = BUDGET - SHARED.sinks - SHARED.period - 1
    heads, fresh = ends.shape[2], (length - torch.tensor(PADS) - 1) % SHARED.period + 1  # since the last event read on
    share = (held - heads * (fresh + SHARED.sinks + SHARED.period + 1)) / (len(held) * free * heads)
    close(share.sum(0), torch.ones(2), about="what layers hold beside the budget")
    assert float((share.T - found.allocation.softmax(-1)).abs().max()) < 1 / (len(held) * free)
    assert not torch.equal(held[:, 0], held[:, 1]), "rows have the same allocation"


def test_perturbed_allocations_are_normal_around_the_learned_one_and_their_probability_says_so():
    num, layers, spread = 40_000, 4, 0.3
    perturbations = sample_perturbations(torch.arange(num), layers, spread)
    close(perturbations.sum(-1), torch.zeros(num), scale=spread)
    wanted = spread**2 * (torch.eye(layers) - 1 / layers)
    assert float((perturbations.T.cov() - wanted).abs().max()) < 4 * spread**2 * math.sqrt(2 / num)
    logits = torch.tensor([0.3, -0.1, 0.0, -0.2], dtype=torch.float64, requires_grad=True)
    sampled_logits = logits.detach() + perturbations[:3].double()
    found = allocation_log_probability(sampled_logits, logits, spread)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    close(gradient, perturbations[:3].double().sum(0) / spread**2, 1e-9)
    normal = torch.distributions.Normal(logits, spread)
    other = allocation_log_probability(sampled_logits, logits - 0.1, spread)
    moved = torch.distributions.Normal(logits - 0.1, spread)
    expected = (normal.log_prob(sampled_logits) - moved.log_prob(sampled_logits)).sum(-1)
    close(found - other, expected, 1e-9)


def test_an_allocation_follows_the_budget_and_is_equal_until_learned():
    demand = LayerAllocation(3, 1, 99)
    assert [demand.allocator().layer_budget(40, rank, 3, 21) for rank in range(3)] == [40] * 3
    with torch.no_grad():
        demand.level.copy_(torch.tensor([0.1, 0.0, -0.1]))
        demand.slope.copy_(torch.tensor([-0.1, 0.0, 0.1]))
    shared = demand.allocator()
    for budget in (22, 23, 31, 58, 120, 5000):
        held = [shared.layer_budget(budget, rank, 3, 21) for rank in range(3)]
        assert sum(held) == 3 * budget
        free = budget - 21
        weights = demand.logits(free).detach().double().softmax(-1)
        assert max(abs(slots - 21 - 3 * free * float(share)) for slots, share in zip(held, weights, strict=True)) < 1
    assert torch.equal(demand.logits(99), demand.logits(4000)), "beyond what was learned, shares stay"
    assert [shared.layer_budget(20, rank, 3, 21) for rank in range(3)] == [20] * 3
    with pytest.raises(UsageError, match="3 layers, but 2"):
        shared.layer_budget(40, 0, 2, 21)
    with pytest.raises(UsageError, match="1 or more"):
        LayerAllocation(3, 0, 9)


def test_only_layers_that_evict_have_a_share():
    model = zoo.build("gemma3")
    kinds = evicting_layers(DynamicCache(config=model.config).layers)
    scorer = gate_for(model)
    scorer.share_layers(len(kinds), 1, 40)
    ids = torch.randint(4, 64, (2, 61), generator=torch.Generator().manual_seed(3))
    with pytest.warns(StockLayersWarning):
        found = sampled(model, scorer, ids, torch.ones_like(ids), SHARED)
    assert 1 < len(kinds) < model.config.num_hidden_layers
    assert found.allocation.shape == (2, len(kinds)) and found.trace.evictions > 0
    assert len(found.sets) == len(kinds)


def test_a_layer_allocation_is_part_of_the_gates(tmp_path):
    model = tiny()
    gates = Gates.make("foresightkv", model, hidden=8)
    demand = gates.gate.share_layers(2, 1, 40)
    with torch.no_grad():
        demand.level.normal_(std=0.1)
    gates.config.settings = gates.gate.settings()
    gates.save_pretrained(tmp_path)
    again = Gates.load(tmp_path, model)
    assert again.gate.demand.allocator() == demand.allocator()
    assert again.policy(30, slack=8).allocator == demand.allocator()
    with pytest.warns(TrainedOtherwiseWarning, match="share 1 to 40 slots"):
        assert again.gate.share_layers(2, 5, 6).span == (1, 40)


# --- costs and credit ---


def test_costs_count_where_the_full_cache_is_sure():
    full = torch.zeros(1, 6, 4)
    full[0, :, 0] = torch.tensor([9.0, 9.0, 0.0, 9.0, 9.0, 9.0])  # column 2 is a fork
    logits = full.clone()
    logits[0, 1] = torch.tensor([-30.0, 9.0, 0.0, 0.0])
    logits[0, 2] = torch.tensor([-30.0, 9.0, 0.0, 0.0])
    ids, loss_mask = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[False, False, True, True, True, True]])
    added = token_losses(logits, ids) - token_losses(full, ids)
    low = token_costs("low_entropy", logits, full, ids, loss_mask)
    assert low[0].tolist() == pytest.approx([0, 2.0, 0, 0, 0, 0])
    plain = token_costs("plain", logits, full, ids, loss_mask, ceiling=5.0)
    assert plain[0].tolist() == pytest.approx([0, 5.0, 5.0, 0, 0, 0])
    square = token_costs("thresholded", logits, full, ids, loss_mask)
    close(square[0, 1], added[0, 1] ** 2)
    assert float(square.sum()) == float(square[0, 1])
    assert not bool(sure(full, torch.ones(1, 6, dtype=torch.bool))[0, 2])


def test_credit_of_events():
    _, _, ids, _, found = trajectory()
    costs = torch.rand(len(ids), ids.shape[1], generator=torch.Generator().manual_seed(4))
    apart = group_relative(costs, 2)
    close(apart.sum(0), torch.zeros(ids.shape[1]), scale=1.0)
    sets = found.sets[1]
    later = to_go_credit(apart, sets)
    for row, event, head, place in (sets.permutation != NOTHING).nonzero().tolist()[::17]:
        end = int(sets.end[row, event])
        close(later[row, event, head, place], -apart[row, end:].sum(), scale=float(apart[row].abs().sum()))


@LAWS
def test_credit_is_looked_up_for_the_token_that_went(config):
    _, _, ids, _, found = trajectory(config=config)
    layers, heads = found.trace.expiry.shape[0], found.trace.expiry.shape[2]
    credit = torch.arange(layers * 2 * heads * ids.shape[1]).view(layers, 2, heads, -1).float()
    for sets in found.sets:
        looked_up = of_evictions(credit, sets)
        for row, event, number, place in (sets.permutation != NOTHING).nonzero().tolist()[::11]:
            whose, token = divmod(int(sets.tokens[row, event, number, place]), ids.shape[1])
            expected = credit[sets.layers[whose // heads], row, whose % heads, token]
            assert looked_up[row, event, number, place] == expected


def test_credit_by_attention_against_the_whole_matrix():
    model, _, ids, mask, found = trajectory()
    ids, mask = ids[:1].repeat(2, 1), mask[:1].repeat(2, 1)  # one text, two traces
    costs = group_relative(torch.rand(2, ids.shape[1], generator=torch.Generator().manual_seed(4)), 2)
    ends = expired(found.trace)
    credit = attention_credit(model, ids[:1], mask[:1], costs, ends)
    seen = {}

    def observe(layer, received):
        query, key, attention = received.query, received.key, received.attention
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        matrix = query.view(1, heads, group, *query.shape[2:]) @ key.unsqueeze(2).transpose(-1, -2) * attention.scaling
        hidden_part = torch.ones(matrix.shape[-2:], dtype=torch.bool).triu(1)
        seen[layer] = matrix.masked_fill(hidden_part, -torch.inf).softmax(-1).mean(2)[0]

    replay(model, ids[:1], full_trace(model, ids[:1]), mask[:1], observe=observe)
    for layer, weights in seen.items():
        column = torch.arange(ids.shape[1])
        for trace in range(2):
            for head in range(weights.shape[0]):
                missed = ends[layer, trace, head] <= column.unsqueeze(-1)
                expected = -(weights[head] * missed * costs[trace].unsqueeze(-1)).sum(0)
                close(credit[layer, trace, head], expected)


@pytest.mark.parametrize("rules", [{}, {"scope": "model"}, {"share_spread": 0.3}], ids=["layer", "model", "shares"])
def test_a_batch_of_experience(rules):
    model = tiny()
    scorer = gate_for(model)
    if rules.get("share_spread"):
        scorer.share_layers(2, 1, 40)
    ids, _ = texts()
    batch = [PromptAnswer(ids[0].tolist(), 20)] * 2 + [PromptAnswer(ids[0, 7:].tolist(), 15)] * 2
    config = RefineConfig(min_budget=24, max_budget=24, period=8, sinks=2, recent=4, layer_share=0.5, **rules)
    seeds = {"seeds": (1, 2, 0), "device": torch.device("cpu"), "group": 2}
    found = sample_group(model, scorer, batch, config, **seeds)
    given = found.completions()
    assert [row[0] for row in given["completion_ids"]] == [0, 1, 2, 3]
    assert {len(row) for name in ("completion_ids", "env_mask", "logprobs") for row in given[name]} == {
        found.action_mask.shape[1]
    }
    assert not bool(found.action_mask[:, 0].any()), "the rollout's number counts for something"
    assert found.credit is not None
    assert bool((found.credit[~found.action_mask] == 0).all())
    assert bool(((found.log_probs < 0) <= found.action_mask).all())
    again = sample_group(model, scorer, batch, config, **seeds)
    assert torch.equal(again.credit, found.credit)
    with pytest.raises(DataError, match="no answer"):
        sample_group(model, scorer, [PromptAnswer(ids[0].tolist(), 61)] * 2, config, **seeds)


def test_budgets_and_layers_are_sampled_within_their_limits():
    config = RefineConfig(layer_share=0.5)
    found = {sample_budget(config, 300, (1, step)) for step in range(200)}
    assert min(found) >= 24
    assert max(found) <= 64
    assert len(found) > 25
    noisy = noisy_layers(4, 0.5, torch.arange(50))
    assert noisy.sum(0).tolist() == [2] * 50
    assert 60 < int(noisy[:2].sum()) + int(noisy[0].sum()) < 90
    assert noisy_layers(4, 0.01, torch.arange(9)).sum(0).tolist() == [1] * 9
    for length in range(42, 90):  # some event is over the budget, and comes before the last prediction
        budget = sample_budget(config, length, (1, 1))
        assert any(seen > budget for seen in range(16, length - 1, 16)), length
    with pytest.raises(DataError, match="nothing is evicted"):
        sample_budget(config, 41, (1, 1))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"credit": "fair"}, UsageError, "choose trace, to_go, attention"),
        ({"draw_temperature": 0.0}, UsageError, "--draw_temperature 0.0: give a number above 0"),
        ({"draw_temperature": math.nan}, UsageError, "--draw_temperature nan"),
        ({"kl": math.inf}, UsageError, "--kl inf"),
        ({"layer_share": 0.0}, UsageError, "layer_share"),
        ({"min_budget": 20}, BudgetError, "begin at 21"),
        ({"cost": "fair"}, UsageError, "choose low_entropy, thresholded, plain"),
        ({"ceiling": 0.0}, UsageError, "--ceiling 0.0: give a number above 0"),
        ({"pool": -1}, UsageError, "--pool -1: give 0 or more"),
        ({"floor": 7.0}, UsageError, "floor is at most 1"),
        ({"share_spread": 0.3, "scope": "model"}, UsageError, "0 for scope model"),
    ],
)
def test_settings_that_make_no_sense(changes, error, said):
    with pytest.raises(error, match=said):
        RefineConfig(**changes)
