"""Figures of the oracle, and golden eviction with a shared total, against float64 brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learnevict.errors import BudgetError, UsageError
from learnevict.evals.methods import EvaluationSettings
from learnevict.evals.tasks import TextBatch
from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import replay
from learnevict.methods import full, golden, h2o, keydiff, random, snapkv
from learnevict.oracle import Received, Reducers, future_attention, golden_labels, golden_trace, horizon
from learnevict.oracle import golden as roll_golden
from learnevict.oracle.metrics import (
    kept_attention,
    measure,
    ranking_cost,
    recalled,
    top_recall,
)
from learnevict.oracle.reference import Reference, align, recording
from learnevict.oracle.traces import Share, unpadded_positions
from learnevict.policy import Guard, Schedule, governor
from learnevict.signals import NEVER, Trace
from tests.closeness import close
from tools.results.hindsight import Case, by_value, caote, from_the_left, profile, slots_of

GUARD, BLOCK = Guard(1, 2), 4
TERMS = {"sinks": 1, "recent": 2, "slack": 4}


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=12, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [3, 41] of texts of 37, 30 and 41 tokens, padded on the left."""
    torch.manual_seed(1)
    mask = torch.stack([(torch.arange(41) >= 41 - length).long() for length in (37, 30, 41)])
    return torch.randint(0, 12, mask.shape) * mask, mask


def labels_like(shape=(2, 3, 2, 41, 11), seed=0) -> torch.Tensor:
    """Random causal block labels [L, B, H, T, M] on rows of 37, 30 and 41 tokens, padded on the left."""
    torch.manual_seed(seed)
    layers, rows, heads, length, _ = shape
    found = []
    for _ in range(layers):
        query, key = torch.randn(rows, heads, length, 6), torch.randn(rows, heads, length, 6)
        found.append(future_attention(query, 3 * key, block=BLOCK, valid=valid_rows()))
    return torch.stack(found)


def valid_rows() -> torch.Tensor:
    return torch.stack([torch.arange(41) >= 41 - length for length in (37, 30, 41)])


# --- pure functions ---


def test_recall_is_the_share_of_the_best_that_are_chosen():
    torch.manual_seed(0)
    scores, targets = torch.randn(40, 9), torch.randn(40, 9)
    candidates, count = torch.rand(40, 9) < 0.8, torch.randint(1, 5, (40,))
    found = top_recall(scores, targets, candidates, count)
    for row in range(40):
        free = [i for i in range(9) if candidates[row, i]]
        top = [set(sorted(free, key=lambda i: -float(x[row, i]))[: int(count[row])]) for x in (scores, targets)]
        assert float(found[row]) == pytest.approx(len(top[0] & top[1]) / min(int(count[row]), len(free)))
    assert bool(top_recall(scores, targets, candidates, torch.zeros(40).long()).isnan().all())
    tied = top_recall(
        torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2).bool(), torch.tensor([1])
    )
    assert float(tied) == 1.0, "of equal scores the older goes"


def test_the_cost_of_a_ranking_is_what_all_budgets_lose_together():
    torch.manual_seed(0)
    targets = torch.rand(6).double()
    every = torch.ones(6).bool()
    costs = {}
    for order in itertools.permutations(range(6)):
        scores = torch.empty(6).double()
        scores[list(order)] = torch.arange(6, 0, -1).double()
        lost = sum(float(targets[list(order)][budget:].sum()) for budget in range(1, 6))
        costs[order] = float(ranking_cost(scores, targets, every))
        assert costs[order] == pytest.approx(lost)
    assert min(costs.values()) == pytest.approx(float(ranking_cost(targets, targets, every)))
    assert sum(costs.values()) / len(costs) == pytest.approx(2.5 * float(targets.sum())), "a random ranking"
    hidden = torch.tensor([True, False, True, True, False, True])
    alone = ranking_cost(targets[hidden].flip(0), targets[hidden], torch.ones(4).bool())
    flipped = torch.zeros(6).double().masked_scatter(hidden, targets[hidden].flip(0))
    assert float(ranking_cost(flipped, targets, hidden)) == pytest.approx(float(alone))


