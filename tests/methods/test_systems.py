"""What the formulas of the newer training-free systems imply, beside the histories of tests/methods/test_training_free.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from learnevict import methods
from learnevict.errors import UsageError
from learnevict.methods.lazy_eviction import Recurrence
from learnevict.methods.vase import Sketch
from learnevict.ops.random import hashed
from learnevict.oracle import layer_demand
from learnevict.parts.allocators import Pyramid
from learnevict.parts.demand import Demand
from learnevict.parts.draws import gumbel, normal
from learnevict.parts.output_error import saliency
from learnevict.parts.window import WindowAttention
from learnevict.signals import NEVER, Attention, Rows, Signals
from tests.closeness import close
from tests.event_loop import Loop, stream
from tests.laws import zoo
from tests.laws.run import batch, read
from tests.methods.test_training_free import Copied, watch


def own(name: str, budget: int = 20, **options: object):
    return methods.load(name).policy(budget, **{"sinks": 2, "recent": 3, "slack": 5, **options})


# --- random_attention ---


@pytest.mark.parametrize("redraw", [True, False])
def test_random_attention_keeps_the_prompt_and_counts_the_budget_beside_it(redraw):
    data = stream(pads=(0, 5))
    loop = Loop(own("random_attention", 9, redraw=redraw), data)
    found = loop.run(prompt=37)
    assert (found[..., :37] == NEVER).all()
    evicted = (found != NEVER).sum(-1)
    assert torch.equal(evicted, torch.full((2, 2), 14))
    assert not torch.equal(found[:, 0], found[:, 1]), "heads draw apart"
    held = (loop.layer.store.position >= 0).sum(-1)
    assert torch.equal(held, torch.tensor([[37 + 10] * 2, [32 + 10] * 2]))


# --- draws ---


def test_gumbel_keeps_what_drawing_one_after_the_other_keeps():
    """Inclusion of each of five weights in samples of two, without replacement: 40,000 draws against the exact sum."""
    weights = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    trials = 40_000
    noise = gumbel(hashed(torch.arange(trials).view(-1, 1), torch.arange(5), 3))
    sample = (weights.log() + noise).topk(2).indices
    found = torch.bincount(sample.flatten(), minlength=5) / trials
    exact = [
        w + sum(x * w / (1 - x) for j, x in enumerate(weights.tolist()) if j != i)
        for i, w in enumerate(weights.tolist())
    ]
    assert torch.allclose(found, torch.tensor(exact), atol=4 * math.sqrt(0.25 / trials))


def test_draws_have_their_moments_and_no_infinity():
    keys = hashed(torch.arange(200_000), 1)
    one, two = normal(keys), gumbel(keys)
    assert one.isfinite().all()
    assert two.isfinite().all()
    assert [float(one.mean()), float(one.var())] == pytest.approx([0, 1], abs=0.02)
    assert [float(two.mean()), float(two.var())] == pytest.approx([0.5772, math.pi**2 / 6], abs=0.02)
    edge = torch.tensor([0, -1, -(2**63), 2**63 - 1])
    assert gumbel(edge).isfinite().all()
    assert normal(edge).isfinite().all()


# --- keyformer, g_kv ---


def test_keyformer_without_noise_is_h2o():
    data = stream()
    plain = Loop(own("keyformer", noise=0.0, rise=0.0), data).run(prompt=37)
    assert torch.equal(plain, Loop(own("h2o"), data).run(prompt=37))
    assert not torch.equal(plain, Loop(own("keyformer", rise=0.0), data).run(prompt=37))


def test_keyformer_heats_up_with_the_answer():
    data = stream()
    cold = Loop(own("keyformer", noise=0.0, rise=0.0), data).run(prompt=37)
    assert not torch.equal(cold, Loop(own("keyformer", noise=0.0, rise=5.0), data).run(prompt=37))
    read = stream(pads=(0, 0), length=37)
    hot, same = (Loop(own("keyformer", noise=0.0, rise=rise), read).run(prompt=37) for rise in (5.0, 0.0))
    assert torch.equal(hot, same), "the prompt is read at the first temperature"


def test_gkv_that_remembers_nothing_is_window_attention():
    data = stream()
    now = own("g_kv", window=4, alpha=0.0, mix=1.0)
    plain = replace(now, scorer=WindowAttention(4, "all", "prob_max", "mean", "none"))
    assert torch.equal(Loop(now, data).run(prompt=37), Loop(plain, data).run(prompt=37))
    assert not torch.equal(Loop(own("g_kv", window=4, mix=1.0), data).run(prompt=37), Loop(plain, data).run(prompt=37))


def test_gkv_that_forgets_nothing_is_h2o_but_for_attention_to_itself():
    data = stream(pads=(0, 4), length=30, group=1)
    every, mass = own("g_kv", 40, memory="sum", alpha=1.0, mix=1.0, window=1, slack=0), own("h2o", 40, slack=0)
    one, two = (Loop(policy, data) for policy in (every, mass))
    assert (one.run(prompt=20) == NEVER).all()
    two.run(prompt=20)
    position, columns = one.layer.store.position, one.layer.store.state.columns
    assert torch.equal(position, two.layer.store.position)
    logits = (data.query * data.attention.scaling) @ data.key.mT
    seen = torch.ones(30, 30).tril().bool() & data.mask.bool().unsqueeze(1).unsqueeze(1)
    itself = logits.masked_fill(~seen, -torch.inf).softmax(-1).diagonal(dim1=-2, dim2=-1).nan_to_num()
    older = (position >= 0) & (position < 29)
    expected = two.layer.store.state.columns["mass"] - itself.gather(-1, position.clamp_min(0).long())
    close(columns["global"][older], expected[older])


def test_gkv_scores_the_end_of_a_prompt_with_what_came_before():
    data = stream(pads=(0, 0), length=45)
    found = Loop(own("g_kv", window=4, schedule="prefill_end"), data).run(prompt=33)
    assert (found == 33).any()


# --- lazy_eviction ---


ACTIVE = {0: [0, 3, 9], 1: [1, 2], 2: [], 3: [3], 4: [4, 12], 5: [6, 8, 11]}
"""Steps of thirteen at which each of six tokens is attended to."""


def traced(variant: str) -> tuple[Signals, Recurrence]:
    """Signals after step 12, read in two blocks of which the second begins at step 5; the scorer's state in them."""
    scorer = Recurrence(variant, 0.5)
    attention = torch.full((1, 1, 2, 13, 6), 0.1)
    for token, steps in ACTIVE.items():
        attention[0, 0, 1, steps, token] = 0.6
    state = {"active": torch.full((1, 1, 6), -2, dtype=torch.int32), "pause": torch.zeros(1, 1, 6, dtype=torch.int32)}
    for start, stop in ((0, 5), (5, 13)):
        one = torch.tensor([stop], dtype=torch.int32)
        position = torch.arange(6, dtype=torch.int32).view(1, 1, 6)
        position = torch.where(position < stop, position, -1)
        state = {name: torch.where(position < 0, fill, state[name]) for name, fill in (("active", -2), ("pause", 0))}
        signals = Signals(
            layer=0,
            slots=Copied(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4), position),
            rows=Rows(one * 0, one - 1, one, one, one * 0 + 6),
            budget=one,
            state=state,
            query=torch.zeros(1, 2, stop - start, 4),
            query_position=torch.arange(start, stop, dtype=torch.int32).view(1, -1),
            attention=Attention(1.0),
            fresh_attention=attention[:, :, :, start:stop],
        )
        state = scorer.observe(signals)
    return replace(signals, state=state), scorer


