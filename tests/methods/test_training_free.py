"""Every training-free method against a second implementation from its formulas (tests/brute_force.py), token by token.

The whole eviction history must agree: every event, every head, left-padded rows, groups of two query heads, budgets
that are first exceeded inside the prompt or while decoding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learnevict import methods
from learnevict.errors import BudgetError, GateError, LearnevictError, TraceError, UsageError
from learnevict.methods.rkv import redundancy
from learnevict.oracle import golden as roll
from learnevict.parts.allocators import Ada, Pyramid
from learnevict.parts.window import WindowAttention
from learnevict.policy import Guard, governor
from learnevict.signals import NEVER, Signals, Trace
from tests import brute_force as brute
from tests import brute_systems as systems
from tests.closeness import close
from tests.event_loop import LAYER, VOCABULARY, Loop, Stream, stream

BUDGET, SINKS, RECENT = 20, 2, 3
EVENTS = {"every step": 0, "every 5": 5}


def worths() -> torch.Tensor:
    return torch.randn(LAYER + 1, 2, VOCABULARY, generator=torch.Generator().manual_seed(1))


def lexical_gate() -> object:
    gate = methods.lexical.LexicalGate(LAYER + 1, 2, VOCABULARY)
    gate.table.copy_(worths())
    gate.bonus.fill_(0.3)
    return gate


def clausal_gate() -> object:
    gate = methods.clausal.ClausalGate(LAYER + 1, 2, VOCABULARY, separator=3, places=3)
    gate.table.copy_(clause_worths())
    return gate


def clause_worths() -> torch.Tensor:
    return torch.randn(LAYER + 1, 2, 3 * VOCABULARY, generator=torch.Generator().manual_seed(2))


# method: (options, score, counts)
CASES = {
    "streaming_llm": ("streaming_llm", {}, brute.recency, None),
    "random": ("random", {"seed": 7}, brute.hashed(7), None),
    "knorm": ("knorm", {}, brute.key_norm, None),
    "h2o-paper": ("h2o", {}, brute.mass, None),
    "h2o-kvpress": ("h2o", {"variant": "kvpress"}, brute.mean_mass, None),
    "tova": ("tova", {}, brute.last_attention, None),
    "snapkv-paper": ("snapkv", {}, brute.snap("paper", 3), None),
    "snapkv-kvpress": ("snapkv", {"variant": "kvpress", "window": 4}, brute.snap("kvpress", 4), None),
    "snapkv-rkv": ("snapkv", {"variant": "rkv", "window": 9}, brute.snap("rkv", 9), None),
    "adakv": ("adakv", {}, brute.snap("ada", 3), brute.ada_counts(0.2)),
    "adakv-flat": ("adakv", {"alpha": 0.0, "window": 6}, brute.snap("ada", 6), brute.ada_counts(0.0)),
    "rkv": ("rkv", {"window": 4}, brute.important_and_new(0.1, 4), None),
    "rkv-code": ("rkv", {"variant": "code"}, brute.important_and_new(0.07, 8), None),
    "expected_attention": (
        "expected_attention",
        {"window": 12, "future": 20},
        brute.expected_attention(12, 20),
        None,
    ),
    "keydiff": ("keydiff", {}, brute.unlikeness, None),
    "lexical": ("lexical", {"gate": lexical_gate}, brute.worth(worths(), 0.3), None),
    "clausal": ("clausal", {"gate": clausal_gate}, brute.clause_worth(clause_worths(), 3, 3), None),
    "lexical-bonus": ("lexical", {"gate": lexical_gate, "bonus": 1.5}, brute.worth(worths(), 1.5), None),
    "random_attention": ("random_attention", {"seed": 3, "prompt": False}, systems.redrawn(3), None),
    "random_attention-once": ("random_attention", {"prompt": False, "redraw": False}, brute.hashed(0), None),
    "keyformer": ("keyformer", {"seed": 5}, systems.NoisyMass(1.0, 0.01, 5), None),
    "defensivekv": ("defensivekv", {}, systems.worst_case(3), brute.ada_counts(0.2)),
    "defensivekv-window": ("defensivekv", {"window": 9, "alpha": 1.0}, systems.worst_case(9), brute.ada_counts(1.0)),
    "lazy_eviction": ("lazy_eviction", {"alpha": 0.05}, systems.Recurrence("gap", 0.05), None),
    "lazy_eviction-paper": (
        "lazy_eviction",
        {"variant": "paper", "alpha": 1.5, "relative": True},
        systems.Recurrence("paper", 1.5, relative=True),
        None,
    ),
    "lazy_eviction-code": (
        "lazy_eviction",
        {"variant": "code", "alpha": 0.05},
        systems.Recurrence("code", 0.05),
        None,
    ),
    "vase": ("vase", {"seed": 2, "window": 6}, systems.large_or_drawn(6, 0.25, 2), None),
    "vase-sketch": ("vase", {"variant": "sketch"}, systems.sketch(0, fixed=False), None),
    "vase-fixed": ("vase", {"variant": "fixed", "seed": 4}, systems.sketch(4, fixed=True), None),
    "g_kv": ("g_kv", {"window": 4}, systems.LocalAndGlobal(4), None),
    "g_kv-mean": (
        "g_kv",
        {"memory": "mean", "alpha": 0.6, "window": 6},
        systems.LocalAndGlobal(6, 0.5, 0.6, "mean"),
        None,
    ),
    "g_kv-sum": ("g_kv", {"memory": "sum", "mix": 0.9, "window": 5}, systems.LocalAndGlobal(5, 0.9, 0.8, "sum"), None),
    "obcache": ("obcache", {"window": 5}, systems.saliency("joint", 5), None),
    "obcache-key": ("obcache", {"variant": "key", "window": 4}, systems.saliency("key", 4), None),
    "obcache-value": ("obcache", {"variant": "value"}, systems.saliency("value", 16), None),
    "obcache-all": ("obcache", {"window": None}, systems.AllSaliency("joint"), None),
    "obcache-all-value": ("obcache", {"window": None, "variant": "value"}, systems.AllSaliency("value"), None),
    "caote": ("caote", {}, systems.output_change(brute.snap("paper", 3)), None),
    "caote-h2o": ("caote", {"base": "h2o"}, systems.output_change(brute.mass), None),
    "caote-fast": ("caote", {"base": "h2o", "variant": "fast"}, systems.output_change(brute.mass, fast=True), None),
    "reasonalloc": ("reasonalloc", {"window": 4}, brute.important_and_new(0.1, 4), systems.demand_counts(0.25)),
    "flowkv": ("flowkv", {}, systems.Once(brute.snap("paper", 3), 0.5, SINKS, RECENT), None),
    "flowkv-h2o": ("flowkv", {"base": "h2o", "keep": 0.75}, systems.Once(brute.mass, 0.75, SINKS, RECENT), None),
    "pyramid_rkv": ("pyramid_rkv", {"window": 4}, brute.important_and_new(0.1, 4), None),
}


def make(case: str, **options: object):
    name, own, _, _ = CASES[case]
    own = {key: value() if callable(value) else value for key, value in own.items()}
    rules = {"sinks": SINKS, "recent": RECENT, "slack": 0, **own, **options}
    return methods.load(name).policy(rules.pop("budget", BUDGET), **rules)


def expected(case: str, data: Stream, prompt: int, **terms: object) -> torch.Tensor:
    """The brute-force history in columns of the padded input, [B, H, T]."""
    _, _, score, counts = CASES[case]
    out = torch.full((*data.key.shape[:2], data.length), NEVER, dtype=torch.int32)
    for index, pad in enumerate(data.pads):
        rule = brute.Rule(BUDGET, SINKS, RECENT, counts=counts, **terms)
        own = brute.history(data.row(index), max(prompt - pad, 0), rule, score)
        out[index, :, pad:] = torch.where(own == NEVER, own, own + pad)
    return out


@pytest.mark.parametrize("slack", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("case", CASES)
def test_history_is_that_of_the_formulas(case, slack):
    data = stream()
    found = Loop(make(case, slack=slack), data).run(prompt=37)
    assert (found != NEVER).any(-1).all()
    assert torch.equal(found, expected(case, data, 37, slack=slack))


ATTENTIVE = (
    "snapkv", "tova", "h2o", "rkv", "adakv", "keyformer", "defensivekv", "lazy_eviction", "g_kv", "obcache", "caote", "vase",
)  # fmt: skip
SINKLESS = ("snapkv-rkv", "rkv", "rkv-code", "keyformer", "vase")
"""Their softmax runs over tokens alone, so no sink takes part in it."""


@pytest.mark.parametrize("kind", [{"softcap": 1.5}, {"sinks": True}], ids=["softcap", "sinks"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if CASES[case][0] in ATTENTIVE and case not in ("vase-sketch", "vase-fixed")]
)
def test_history_under_softcap_and_attention_sinks(case, kind):
    """As Gemma2 and GPT-OSS have them."""
    data = stream(**kind)
    found = Loop(make(case, slack=5), data).run(prompt=37)
    assert torch.equal(found, expected(case, data, 37, slack=5))
    plain = Loop(make(case, slack=5), stream()).run(prompt=37)
    assert torch.equal(found, plain) == (case in SINKLESS and "sinks" in kind)


@pytest.mark.parametrize("case", ["h2o-paper", "snapkv-paper", "adakv", "rkv", "expected_attention"])
def test_budget_first_exceeded_while_decoding(case):
    data = stream(pads=(3, 0), length=46, seed=3)
    found = Loop(make(case, slack=4), data).run(prompt=11)
    assert (found != NEVER).any()
    assert torch.equal(found, expected(case, data, 11, slack=4))


@pytest.mark.parametrize("case", ["tova", "snapkv-kvpress", "adakv", "keydiff"])
def test_prompt_compressed_when_it_has_been_read(case):
    data = stream(pads=(0, 0), length=45, seed=5)
    found = Loop(make(case, slack=5, schedule="prefill_end"), data).run(prompt=33)
    assert torch.equal(found, expected(case, data, 33, slack=5, at_prompt_end=True))


@pytest.mark.parametrize("slack", [5, 0])
def test_prefill_only_stops_after_the_prompt(slack):
    """And leaves as much as the budget says: no room is kept for a next token that evicts nothing."""
    data = stream()
    found = Loop(make("snapkv-paper", slack=slack, schedule="prefill_only"), data).run(prompt=37)
    ends = found[found != NEVER]
    assert len(ends)
    assert (ends == 37).all()
    kept = (found[..., :37] == NEVER).sum(-1) - torch.tensor(data.pads).view(-1, 1)
    assert (kept == BUDGET).all()


def test_full_never_evicts():
    policy = methods.full.policy(4, sinks=9, slack=3)
    assert (Loop(policy, stream()).run(prompt=37) == NEVER).all()


def test_every_method_takes_the_same_options():
    rules = {"sinks": 1, "recent": 2, "prompt": True, "slack": 3, "schedule": "prefill_end"}
    for name in methods.METHODS:
        if methods.load(name).PAPER.kind == "learned" or name in ("golden", "flowkv"):
            continue  # flowkv compresses blocks only
        policy = methods.load(name).policy(40, **rules)
        if name != "full":
            assert policy.guard == Guard(1, 2, True), name
            assert (policy.schedule.slack, policy.schedule.prompt) == (3, "end"), name
        assert policy.name == name


def test_defaults_are_bounded_and_cite_their_paper():
    windows = {
        "snapkv": 32, "pyramidkv": 32, "adakv": 32, "defensivekv": 32, "caote": 32, "flowkv": 32, "qpruningkv": 32, "rkv": 8,
        "pyramid_rkv": 8, "reasonalloc": 8, "g_kv": 16, "obcache": 16, "vase": 64,
    }  # fmt: skip
    other = {name: Guard(4, 0, recent_share=0.5) for name in ("h2o", "keyformer", "mikv")}
    other["random_attention"] = Guard(4, 8, prompt=True)
    for name in methods.METHODS:
        module = methods.load(name)
        if module.PAPER.kind != "heuristic":
            continue
        policy = module.policy(512)
        assert policy.schedule.bounded
        assert policy.guard == other.get(name, Guard(4, windows.get(name, 8))), name
        assert len(module.PAPER.arxiv) == 10
        assert 2023 <= module.PAPER.year <= 2026


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("snapkv", {"variant": "vllm"}, UsageError, "kvpress, paper, rkv"),
        ("h2o", {"variant": "max"}, UsageError, "kvpress, paper"),
        ("rkv", {"variant": "max"}, UsageError, "code, paper"),
        ("snapkv", {"windows": 3}, UsageError, "windows"),
        ("knorm", {"schedule": "never"}, UsageError, "prefill_only"),
        ("snapkv", {"window": 0}, UsageError, "window"),
        ("streaming_llm", {"positions": "slot"}, UsageError, "true positions"),
        ("tova", {"slack": 600}, BudgetError, "605"),
        ("pyramidkv", {"beta": 0.5}, UsageError, "beta"),
        ("adakv", {"alpha": 2.0}, UsageError, "alpha"),
        ("lazy_eviction", {"variant": "lazy"}, UsageError, "code, gap, paper"),
        ("vase", {"variant": "dkv"}, UsageError, "attention, fixed, sketch"),
        ("obcache", {"variant": "query"}, UsageError, "joint, key, value"),
        ("g_kv", {"memory": "last"}, UsageError, "by max, mean, sum"),
        ("caote", {"base": "knorm"}, UsageError, "which knorm has not"),
        ("flowkv", {"keep": 0.0}, UsageError, "keep=0.0 of snapkv"),
        ("flowkv", {"schedule": "prefill_end"}, UsageError, "share above 0"),
        ("caote", {"variant": "slow"}, UsageError, "fast, paper"),
    ],
)
def test_errors_teach(name, options, error, message):
    with pytest.raises(error, match=message):
        methods.load(name).policy(512, **options)


def test_lexical_needs_token_ids():
    loop = Loop(make("lexical"), stream())
    loop.clock.read(3, 20, None, None, torch.device("cpu"))
    loop.layer.expecting = True
    part = [tensor[:, :, :20] for tensor in (loop.data.query, loop.data.key, loop.data.value)]
    loop.layer.update(*part[1:])
    with pytest.raises(GateError, match="inputs_embeds"):
        loop.layer.attend(*part, None, loop.data.attention)


# --- golden ---


def golden_trace(data: Stream, slack: int) -> Trace:
    block = max(slack, 1)
    shape = (len(data.pads), 2, data.length, -(-data.length // block))
    labels = [torch.rand(shape, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYER + 1)]
    guard = Guard(SINKS, RECENT)
    return roll(labels, budget=BUDGET, block=block, guard=guard, valid=data.mask.bool(), prompt_length=0)


def golden(trace: Trace, **options: object):
    return methods.golden.policy(BUDGET, trace=trace, sinks=SINKS, recent=RECENT, **options)


@pytest.mark.parametrize("slack", EVENTS.values(), ids=EVENTS)
def test_golden_follows_its_trace(slack):
    data = stream()
    trace = golden_trace(data, slack)
    found = Loop(golden(trace, text=data.tokens), data).run(prompt=37)
    assert torch.equal(found, trace.expiry[LAYER])


def left_at(trace: Trace, data: Stream, columns: list[int], slack: int) -> torch.Tensor:
    """Brute force: the trace's events before a row's column, then recency."""
    out = torch.full_like(trace.expiry[LAYER], NEVER)
    for index, (pad, column) in enumerate(zip(data.pads, columns, strict=True)):
        ends = trace.expiry[LAYER, index, :, pad:]

        def score(at, head, ends=ends, column=column, pad=pad):
            told = at.now + pad < column
            return {j: float(ends[head, j]) - pad if told else float(j) for j in at.held[head]}

        own = brute.history(data.row(index), 0, brute.Rule(BUDGET, SINKS, RECENT, slack), score)
        out[index, :, pad:] = torch.where(own == NEVER, own, own + pad)
    return out


@pytest.mark.parametrize("slack", EVENTS.values(), ids=EVENTS)
def test_golden_turns_to_recency_where_the_text_diverges(slack):
    data = stream()
    trace = golden_trace(data, slack)
    columns = [44, 61, 39]
    other = data.tokens.clone()
    other[0, 44] += 1
    other[2, 39] += 1
    by_text = Loop(golden(trace, text=other), data).run(prompt=37)
    by_column = Loop(golden(trace, divergence=columns), data).run(prompt=37)
    assert torch.equal(by_text, left_at(trace, data, columns, slack))
    assert torch.equal(by_column, by_text)


def test_golden_turns_to_recency_past_its_trace():
    data = stream()
    long = golden_trace(data, 5)
    short = replace(long, expiry=long.expiry[..., :50].clone())
    found = Loop(golden(short, text=data.tokens[:, :50]), data).run(prompt=37)
    assert torch.equal(found, left_at(long, data, [50] * 3, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"slack": 8}, "period 5, not 8"), ({"schedule": "prefill_end"}, "blocks")],
)
def test_golden_refuses_another_grid(options, message):
    with pytest.raises(TraceError, match=message):
        golden(golden_trace(stream(), 5), **options)


def test_golden_refuses_another_budget_and_batch():
    trace = golden_trace(stream(), 5)
    for budget in (BUDGET + 1, "50%"):
        with pytest.raises(TraceError, match="budget 20, not"):
            methods.golden.policy(budget, trace=trace)
    with pytest.raises(TraceError, match="2 rows"):
        Loop(golden(trace), stream(pads=(0, 0))).run(prompt=37)


# --- what the formulas imply ---


class Copied:
    """Slots of plain tensors, so that a test can shuffle them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    @property
    def room(self) -> int:
        return self.keys.shape[2]

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        return query @ self.keys.mT

    def chunks(self):
        for start in range(0, self.keys.shape[2], 5):
            part = slice(start, start + 5)
            yield part, self.keys[:, :, part], self.values[:, :, part]


