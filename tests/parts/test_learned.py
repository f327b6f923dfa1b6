"""Surrogates and rankers against their formulas, written anew in float64: the whole eviction history of a padded batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor

from learnevict import Gates, attach, methods
from learnevict.errors import GateError, UsageError
from learnevict.infer.teacher_forcing import replay
from learnevict.oracle import Received
from learnevict.signals import NEVER
from tests.closeness import close
from tests.laws import zoo
from tests.laws.cases import random_gates
from tests.laws.naive import masked_logits, position_ids
from tests.laws.run import batch, pieces, read

BUDGET, SLACK, SINKS, RECENT = 18, 4, 2, 3
PADS, LENGTH, PROMPT = (0, 6), 44, 31
TERMS = {"slack": SLACK, "sinks": SINKS, "recent": RECENT}


@dataclass
class Head:
    """One kv head of one row, unpadded and in float64."""

    gate: object
    layer: int
    head: int
    key: Tensor
    value: Tensor
    hidden: Tensor

    def part(self, name: str) -> Tensor:
        """A parameter of this layer."""
        return dict(self.gate.named_parameters())[name][self.layer].detach().double()

    @cached_property
    def states(self) -> list[Tensor]:
        """Of the recurrence, one per token."""
        return recurrent(self)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The score network of this head."""
        whole = self.gate.network.state_dict()
        return {name: part[self.layer, self.head].double() for name, part in whole.items() if part.ndim > 1}

    def network(self, inputs: dict[str, Tensor]) -> float:
        """Its score."""
        own = self.weights
        joined = torch.cat([(x - own[f"mean_{n}"][0]) / own[f"scale_{n}"][0] for n, x in inputs.items()])
        first = torch.cat([own[f"weight_{name}"] for name in inputs])
        x = gelu(joined @ first + own["bias_in"][0])
        return float(gelu(x @ own["weight_mid"] + own["bias_mid"][0]) @ own["weight_out"])


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def kvzap(at: Head, i: int, now: int) -> float:
    x = gelu(at.hidden[i] @ at.part("weight_in") + at.part("bias_in"))
    return float((x @ at.part("weight") + at.part("bias"))[at.head])


def kvzap_linear(at: Head, i: int, now: int) -> float:
    return float((at.hidden[i] @ at.part("weight") + at.part("bias"))[at.head])


def fast_kvzip(at: Head, i: int, now: int) -> float:
    """Token i and 16 sinks share a softmax, one for each of the head's two queries; regression 7: the bias counts once."""

    def normed(x: Tensor, weight: str) -> list[float]:
        size = math.sqrt(float((x * x).mean()) + 1e-6)
        return [float(a) / size * float(w) for a, w in zip(x, at.part(weight), strict=True)]

    queries = (at.hidden[i] @ at.part("weight_query") + at.part("bias_query")).view(2, 2, 16)[at.head]
    key = normed((at.hidden[i] @ at.part("weight_key")).view(2, 16)[at.head], "norm_key")
    total = 0.0
    for g in range(2):
        query = normed(queries[g], "norm_query")
        own = sum(a * b for a, b in zip(query, key, strict=True)) / 4 + float(at.part("bias")[at.head, g])
        rivals = [
            sum(a * b for a, b in zip(query, sink, strict=True)) / 4 for sink in at.part("sinks")[at.head].tolist()
        ]
        total += math.exp(own) / (math.exp(own) + sum(map(math.exp, rivals)))
    return total / 2


def kvp(at: Head, i: int, now: int) -> float:
    place = torch.tensor([math.log1p(i), math.log1p(now - i)]).double()
    return at.network({"key": at.key[i], "value": at.value[i], "place": place})


def kvpop(at: Head, i: int, now: int) -> float:
    clock = torch.tensor([math.log1p(now - i), math.log(min(1.0, BUDGET / (now + 1)))]).double()
    then, now_ = at.states[i], at.states[now]
    inputs = {"key": at.key[i], "value": at.value[i], "then": then, "now": now_, "clock": clock}
    return at.network(inputs)


def recurrent(at: Head) -> list[Tensor]:
    """States of a GRU from its equations, one per token, in one pass over the row."""
    cell = {name: part.detach().double() for name, part in at.gate.cells[at.layer].named_parameters()}
    size = cell["weight_hh_l0"].shape[1]
    state, states = torch.zeros(size, dtype=torch.float64), []
    for h in at.hidden:
        a = (cell["weight_ih_l0"] @ h + cell["bias_ih_l0"]).view(3, size)
        b = (cell["weight_hh_l0"] @ state + cell["bias_hh_l0"]).view(3, size)
        reset, update = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
        state = (1 - update) * torch.tanh(a[2] + reset * b[2]) + update * state
        states.append(state)
    return states