def test_kept_attention_is_that_of_every_query():
    torch.manual_seed(3)
    query, key, valid = torch.randn(3, 4, 41, 8).double(), torch.randn(3, 2, 41, 8).double(), valid_rows()
    rank = unpadded_positions(valid)
    ends = torch.randint(1, 10, (3, 2, 41)) * BLOCK + (41 - valid.sum(-1)).view(-1, 1, 1)
    expiry = torch.where(torch.rand(3, 2, 41) < 0.5, ends, NEVER).to(torch.int32)
    born = expiry > torch.arange(41)
    expiry = torch.where(born, expiry, NEVER).to(torch.int32)
    labels = future_attention(query, key, block=BLOCK, valid=valid, out_dtype=torch.float64)
    found = kept_attention(labels, expiry, rank, BLOCK)
    for row, head, m in itertools.product(range(3), range(2), range(11)):
        shares = []
        for t in (t for t in range(41) if int(rank[row, t]) // BLOCK == m and valid[row, t]):
            for g in range(2):
                seen = [i for i in range(t + 1) if valid[row, i]]
                weights = (key[row, head, seen] @ query[row, 2 * head + g, t] / math.sqrt(8)).softmax(0)
                shares.append(sum(float(w) for w, i in zip(weights, seen, strict=True) if t < expiry[row, head, i]))
        if shares:
            assert float(found[row, head, m]) == pytest.approx(sum(shares) / len(shares))
        else:
            assert math.isnan(found[row, head, m])


# --- policies ---


def run_policy(model, policy, ids, mask):
    with attach(model, policy, record=True) as cache, torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    return logits, cache.trace().expiry


@pytest.mark.parametrize("method", [h2o, snapkv, keydiff])
def test_figures_of_a_policy_are_those_of_its_trace(model, batch, method):
    ids, mask = batch
    policy = method.policy(12, **TERMS)
    reference = Reference.of(model, ids, mask, block=BLOCK, prompt_length=[9, 9, 9])
    found = measure(model, policy, reference)
    logits, expiry = run_policy(model, policy, ids, mask)
    assert int((expiry != NEVER).sum()) > 100
    labels = torch.stack(golden_labels(model, ids, mask, block=BLOCK)[0])
    future = torch.nn.functional.pad(horizon(labels), (0, 1))
    for row in range(3):
        first = 41 - int(mask[row].sum())
        loss = -sum(float(logits[row, t - 1].double().log_softmax(-1)[ids[row, t]]) for t in range(first + 9, 41))
        assert float(found.loss[row]) == pytest.approx(loss, rel=1e-5)
        hits = total = 0
        for layer, head, m in itertools.product(range(2), range(2), range(10)):
            end = first + (m + 1) * BLOCK
            old = range(first + 1, end - BLOCK) if end <= 41 else ()
            held = [i for i in old if expiry[layer, row, head, i] >= end]
            stay = {i for i in held if expiry[layer, row, head, i] > end}
            if len(stay) < len(held):
                best = sorted(held, key=lambda i: -float(future[layer, row, head, i, m + 1]))[: len(stay)]
                hits, total = hits + len(stay & set(best)), total + len(stay)
        assert (float(found.choices.wanted_kept[row]), float(found.choices.wanted[row])) == (hits, total)
    figures = found.figures()
    assert figures["top_recall"] < 1 and figures["regret"] > 1 and 0 < figures["attention_kept"] < 1
    assert figures["attention_kept_min"] < figures["attention_kept"]


def test_golden_is_its_own_measure_and_random_the_other_end(model, batch):
    ids, mask = batch
    reference = Reference.of(model, ids, mask, block=BLOCK)
    trace = golden_trace(model, reference.input_ids, reference.attention_mask, budget=12, block=BLOCK, guard=GUARD)
    found = measure(model, golden.policy(12, trace=trace), reference)
    figures = found.figures()
    assert figures["top_recall"] == 1.0
    assert figures["oracle_gap_closed"] == pytest.approx(1.0, abs=1e-4)
    choices = found.choices
    assert torch.equal(choices.wanted_kept, choices.wanted) and bool((choices.wanted > 0).all())
    by_labels = measure(model, random.policy(12, **TERMS), reference)
    assert float(by_labels.golden_loss.sum()) == pytest.approx(float(found.loss.sum()), rel=1e-5)
    assert by_labels.figures()["attention_kept"] < figures["attention_kept"]
    assert len(reference.bounds) == 1, "random and golden run once for all policies of one budget"


def test_recovered_loss_is_measured_from_random_to_golden(model, batch):
    """0 for the random eviction of the reference, 1 for golden, for others the share between losses of three runs."""
    reference = Reference.of(model, *batch, block=BLOCK, prompt_length=[9, 9, 9])
    ids, mask = reference.input_ids, reference.attention_mask
    logits, expiry = run_policy(model, h2o.policy(12, **TERMS), ids, mask)
    roll = reference.roll(expiry, GUARD)
    traces = [roll.trace(lambda m, _: reference.random_scores), roll.trace(lambda m, _: reference.future[..., m + 1])]
    runs = [logits, *(run_policy(model, golden.policy(12, trace=trace), ids, mask)[0] for trace in traces)]
    mine, chance, best = (
        -sum(
            float(run[row, t - 1].double().log_softmax(-1)[ids[row, t]])
            for row, t in reference.loss_mask.nonzero().tolist()
        )
        for run in runs
    )
    assert len({mine, chance, best}) == 3
    policies = [h2o.policy(12, **TERMS), *(golden.policy(12, trace=trace) for trace in traces)]
    found = [measure(model, policy, reference).figures()["oracle_gap_closed"] for policy in policies]
    close(found, [(chance - mine) / (chance - best), 0.0, 1.0])


def test_nothing_evicted_leaves_nothing_to_say(model, batch):
    figures = measure(model, full.policy(), Reference.of(model, *batch, block=128)).figures()
    assert figures["loss_ratio"] == pytest.approx(1.0, rel=1e-5) and figures["attention_kept_min"] == 1.0
    assert not {"oracle_gap_closed", "top_recall", "regret"} & set(figures)


def test_a_text_is_measured_alike_alone_and_beside_others(model, batch):
    ids, mask = batch
    policy = h2o.policy(12, **TERMS)
    together = measure(model, policy, Reference.of(model, ids, mask, block=BLOCK, prompt_length=[9, 8, 7]))
    for row, prompt in enumerate((9, 8, 7)):
        own = ids[[row]][:, mask[row].bool()]
        alone = measure(model, policy, Reference.of(model, own, block=BLOCK, prompt_length=[prompt]))
        for part, whole in ((alone, together), (alone.choices, together.choices)):
            for name, value in vars(part).items():
                if name != "choices":
                    assert float(value) == pytest.approx(float(getattr(whole, name)[row]), rel=1e-4), name


def test_shares_and_rules_are_measured_too(model, batch):
    reference = Reference.of(model, *batch, block=BLOCK)
    figures = measure(model, snapkv.policy("40%", **TERMS), reference).figures()
    assert {"oracle_gap_closed", "top_recall", "regret"} <= set(figures)
    last = governor(lambda s: s.age < s.budget.view(-1, 1, 1), budget=12, schedule=Schedule(4))
    figures = measure(model, last, reference).figures()
    assert "regret" not in figures and figures["top_recall"] < 1
    with pytest.raises(UsageError, match="block=4"):
        measure(model, h2o.policy(12, **TERMS), Reference.of(model, *batch, block=8))


def test_a_recorded_policy_evicts_as_before(model, batch):
    policy = h2o.policy(12, **TERMS)
    recorded, scores = recording(policy)
    assert torch.equal(run_policy(model, recorded, *batch)[1], run_policy(model, policy, *batch)[1])
    assert {event.layer for event in scores} == {0, 1} and all(event.scores.isfinite().any() for event in scores)


def test_events_of_padded_rows_fall_together(batch):
    ids, mask = batch
    moved, real = align(BLOCK, mask, ids, mask)
    assert (real.argmax(-1) % BLOCK == 0).all() and torch.equal(real.sum(-1), mask.sum(-1))
    for row in range(3):
        assert torch.equal(moved[row][real[row].bool()], ids[row][mask[row].bool()])
    assert int(moved.masked_fill(real.bool(), 0).abs().sum()) == 0


# --- golden with a shared total ---


@pytest.mark.parametrize("share", [Share("layer", 0.0), Share("layer", 0.5), Share("model", 0.0), Share("model", 0.5)])
def test_shared_golden_is_that_of_plain_loops(share):
    labels, valid, budget = labels_like(), valid_rows(), 12
    found = roll_golden(labels, share=share, budget=budget, block=BLOCK, guard=GUARD, valid=valid).expiry
    future = horizon(labels)
    for row in range(3):
        first = 41 - int(valid[row].sum())
        heads = [(layer, head) for layer in range(2) for head in range(2)]
        contests = [heads] if share.scope == "model" else [heads[:2], heads[2:]]
        for contest in contests:
            held = {place: [] for place in contest}
            gone = {}
            for m in range((41 - first) // BLOCK):
                end = first + (m + 1) * BLOCK
                for place in contest:
                    held[place] += range(end - BLOCK, end)
                excess = sum(map(len, held.values())) - budget * len(contest)
                free = []
                for (layer, head), tokens in held.items():
                    old = [i for i in tokens if first + 1 <= i < end - BLOCK]
                    score = {i: float(future[layer, row, head, i, m + 1]) if m + 1 < 11 else 0.0 for i in old}
                    ranking = sorted(old, key=lambda i, score=score: (score[i], i))
                    safe = int(share.floor * (budget - 5))
                    free += [(score[i], layer, head, i) for i in ranking[: max(len(ranking) - safe, 0)]]
                for _, layer, head, i in sorted(free)[: max(excess, 0)]:
                    gone[layer, head, i] = end
                    held[layer, head].remove(i)
            for layer, head in contest:
                for i in range(41):
                    assert int(found[layer, row, head, i]) == gone.get((layer, head, i), NEVER)


def test_fixed_slots_are_held():
    labels, valid = labels_like(), valid_rows()
    slots = torch.tensor([[8, 10], [20, 10]])
    found = roll_golden(labels, share=Share("head", slots=slots), budget=12, block=BLOCK, guard=GUARD, valid=valid)
    assert torch.equal(found.held(40)[:, 2] - 1, slots), "40 tokens and one more"
    with pytest.raises(UsageError, match="12 slots on average"):
        roll_golden(labels, share=Share("head", slots=slots + 1), budget=12, block=BLOCK, guard=GUARD, valid=valid)
    with pytest.raises(UsageError, match="scope"):
        Share("model", slots=slots)
    with pytest.raises(BudgetError, match="smallest that works is 5"):
        roll_golden(labels, share=Share("model"), budget=4, block=BLOCK, guard=GUARD, valid=valid)


def test_a_profile_is_what_heads_hold_and_makes_whole_slots():
    labels, valid = labels_like(), valid_rows()
    trace = roll_golden(labels, share=Share("model", 0.0), budget=12, block=BLOCK, guard=GUARD, valid=valid)
    found = profile(trace, unpadded_positions(valid))
    assert float(found.mean()) == pytest.approx(12.0) and float(found.std()) > 0
    held = []
    for row, length in enumerate((37, 30, 41)):
        for seen in range(BLOCK, length + 1, BLOCK):
            column = torch.arange(41)
            there = (
                (column >= 41 - length) & (column < 41 - length + seen) & (trace.expiry[:, row] > 41 - length + seen)
            )
            held.append(there.sum(-1)) if there.sum(-1).float().mean() >= 12 else None
    close(found, torch.stack(held).float().mean(0))
    slots = slots_of(found - 5, 12, 5)
    assert int(slots.sum()) == 48 and bool(((slots - found).abs() < 1).all()) and int(slots.min()) >= 5
    assert slots_of(torch.tensor([[0.0, 3.0]]), 9, 5).tolist() == [[5, 13]]
    with pytest.raises(UsageError, match="nothing was evicted"):
        profile(Trace(torch.full((1, 1, 1, 8), NEVER, dtype=torch.int32), budget=12, period=4), torch.arange(8)[None])


def test_a_shared_trace_replays_under_its_total(model, batch):
    reference = Reference.of(model, *batch, block=BLOCK)
    ids, mask = reference.input_ids, reference.attention_mask
    trace = roll_golden(reference.labels, share=Share("model"), budget=12, block=BLOCK, guard=GUARD, valid=mask.bool())
    assert trace.evictions > 100 and replay(model, ids, trace, mask).logits.isfinite().all()
    assert int(trace.held(40)[:, 2].sum()) <= 12 * 4 + 4
    kept, wanted = recalled(reference, trace.expiry, GUARD)
    assert torch.equal(kept, wanted), "within every head, the best stay"


# --- traces tried with hindsight ---


@pytest.fixture(scope="module")
def case(model, batch) -> Case:
    ids, mask = batch
    marks = mask.bool()
    texts = from_the_left(TextBatch(ids, mask, marks, marks & (mask.cumsum(-1) > 9), [9, 9, 9]))
    assert bool((texts.attention_mask.diff() <= 0).all()), "padded on the right"
    return Case(model, texts, 12, EvaluationSettings(slack=BLOCK, sinks=1, recent=2))


def test_a_case_knows_the_oracle(model, case):
    ids, mask = case.texts.input_ids, case.texts.attention_mask
    labels = torch.stack(golden_labels(model, ids, mask, block=BLOCK)[0])
    close(case.golden_labels * mask[:, None, :, None], labels)
    assert torch.equal(case.golden.expiry, golden_trace(model, ids, mask, budget=12, block=BLOCK, guard=GUARD).expiry)
    seen = case.received[1]
    weighted = future_attention(
        seen.query, seen.key, block=BLOCK, valid=mask.bool(), reduce=Reducers(value="contribution"), value=seen.value
    )
    close(case.labels(by_value)[1] * mask[:, None, :, None], weighted)
    scores = case.measure(case.golden)
    losses = case.losses(case.run(case.golden)[0]).sum(-1)
    assert scores["loss"] == pytest.approx(losses.tolist(), rel=1e-5)


def test_an_output_changes_as_its_label_says(case):
    """CAOTE's form is |o' - o|, o' being the output without the key."""
    p = next(case.attention(case.received)).double()
    seen = case.received[0]
    label = caote(p, Received(*(part.double() for part in (seen.query, seen.key, seen.value)), None, seen.attention), 0)
    value = seen.value.double()
    for row, head, group, t, i in ((0, 0, 0, 20, 3), (1, 1, 1, 25, 11), (2, 0, 1, 40, 40)):
        weights = p[row, head, group, t].clone()
        output = weights @ value[row, head]
        weights[i] = 0
        without = weights / weights.sum() @ value[row, head]
        assert float(label[row, head, group, t, i]) == pytest.approx(float((without - output).norm()), rel=1e-5)


def test_attention_beside_what_is_left(case):
    """Kept keys share all attention; an evicted one has what it would get if it alone came back."""
    trace = case.golden
    found = next(case.attention(case.received, trace))
    column = torch.arange(41)
    left = (column <= column[:, None]) & (column[:, None] < trace.expiry[0][:, :, None, None])
    kept = torch.where(left, found, 0).sum(-1)
    close(kept, torch.ones_like(kept))
    full = next(case.attention(case.received))
    back = full / (torch.where(left, full, 0).sum(-1, keepdim=True) + full)
    gone = ~left & (column <= column[:, None])
    close(found, back, where=gone.expand_as(found))