class Watched:
    """A policy that keeps a copy of the last signals it decided on."""

    def __init__(self, policy) -> None:
        self.policy = policy
        self.seen: Signals | None = None

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def keep(self, signals: Signals):
        keys, values = (torch.zeros(*signals.position.shape, signals.query.shape[-1]) for _ in range(2))
        for part, key, value in signals.slots.chunks():
            keys[:, :, part], values[:, :, part] = key, value
        copies = {name: column.clone() for name, column in signals.state.items()}
        ring = None if signals.ring is None else tuple(part.clone() for part in signals.ring)
        slots = Copied(keys, values, signals.position.clone())
        self.seen = Signals(**{**vars(signals), "slots": slots, "state": copies, "ring": ring, "memo": {}})
        return self.policy.keep(signals)


def watch(case: str, data: Stream | None = None, prompt: int = 37) -> tuple[object, Signals]:
    """A policy, and what it saw at its last event."""
    watched = Watched(make(case, slack=5))
    Loop(governor(watched), data or stream()).run(prompt=prompt)
    assert watched.seen is not None
    return watched.policy, watched.seen


def shuffled(signals: Signals, order: torch.Tensor) -> Signals:
    def moved(part: torch.Tensor) -> torch.Tensor:
        index = order.view(*order.shape, *[1] * (part.ndim - 3)).expand(*order.shape, *part.shape[3:])
        return part.gather(2, index)

    slots = Copied(*(moved(part) for part in (signals.slots.keys, signals.slots.values, signals.position)))
    ledger = {name: moved(column) for name, column in signals.state.items()}
    return Signals(**{**vars(signals), "slots": slots, "state": ledger, "memo": {}})