FORMULAS: dict[str, Callable[[Head, int, int], float]] = {
    "kvzap": kvzap, "kvzap linear": kvzap_linear, "fast_kvzip": fast_kvzip, "kvp": kvp, "kvpop": kvpop,
}  # fmt: skip


def gates(case: str, model_name: str = "qwen3") -> Gates:
    if case != "kvzap linear":
        return random_gates(case, model_name)
    made = Gates.make("kvzap", zoo.build(model_name), kind="linear")
    with torch.no_grad():
        made.gate.weight.normal_(generator=torch.Generator().manual_seed(3))
        made.gate.bias.normal_(generator=torch.Generator().manual_seed(4))
    return made


def history(score: Callable[[int, int], float], length: int) -> list[int]:
    """Expiries of one head: after every block the lowest go until the budget is met."""
    held, expiry = [], [NEVER] * length
    for now in range(length):
        held.append(now)
        if (now + 1) % SLACK or len(held) <= BUDGET:
            continue
        free = [i for i in held if SINKS <= i <= now - max(RECENT, SLACK)]
        for i in sorted(free, key=lambda i: (score(i, now), i))[: len(held) - BUDGET]:
            held.remove(i)
            expiry[i] = now + 1
    return expiry


@pytest.mark.parametrize("case", FORMULAS)
def test_history_is_that_of_the_formulas(case):
    """Row by row (regression 9), the prompt in one forward and then token by token."""
    model, gate = zoo.build("qwen3"), deepcopy(gates(case).gate).eval()
    if hasattr(gate, "network"):  # as after calibration
        for name, buffer in gate.network.named_buffers():
            if name.startswith("scale"):
                buffer.fill_(1.7)
            elif name.startswith("mean"):
                buffer.fill_(-0.3)
    ids, mask = batch(zoo.distinct_tokens(model, 2, LENGTH), PADS)
    policy = methods.load(case.partition(" ")[0]).policy(BUDGET, gate=gate, **TERMS)
    run = read(model, policy, ids, mask, pieces(PROMPT, LENGTH))
    seen: dict[int, Received] = {}
    with torch.no_grad():  # states of a layer depend on what was evicted below it: those of the run itself
        replay(model, ids, run.trace, mask, observe=lambda layer, one: seen.update({layer: one}))
    for layer, one in seen.items():
        for row, pad in enumerate(PADS):
            for head in range(2):
                parts = (one.key[row, head, pad:], one.value[row, head, pad:], one.hidden[row, pad:])
                at = Head(gate, layer, head, *(part.double() for part in parts))
                want = history(lambda i, now, at=at: FORMULAS[case](at, i, now), LENGTH - pad)
                found = run.trace.expiry[layer, row, head, pad:]
                assert torch.where(found == NEVER, NEVER, found - pad).tolist() == want
    assert run.evictions == 2 * 2 * sum((LENGTH - pad) // SLACK * SLACK - BUDGET for pad in PADS)


def states_of(cache, layer: int, row: int) -> dict[int, Tensor]:
    """State column by position, of the first head."""
    store = cache.layers[layer].store
    held = store.position[row, 0].tolist()
    return {p: store.state.columns["state"][row, 0, n] for n, p in enumerate(held) if p >= 0}


CUTS = {"at once": [44], "prompt and steps": [31, *[1] * 13], "pieces": [10, 9, 25], "steps": [1] * 44}


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_states_go_on_over_blocks_steps_and_requests(sizes):
    """However a text is cut into forwards, the states are those of one pass over its row."""
    model, gate = zoo.build("qwen3"), gates("kvpop").gate.eval()
    ids, mask = batch(zoo.tokens(model, 2, LENGTH), PADS)
    run = read(model, methods.kvpop.policy(4 * LENGTH, gate=gate, **TERMS), ids, mask, sizes)
    seen: dict[int, Received] = {}
    with torch.no_grad():
        replay(model, ids, run.trace, mask, observe=lambda layer, one: seen.update({layer: one}))
    for layer, one in seen.items():
        for row, pad in enumerate(PADS):
            want = recurrent(Head(gate, layer, 0, *[one.key[row, 0]] * 2, one.hidden[row, pad:].double()))
            found = states_of(run.cache, layer, row)
            assert sorted(found) == list(range(pad, LENGTH))
            for position, state in found.items():
                close(state.double(), want[position - pad])


def test_states_belong_to_their_request():
    """Regression 8: a second text through the same gate and model starts from nothing."""
    model, gate = zoo.build("qwen3"), gates("kvpop").gate.eval()
    texts = [zoo.tokens(model, 1, 20, seed) for seed in (0, 1)]
    found = []
    with attach(model):
        for ids in (texts[1], texts[0], texts[1]):
            with torch.no_grad(), attach(model, methods.kvpop.policy(80, gate=gate, **TERMS)) as cache:
                model(ids, position_ids=position_ids(torch.ones_like(ids)), past_key_values=cache)
            found.append(states_of(cache, 1, 0))
    assert all(torch.equal(found[0][p], found[2][p]) for p in found[0])
    assert not torch.allclose(found[0][19], found[1][19])


def test_estimates_of_fast_kvzip_are_shares():
    """In (0, 1), comparable between heads; without sinks a plain sigmoid."""
    model = zoo.build("qwen3")
    gate = gates("fast_kvzip").gate.eval()
    ids, mask = batch(zoo.tokens(model, 2, LENGTH), PADS)
    policy = methods.fast_kvzip.policy(4 * LENGTH, gate=gate, **TERMS)
    store = read(model, policy, ids, mask, [LENGTH]).cache.layers[0].store
    share = store.state.columns["estimate"][store.position >= 0]
    assert 0 < float(share.min()) < float(share.max()) < 1
    plain = Gates.make("fast_kvzip", model, num_sinks=0)
    with torch.no_grad():
        plain.gate.bias.fill_(30.0)
    store = read(model, plain.policy(4 * LENGTH, **TERMS), ids, mask, [LENGTH]).cache.layers[0].store
    assert float(store.state.columns["estimate"][store.position >= 0].min()) > 0.99


@pytest.mark.parametrize(
    ("method", "allocation"), [("kvzap", "equal"), ("fast_kvzip", "equal"), ("fast_kvzip", "pooled")]
)
def test_a_threshold_is_a_cap_under_the_budget(method, allocation):
    """What is below goes once a budget is full, whoever it is of; what is protected stays; and eviction equals masking."""
    model, gate = zoo.build("qwen3"), gates(method).gate.eval()
    ids, mask = batch(zoo.distinct_tokens(model, 2, LENGTH), PADS)
    options = {**TERMS, "allocation": allocation}
    policy = methods.load(method).policy
    plain = read(model, policy(BUDGET, gate=gate, **options), ids, mask)
    store = plain.cache.layers[0].store
    middle = float(store.state.columns["estimate"][store.position >= 0].median())
    run = read(model, policy(BUDGET, gate=gate, threshold=middle, **options), ids, mask)
    close(run.logits, masked_logits(model, ids, mask, run.trace.expiry), 1e-4, mask)
    assert run.evictions > plain.evictions
    first = run.trace.expiry[0][:, 0].amin(-1).tolist()
    assert all(expiry - pad > BUDGET for expiry, pad in zip(first, PADS, strict=True)), "before a budget was full"
    total = 0
    for layer in range(2):
        store = run.cache.layers[layer].store
        held = store.position >= 0
        total += int(held.sum())
        started = torch.tensor(PADS).view(-1, 1, 1)
        last = LENGTH - 1 - (LENGTH - 1 - started) % SLACK - SLACK  # those of the last event and after it
        free = held & (store.position >= started + SINKS) & (store.position < last - RECENT)
        assert (store.state.columns["estimate"][free] >= middle).all()
        guarded = (store.position >= started) & (store.position < started + SINKS)
        assert (guarded.sum(-1) == SINKS).all()
    assert total < sum(int((plain.cache.positions(layer) >= 0).sum()) for layer in range(2))
    same = read(model, policy(BUDGET, gate=gate, threshold=-1e30, **options), ids, mask)
    assert torch.equal(same.trace.expiry, plain.trace.expiry)
    with pytest.raises(UsageError, match="a threshold of nan"):
        policy(BUDGET, gate=gate, threshold=math.nan, **options)


def test_errors_teach():
    model = zoo.build("qwen3")
    with pytest.raises(UsageError, match="'mlp' or 'linear'"):
        Gates.make("kvzap", model, kind="deep")
    with pytest.raises(UsageError, match="lets heads compete"):
        methods.fast_kvzip.policy(64, gate=gates("fast_kvzip").gate, slack=4, scope="model")
    from tests.event_loop import Loop, stream

    for name in ("kvzap", "fast_kvzip", "kvpop"):
        with pytest.raises(GateError, match="hidden states"):
            Loop(methods.load(name).policy(64, gate=gates(name).gate, slack=4), stream()).read(20)
