"""Retention gates against formulas written anew: state, whole eviction histories, DBTrimKV's sums, ties, round trips."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learnevict import Gates, attach, methods
from learnevict.errors import CacheError, GateError, TrainedOtherwiseWarning, UsageError
from learnevict.infer.model.supported import layout_of
from learnevict.infer.soft import Sequence
from learnevict.methods.dbtrimkv import DBTrimGate
from learnevict.methods.trimkv import TrimGate
from learnevict.parts.soft_gates import RetentionGate, log_geometric
from learnevict.signals import NEVER, Attention, Rows, Signals
from tests.closeness import SUMS, close
from tests.event_loop import Loop, stream
from tests.laws import zoo
from tests.laws.naive import masked_logits, position_ids
from tests.laws.run import PADS, Run, batch, read

BUDGET, SLACK, SINKS, RECENT, LENGTH = 20, 4, 2, 3, 49


def gate_for(model, kind: type[RetentionGate] = TrimGate, **settings) -> RetentionGate:
    torch.manual_seed(4)
    gate = kind(layout_of(model.config), **{"hidden": 8, "bias": 2.0} | settings).eval()
    with torch.no_grad():
        for weights in gate.parameters():
            weights += 0.5 * torch.randn_like(weights)
    return gate


def run(model, gate: RetentionGate, **options) -> Run:
    ids, mask = batch(zoo.distinct_tokens(model, len(PADS), LENGTH))
    policy = methods.trimkv.policy(BUDGET, gate=gate, slack=SLACK, sinks=SINKS, recent=RECENT, **options)
    return read(model, policy, ids, mask)


def retention_of_first_layer(model, gate: RetentionGate, ids: Tensor) -> Tensor:
    """float64 [B, H, T], from embeddings and weights; eviction cannot change what the first layer reads."""
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).double()
    weights = {name: part.detach().double() for name, part in gate.named_parameters()}
    gelu = torch.nn.functional.gelu
    x = gelu(hidden @ weights["weight_in"][0] + weights["bias_in"][0])
    if "weight_mid" in weights:
        x = gelu(x @ weights["weight_mid"][0] + weights["bias_mid"][0])
    z = x @ weights["weight_out"][0] + weights["bias_out"][0]
    return -torch.log1p(torch.exp(-z)).transpose(1, 2)


def expected_expiry(rates: Tensor, pad: int, score) -> list[int]:
    """One head of one row, token by token: expiries in columns of the padded text."""
    held, expiry = [], [NEVER] * LENGTH
    for t in range(pad, LENGTH):
        held.append(t)
        seen = t - pad + 1
        if seen % SLACK or len(held) <= BUDGET:
            continue
        free = [i for i in held if i >= pad + SINKS and i <= t - RECENT and i <= t - SLACK]
        free.sort(key=lambda i: (score(float(rates[i]), t, i), i))
        for i in free[: len(held) - BUDGET]:
            expiry[i] = t + 1
            held.remove(i)
    return expiry


def fading(rate: float, t: int, i: int) -> float:
    return (t + 1 - i) * rate


def still(rate: float, t: int, i: int) -> float:
    return rate


def summed(rate: float, t: int, i: int) -> float:
    return (t + 1 - i) * rate + math.log(sum(math.exp(n * rate) for n in range(128)))


@pytest.mark.parametrize(("kind", "score"), [(TrimGate, fading), (DBTrimGate, summed)])
def test_the_first_layers_history_is_that_of_the_formulas(kind, score):
    model = zoo.build("llama")
    gate = gate_for(model, kind)
    done = run(model, gate, allocation="equal")
    rates = retention_of_first_layer(model, gate, done.ids)
    aged = False
    for head in range(2):
        for row, pad in enumerate(PADS):
            expected = expected_expiry(rates[row, head], pad, score)
            assert done.trace.expiry[0, row, head].tolist()[pad:] == expected[pad:]
            aged |= expected != expected_expiry(rates[row, head], pad, still)
    assert aged, "it matters that retention ages"


def test_retentions_are_those_of_the_formulas_after_another_precision():
    model = zoo.build("llama")
    gate = gate_for(model)
    ids, mask = batch(zoo.distinct_tokens(model, len(PADS), LENGTH))
    for kind, rounding in ((torch.float32, SUMS), (torch.bfloat16, 5e-2)):
        coarse = gate_for(model).to(kind)
        policy = methods.trimkv.policy(BUDGET, gate=coarse, slack=SLACK)
        with torch.no_grad(), attach(model, policy, soft=True) as soft:
            model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
        found = soft.state[0]["retention"]
        assert found.dtype == torch.float32
        close(found, retention_of_first_layer(model, gate, ids), rounding)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_an_untrained_gate_ranks_by_what_it_says_and_then_by_age(kind):
    """Regression: at a bias of 18, log beta = -1.5e-8 underflows in half precision, and all tokens would tie."""
    model = zoo.build("llama")
    gate = gate_for(model, bias=18.0).to(kind)
    with torch.no_grad():
        gate.weight_out *= 1e-2
    done = run(model, gate)
    column = done.cache.layers[0].store.state.columns["retention"]
    assert column.dtype == torch.float32
    seen = column[done.cache.positions(0) >= 0]
    assert (seen < 0).all()
    assert len(seen.unique()) > len(seen) // 2
    with torch.no_grad():  # exact ties: of equal rates the older has faded more; of equal scores the older goes
        gate.weight_out.zero_()
        gate.bias_out.fill_(200.0)
    done = run(model, gate)
    for row, pad in enumerate(PADS):
        oldest = expected_expiry(torch.zeros(LENGTH), pad, still)
        assert done.trace.expiry[0, row, 0].tolist()[pad:] == oldest[pad:]


def test_the_score_is_the_sum_over_the_horizon():
    rates = torch.tensor([-1e-12, -1e-8, -1e-3, -0.1, -2.0, -50.0, -1e4, 0.0])
    for terms in (1, 7, 128):
        expected = [math.log(sum(math.exp(float(r) * n) for n in range(terms))) for r in rates]
        close(log_geometric(rates, terms), expected, scale=1.0)  # of a logarithm: in proportion to the sum


def test_db_trimkv_ranks_layers_together():
    """Layers hold what they win, in all no more than the budget; and eviction equals masking."""
    model = zoo.build("qwen3")
    gate = gate_for(model, DBTrimGate)
    done = run(model, gate, floor=0.1, horizon=16)
    expiry = done.trace.expiry
    close(done.logits, masked_logits(model, done.ids, done.mask, expiry), 1e-4, done.mask)
    held = torch.stack([(done.cache.positions(layer) >= 0).sum(-1) for layer in range(2)])  # [L, B, H]
    fresh = (LENGTH - torch.tensor(PADS)) % SLACK
    assert (held.float().mean((0, 2)) <= BUDGET + fresh).all()
    assert held.unique().numel() > 1
    uniform = run(model, gate, allocation="equal")
    assert (uniform.trace.expiry != expiry).any()


def test_the_sum_by_brute_force():
    gate = DBTrimGate(layout_of(zoo.build("llama").config))
    policy = methods.trimkv.policy(BUDGET, gate=gate, horizon=9, slack=SLACK)
    generator = torch.Generator().manual_seed(0)
    rate = -torch.rand(3, 2, 11, generator=generator).pow(4)
    position = torch.arange(11).int().expand(3, 2, -1)
    states = torch.zeros(3, 2, 11, 4)
    ends = torch.tensor([11, 19, 30], dtype=torch.int32)
    signals = Signals(
        layer=0,
        slots=Sequence(states, states, position),
        rows=Rows(0 * ends, ends, ends + 1, ends, ends),
        budget=ends,
        state={"retention": rate},
        query=states,
        query_position=position[:, 0],
        attention=Attention(1.0),
    )
    found = policy.scorer.score(signals)
    for row, head, slot in [(0, 0, 0), (1, 1, 5), (2, 0, 10)]:
        beta, age = math.exp(float(rate[row, head, slot])), int(ends[row]) - slot
        expected = math.log(sum(beta ** (age + step) for step in range(1, 10)))
        close(found[row, head, slot], expected, scale=max(1.0, abs(expected)))


def test_what_trimkv_refuses():
    gate = TrimGate(layout_of(zoo.build("llama").config))
    with pytest.raises(UsageError, match="lets heads compete"):
        methods.trimkv.policy(BUDGET, gate=gate, scope="model", slack=SLACK)
    with pytest.raises(UsageError, match="floor"):
        methods.trimkv.policy(BUDGET, gate=DBTrimGate(gate_layout()), floor=2.0, slack=SLACK)
    for horizon in (0, -3):
        with pytest.raises(UsageError, match="a horizon of at least 1"):
            methods.trimkv.policy(BUDGET, gate=DBTrimGate(gate_layout()), horizon=horizon, slack=SLACK)
    with pytest.warns(TrainedOtherwiseWarning, match="one of trimkv"):
        methods.dbtrimkv.policy(BUDGET, gate=gate, slack=SLACK)
    loop = Loop(methods.trimkv.policy(BUDGET, gate=gate, slack=SLACK), stream())
    with pytest.raises(GateError, match="hidden states"):
        loop.read(10)


def gate_layout():
    return layout_of(zoo.build("llama").config)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("worst", [math.nan, -math.inf, math.inf])
def test_a_score_that_is_no_number_is_told(scope, worst):
    """Regression: slots without a finite score passed for empty ones, and the cache was emptied without a word."""
    model = zoo.build("llama")
    gate = gate_for(model, DBTrimGate if scope == "model" else TrimGate)
    with torch.no_grad():
        gate.bias_out[0, 1] = math.nan if math.isnan(worst) else 0.0
    if not math.isnan(worst):
        gate.score = lambda signals: torch.full_like(signals.state["retention"], worst)
    policy = methods.trimkv.policy(BUDGET, gate=gate, slack=SLACK, sinks=SINKS, recent=RECENT)
    policy = policy if math.isnan(worst) else replace(policy, scorer=gate)
    ids, mask = batch(zoo.distinct_tokens(model, len(PADS), LENGTH))
    with pytest.raises(CacheError, match=r"trimkv scores \d+ slots of layer 0 with NaN or infinity"):
        read(model, policy, ids, mask)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("trimkv", {}),
        ("trimkv", {"tied": False, "shared_output": True}),  # settings that older gates have
        ("trimkv", {"hidden": 6, "bias": 5.0, "tied": True, "dropout": 0.0}),
        ("dbtrimkv", {"hidden": 6, "bias": 5.0, "dropout": 0.0}),
    ],
)
def test_settings_and_weights_survive_a_round_trip(tmp_path, method, settings):
    """Gates of dbtrimkv were once stored as a kind of trimkv: they still load, and are the same."""
    model = zoo.build("llama")
    gates = Gates.make(method, model, **settings)
    gates.save_pretrained(tmp_path)
    again = Gates.load(tmp_path, model)
    assert again.gate.settings() == gates.gate.settings()
    assert all(torch.equal(one, other) for one, other in zip(gates.parameters(), again.parameters(), strict=True))
    together = method == "dbtrimkv" or settings.get("tied", False)
    assert isinstance(again.gate, DBTrimGate if together else TrimGate)
    assert set(again.gate.losses) == {"divergence", "next_token", "hinge_together" if together else "hinge"}
    assert again.policy(BUDGET, slack=SLACK).scope == ("model" if together else "layer")
    if method == "trimkv":
        assert again.policy(BUDGET, slack=SLACK, allocation="equal").scope == "layer"