@pytest.mark.parametrize("case", CASES)
def test_storage_order_means_nothing(case):
    """Shuffling the slots of every head, empty ones too, shuffles the scores."""
    policy, signals = watch(case)
    order = torch.rand(signals.position.shape, generator=torch.Generator().manual_seed(2)).argsort(-1)
    straight = policy.scorer.score(signals).masked_fill(~signals.occupied, 0.0)
    again = shuffled(signals, order)
    crooked = policy.scorer.score(again).masked_fill(~again.occupied, 0.0)
    assert straight.dtype == torch.float32
    close(crooked, straight.gather(-1, order))


@pytest.mark.parametrize("case", CASES)
def test_empty_slots_influence_nothing(case):
    """Whatever lies in an empty slot, the scores of the others stay."""
    policy, signals = watch(case)
    empty = ~signals.occupied
    assert empty.any()
    before = policy.scorer.score(signals)
    rubbish = empty.unsqueeze(-1) * torch.randn(signals.slots.keys.shape, generator=torch.Generator().manual_seed(4))
    slots = Copied(signals.slots.keys + 50 * rubbish, signals.slots.values - 50 * rubbish, signals.position)
    after = policy.scorer.score(Signals(**{**vars(signals), "slots": slots, "memo": {}}))
    close(after[~empty], before[~empty])