def test_lazy_eviction_traced_by_hand():
    signals, _ = traced("paper")
    assert signals.state["active"].dtype == torch.int32
    assert signals.state["active"].flatten().tolist() == [9, 2, 1, 3, 12, 11]
    assert signals.state["pause"].flatten().tolist() == [6, 1, 0, 1, 8, 3]


@pytest.mark.parametrize(("variant", "dead_wins"), [("gap", False), ("paper", True), ("code", True)])
def test_a_token_active_only_when_written_outranks_recurring_ones_but_for_the_default(variant, dead_wins):
    """Token 3 was attended to once, when it was written, nine steps ago; token 0 recurs every six steps, last three ago."""
    signals, scorer = traced(variant)
    score = scorer.score(signals).flatten().tolist()
    assert (score[3] > score[0]) == dead_wins
    assert score[2] == pytest.approx(0, abs=1e-6), "never active"
    late = {"gap": 0, "paper": 0, "code": 1}[variant]
    often = max(6, 3) if variant == "gap" else 6
    assert score[0] == pytest.approx(2 / (1 + math.exp(3 / 6 + late)) + 2 / (1 + math.exp(often - 1)), abs=1e-5)


# --- vase ---


def test_vase_with_a_wide_sketch_multiplies_norms(monkeypatch):
    monkeypatch.setattr(methods.vase, "RANK", 4000)
    _, signals = watch("vase-sketch")
    size = signals.per_slot(lambda keys, values: keys.norm(dim=-1) * values.norm(dim=-1)).square()
    there = signals.occupied & (size > 0)
    assert torch.allclose(Sketch(1).score(signals)[there] / size[there], torch.ones(()), rtol=0.15)