def test_rkv_with_lambda_1_is_window_attention():
    _, signals = watch("rkv")
    attention = WindowAttention(4, "candidates", "logit_max", "mean")
    mixed = methods.rkv.ImportantAndNew(mix=1.0, window=4).score(signals)
    assert torch.equal(mixed[signals.occupied], attention.score(signals)[signals.occupied])


def test_redundancy_sums_to_one_and_rows_do_not_meet():
    _, signals = watch("rkv")
    together = redundancy(signals)
    close(together.sum(-1), torch.ones(3, 2))
    for row in range(3):
        one = slice(row, row + 1)
        slots = Copied(signals.slots.keys[one], signals.slots.values[one], signals.position[one])
        alone = redundancy(Signals(**{**vars(signals), "slots": slots, "memo": {}}))
        close(alone, together[one])


@pytest.mark.parametrize(
    ("budget", "layers", "floor", "beta"), [(64, 7, 20, 20), (65, 2, 9, 8), (40, 5, 40, 20), (9, 1, 4, 2)]
)
def test_pyramid_spends_exactly_the_budget(budget, layers, floor, beta):
    shares = [Pyramid(beta).layer_budget(budget, rank, layers, floor) for rank in range(layers)]
    assert sum(shares) == layers * budget
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= floor
    base = budget - floor
    if layers > 1:
        assert abs(shares[-1] - floor - base / beta) < 1
        assert abs(shares[0] - floor - (2 * base - base / beta)) < 1