def test_vase_keeps_the_largest_ranges_and_draws_the_rest():
    data = stream()
    plain, other = (Loop(own("vase", window=6, seed=seed), data).run(prompt=37) for seed in (0, 1))
    assert not torch.equal(plain, other)
    value = data.value.clone()
    value[:, :, 25] *= 40  # older than the window long before the end
    huge = Loop(own("vase", window=6), replace(data, value=value)).run(prompt=37)
    assert (huge[:, :, 25] == NEVER).all()


# --- what the output loses ---


def asked() -> tuple[Signals, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signals, and of row 0 and kv head 0: keys and values [n, d] of occupied slots, and which slots they are."""
    _, signals = watch("obcache", stream(pads=(0, 2)))
    there = signals.occupied[0, 0].nonzero().flatten()
    return signals, signals.slots.keys[0, 0, there].double(), signals.slots.values[0, 0, there].double(), there


@pytest.mark.parametrize("part", ["value", "key", "joint"])
def test_saliency_is_the_second_order_term_of_the_error(part):
    """The Jacobian of attention's output by automatic differentiation, in the direction that zeroes value and logit."""
    signals, keys, values, there = asked()
    logits, where = next(iter(signals.window_logits(1)))
    found = saliency(signals, logits[:, :, :, -1:], where[:, -1:], part)[0, 0, there]
    exact = torch.zeros(len(there), dtype=torch.float64)
    for member in range(2):
        scores = (logits[0, 0, member, -1, there].double() * signals.attention.scaling).detach()
        for slot in range(len(there)):
            one = torch.zeros(len(there), dtype=torch.float64)
            one[slot] = 1.0
            of_values = -one.unsqueeze(-1) * values * (part != "key")
            of_scores = -one * scores * (part != "value")
            _, moved = torch.autograd.functional.jvp(
                lambda z, v: z.softmax(-1) @ v, (scores, values), (of_scores, of_values)
            )
            exact[slot] += moved.square().sum()
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-9)
    assert keys.shape == values.shape


def test_value_saliency_of_unit_values_is_attention_squared():
    """So its root by one query of one query head is TOVA's score, and SnapKV's before pooling."""
    signals, _, values, there = asked()
    logits, where = next(iter(signals.window_logits(1)))
    found = saliency(signals, logits[:, :, :1], where, "value")[0, 0, there].double()
    weights = signals.attention.probabilities(logits, signals.visible(where))[0, 0, 0, -1, there].double()
    assert torch.allclose(found.sqrt() / values.norm(dim=-1), weights, rtol=1e-4, atol=1e-7)


def test_the_loss_of_one_token_is_exact_and_the_loss_of_a_set_has_a_closed_form():
    signals, _, values, there = asked()
    weights = signals.attention.probabilities(*_one_query(signals))[0, 0, 0, -1, there].double()
    weights = weights / weights.sum()  # in float32 they sum to 1 only nearly, and the difference below is small
    output = weights @ values
    for gone in ([4], [0, 3, 7], list(range(1, len(there), 2))):
        stay = torch.ones(len(there), dtype=torch.bool)
        stay[gone] = False
        rest = weights[stay] @ values[stay] / weights[stay].sum()
        closed = (weights[gone].unsqueeze(-1) * (output - values[gone])).sum(0) / (1 - weights[gone].sum())
        assert torch.allclose(rest - output, closed, rtol=1e-6)


def _one_query(signals: Signals) -> tuple[torch.Tensor, torch.Tensor]:
    logits, where = next(iter(signals.window_logits(1)))
    return logits, signals.visible(where)


def test_caote_wraps_state_and_window_of_its_base():
    for base in methods.caote.BASES:
        inner, outer = own(base), own("caote", base=base)
        same = ("columns", "window", "observes", "refreshes")
        assert [getattr(outer.scorer, name) for name in same] == [getattr(inner.scorer, name) for name in same]
        assert (outer.guard, outer.allocator, outer.name) == (inner.guard, inner.allocator, "caote")


# --- allocation ---