def test_pyramid_with_beta_1_is_uniform():
    assert [Pyramid(1).layer_budget(33, rank, 4, 10) for rank in range(4)] == [33] * 4


def random_scores(seed: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, 12, generator=generator)
    scores = (4 * scores).floor() if ties else scores
    empty = torch.rand(2, 3, 12, generator=generator) < 0.2
    protected = (torch.rand(2, 3, 12, generator=generator) < 0.3) & ~empty
    return scores.masked_fill(empty, -torch.inf).masked_fill(protected, torch.inf), protected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.37, 1.0])
def test_ada_counts(alpha, ties):
    """Exact sum, protected slots kept, the flat top at 0, equal at 1, and all as the loops say; heads that are short
    included."""
    for seed in range(12):
        scores, protected = random_scores(seed, ties)
        occupied = scores > -torch.inf
        budget = torch.tensor([5 + seed % 7, 9])
        counts = Ada(alpha).counts(scores, protected, budget.int())
        for row in range(2):
            kept = protected[row].sum(-1).tolist()
            rooms = [scores[row, h][occupied[row, h] & ~protected[row, h]].tolist() for h in range(3)]
            assert counts[row].tolist() == brute.split(rooms, kept, int(budget[row]), alpha)
            total = min(3 * int(budget[row]), int(occupied[row].sum()))
            assert int(counts[row].sum()) == max(total, sum(kept))
            assert (counts[row] >= protected[row].sum(-1)).all()
        order = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        assert torch.equal(
            Ada(alpha).counts(scores.gather(-1, order), protected.gather(-1, order), budget.int()), counts
        )