@pytest.mark.parametrize(("budget", "floor"), [(64, 20), (33, 9), (9, 9), (21, 20)])
def test_layers_by_demand_spend_exactly_the_budget(budget, floor):
    needs = (3.0, 400.0, 90.0, 5000.0, 60.0)
    shares = [Demand(needs).layer_budget(budget, rank, 5, floor) for rank in range(5)]
    assert sum(shares) == 5 * budget
    assert min(shares) >= min(floor, budget)
    if budget - floor > 20:
        assert sorted(range(5), key=shares.__getitem__) == sorted(range(5), key=needs.__getitem__)
        smooth = [need**0.5 for need in needs]
        held = [min(max(x, 0.25 * sum(smooth) / 5), 2 * sum(smooth) / 5) for x in smooth]
        for share, x in zip(shares, held, strict=True):
            assert abs(share - floor - 5 * (budget - floor) * x / sum(held)) < 1
    assert [Demand().layer_budget(budget, rank, 5, floor) for rank in range(5)] == [budget] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": (1.0, 0.0)}, "above 0"), ({"floor": 2.0}, "floor and least"), ({"most": 0.5}, "most")],
)
def test_demand_that_means_nothing_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Demand(**options)


def test_demand_of_another_model_is_refused():
    with pytest.raises(UsageError, match="measured for 2 layers"):
        Demand((1.0, 2.0)).layer_budget(64, 0, 3, 9)


def test_reasonalloc_with_a_floor_of_one_is_rkv():
    data = stream()
    equal = Loop(own("reasonalloc", window=4, floor=1.0, recent=4), data).run(prompt=37)
    won = Loop(own("reasonalloc", window=4, recent=4), data).run(prompt=37)
    assert not torch.equal(equal, won)
    counts = (equal == NEVER).sum(-1)
    assert (counts[:, 0] - counts[:, 1]).abs().max() <= (won == NEVER).sum(-1).diff(dim=-1).abs().max()


def test_what_layers_need_is_what_the_model_shows():
    """Against the attention that transformers itself returns."""
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, 2, 70), (0, 9))
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        shown = model(ids, attention_mask=mask, position_ids=places, output_attentions=True).attentions
    for share in (0.5, 0.93):
        expected = []
        for layer in shown:
            needed = []
            for row in range(2):
                for head in range(layer.shape[1]):
                    for weights in layer[row, head, 9 * row :].double().tolist():
                        total, count = 0.0, 0
                        for weight in sorted(weights, reverse=True):
                            total, count = total + weight, count + 1
                            if total >= share:
                                break
                        needed.append(count)
            expected.append(sum(needed) / len(needed))
        assert layer_demand(model, ids, mask, share=share) == pytest.approx(expected, abs=0.01)
    policy = methods.reasonalloc.policy(20, layers=layer_demand(model, ids, mask), slack=4, sinks=2, recent=3)
    run = read(model, policy, ids, mask)
    shares = [policy.allocator.layer_budget(20, rank, 2, policy.floor) for rank in range(2)]
    held = [float((run.cache.positions(layer) >= 0).sum(-1).float().mean()) for layer in range(2)]
    assert run.evictions > 0
    assert held[0] - held[1] == shares[0] - shares[1]


def test_pyramid_rkv_is_rkv_on_a_pyramid():
    policy = methods.pyramid_rkv.policy(64, slack=5)
    assert policy.scorer == methods.rkv.policy(64, slack=5).scorer
    assert policy.allocator == Pyramid(20.0)


# --- schedules ---


@pytest.mark.parametrize("base", ["snapkv", "h2o", "g_kv"])
def test_flowkv_never_looks_twice(base):
    """Under a share of the text what has survived one compression stays for good; the base alone would evict it later."""
    data = stream(pads=(0, 4))
    options = {"budget": "50%", "slack": 4, "sinks": 0, "recent": 4}
    found = Loop(own("flowkv", base=base, **options), data).run(prompt=36)
    plain = Loop(own(base, **options), data).run(prompt=36)
    column, settled = torch.arange(data.length), (found > 20) & (found != NEVER)  # while guards are most of the budget
    assert settled.any()
    assert ((found - column)[settled] <= 8).all(), "a token goes when its block is compressed, one block later"
    assert ((plain - column)[(plain > 20) & (plain != NEVER)] > 8).any()


def test_flowkv_is_its_base_as_long_as_there_is_one_turn():
    data = stream(pads=(0, 0))
    once = Loop(own("flowkv", 16, keep=1.0), data).run(prompt=20)
    base = Loop(own("snapkv", 16), data).run(prompt=20)
    assert torch.equal(once == 20, base == 20)
    assert (once == 20).any()
    assert not torch.equal(once, base)