def test_ada_with_alpha_1_is_uniform():
    data = stream()
    ragged = Loop(make("adakv", alpha=1.0, slack=5), data).run(prompt=37)
    scorer = WindowAttention(3, group="prob_mean", reduce="mean")
    uniform = replace(make("snapkv-paper", slack=5), scorer=scorer)
    assert torch.equal(ragged, Loop(uniform, data).run(prompt=37))


def test_expected_attention_is_what_gaussian_queries_pay():
    """The closed form against 200,000 queries drawn from the statistics of the loops."""
    _, signals = watch("expected_attention")
    data, row, head = stream(), 1, 1
    pad, now = data.pads[row], int(signals.rows.now[row])
    own = data.row(row)
    at = brute.Moment(
        own.query[0].double(), own.key[0].double(), own.value[0].double(), data.attention.scaling,
        tuple(data.attention.frequencies.double().tolist()), [], [[], []], [{}, {}], now - pad,
    )  # fmt: skip
    logits = methods.expected_attention.ExpectedAttention(12, 20).logits(signals)[row, head]
    places = signals.position[row, head]
    generator = torch.Generator().manual_seed(0)
    for member in range(2):
        mean, covariance = brute.query_statistics(at, 2 * head + member, 12, 20)
        spread = torch.linalg.eigh(covariance)
        noise = torch.randn(200_000, 8, generator=generator, dtype=torch.float64)
        drawn = mean + noise * spread.eigenvalues.clamp_min(0).sqrt() @ spread.eigenvectors.T
        for slot in places.ge(0).nonzero().flatten()[::5].tolist():
            products = data.attention.scaling * drawn @ own.key[0, head, int(places[slot]) - pad].double()
            assert float(products.exp().mean().log()) == pytest.approx(float(logits[member, slot]), abs=0.05)


@pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "smollm3", "exaone4", "cohere2", "olmo3"])
def test_expected_attention_undoes_the_rotation_of_a_real_model(name):
    """Queries of a model, with their rotation undone by the frequencies that hooks hand over, are those before RoPE."""
    from learnevict import attach
    from tests.laws import zoo

    model = zoo.build(name)
    ids = zoo.tokens(model, 2, 24)
    watched = Watched(methods.expected_attention.policy(16, window=6, future=9, sinks=2, recent=3, slack=4))
    plain: list[torch.Tensor] = []
    attention = model.get_decoder().layers[-1].self_attn
    last = getattr(attention, "q_norm", attention.q_proj)
    handle = last.register_forward_hook(lambda module, args, out, plain=plain: plain.append(out))
    with torch.no_grad(), attach(model, watched) as cache:
        model(input_ids=ids, past_key_values=cache)
    handle.remove()
    signals = watched.seen
    assert signals is not None
    frequencies = tuple(signals.attention.frequencies.double().tolist())
    queries, where = signals.ring
    before = plain[-1] if plain[-1].shape[1] == 24 else plain[-1].transpose(1, 2)  # Gemma3: heads first
    before = before.reshape(2, 24, -1, queries.shape[-1])
    for slot, column in enumerate(where[0].tolist()):
        turned = queries[0, :, slot].double() @ brute.rotation(frequencies, column)
        close(turned.float(), before[0, column])


def test_expected_attention_says_when_a_model_has_no_rotation():
    data = stream()
    bare = replace(data, attention=replace(data.attention, frequencies=None))
    with pytest.raises(LearnevictError, match="rotary"):
        Loop(make("expected_attention"), bare).run(prompt=37)
