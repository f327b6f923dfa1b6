"""Admission gates (WG-KV, DMS) against formulas written anew: inputs, per-slot state, histories, noise, clamps, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learnevict import Gates, methods
from learnevict.errors import BudgetError, GateError, ModelError
from learnevict.infer.model.supported import layout_of
from learnevict.infer.soft import Sequence
from learnevict.methods.dms import SparsityGate
from learnevict.methods.wg_kv import WriteGate
from learnevict.parts.soft_gates import logistic
from learnevict.signals import NEVER, Attention, Rows, Signals
from tests.closeness import close
from tests.event_loop import Loop, stream
from tests.laws import zoo
from tests.laws.run import PADS, Run, batch, read

BUDGET, SLACK, SINKS, RECENT, LENGTH = 20, 4, 2, 7, 49


def gate_for(method: str, model, **settings):
    torch.manual_seed(4)
    gate = methods.load(method).build(layout_of(model.config), window=RECENT, **settings).eval()
    with torch.no_grad():
        for weights in gate.parameters():
            weights += 0.5 * torch.randn_like(weights)
    return gate


def run(method: str, model, gate) -> Run:
    """With the gate's own window as the recent one."""
    ids, mask = batch(zoo.distinct_tokens(model, len(PADS), LENGTH))
    return read(model, methods.load(method).policy(BUDGET, gate=gate, slack=SLACK, sinks=SINKS), ids, mask)


def first_layer(model, ids: Tensor) -> Tensor:
    """Inputs of the first attention module, float64 [B, T, E]."""
    return model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).double()


def marks(model, gate: SparsityGate, ids: Tensor) -> Tensor:
    alpha = torch.sigmoid(first_layer(model, ids) @ gate.weight[0].detach().double() + gate.bias[0].detach().double())
    return torch.log1p(-alpha).transpose(1, 2)


def writes(model, gate: WriteGate, ids: Tensor) -> Tensor:
    """From keys before RoPE as the model makes them, and rotated here by angles of position in the row."""
    weights = {name: part.detach().double() for name, part in gate.named_parameters()}
    key = (first_layer(model, ids) @ model.model.layers[0].self_attn.k_proj.weight.double().T).unflatten(-1, (2, -1))
    out = torch.empty(*ids.shape, 2, dtype=torch.double)
    frequency = model.model.rotary_emb.inv_freq.double()
    half = len(frequency)
    for row, pad in enumerate(PADS):
        for t in range(pad, LENGTH):
            turn = torch.polar(torch.ones(half, dtype=torch.double), (t - pad) * frequency)
            for head in range(2):
                before = key[row, t, head]
                turned = torch.complex(before[:half], before[half:]) * turn
                after = torch.cat([turned.real, turned.imag])
                x, y = (
                    part / (part.square().mean() + torch.finfo(torch.float32).eps).sqrt() for part in (before, after)
                )
                z = x @ weights["weight_before"][0, head] + y @ weights["weight_after"][0, head]
                z = torch.nn.functional.gelu(z + weights["bias_in"][0, head, 0])
                out[row, t, head] = (z @ weights["weight_out"][0, head] + weights["bias_out"][0, head, 0]).squeeze()
    return -torch.log1p(torch.exp(-out)).permute(0, 2, 1)


def expected_expiry(state: Tensor, pad: int) -> list[int]:
    """One head of one row, token by token; scores never change."""
    held, expiry = [], [NEVER] * LENGTH
    for t in range(pad, LENGTH):
        held.append(t)
        if (t - pad + 1) % SLACK or len(held) <= BUDGET:
            continue
        free = sorted((i for i in held if pad + SINKS <= i <= t - RECENT), key=lambda i: (float(state[i]), i))
        for i in free[: len(held) - BUDGET]:
            expiry[i] = t + 1
            held.remove(i)
    return expiry


@pytest.mark.parametrize(("method", "state"), [("dms", marks), ("wg_kv", writes)])
def test_the_first_layers_history_is_that_of_the_formulas(method, state):
    model = zoo.build("llama")
    gate = gate_for(method, model)
    done = run(method, model, gate)
    expected = state(model, gate, done.ids)
    store = done.cache.layers[0].store
    held = store.position >= 0
    seen = expected.gather(-1, store.position.clamp_min(0).long())[held]
    close(store.state.columns["admission"][held].double(), seen)
    for head in range(2):
        for row, pad in enumerate(PADS):
            assert done.trace.expiry[0, row, head].tolist()[pad:] == expected_expiry(expected[row, head], pad)[pad:]


def test_the_window_is_the_recent_window_unless_told_otherwise():
    gate = SparsityGate(layout_of(zoo.build("llama").config), window=11)
    assert methods.dms.policy(64, gate=gate, slack=4).guard.recent == 11
    assert methods.dms.policy(64, gate=gate, slack=4, recent=3).guard.recent == 3
    with pytest.raises(BudgetError, match="261"):  # the papers' window alone holds 256
        methods.wg_kv.policy(64, gate=WriteGate(layout_of(zoo.build("llama").config)), slack=4)


def signals_of(model, seed: int = 0) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 30, model.config.hidden_size, generator=generator)
    position = torch.arange(30).int().expand(2, -1)
    states = torch.randn(2, 2, 30, 8, generator=generator)
    ends = torch.full((2,), 29, dtype=torch.int32)
    return Signals(
        layer=0,
        slots=Sequence(states, states, position[:, None].expand(-1, 2, -1)),
        rows=Rows(0 * ends, ends, ends + 1, ends, ends),
        budget=ends,
        state={},
        query=states,
        query_position=position,
        attention=Attention(1.0),
        key=states,
        value=states,
        hidden=hidden,
    )


def test_noise_is_for_training_only_and_seeded():
    model = zoo.build("llama")
    gate, signals = gate_for("dms", model), signals_of(model)
    with torch.no_grad():
        quiet = gate.write(signals)["admission"]
        assert torch.equal(quiet, gate.eval().write(signals)["admission"])
        gate.train()
        torch.manual_seed(1)
        noisy = gate.write(signals)["admission"]
        torch.manual_seed(1)
        assert torch.equal(noisy, gate.write(signals)["admission"])
        assert (noisy != quiet).all()
        assert (noisy.mT != gate.write(signals)["admission"].mT).any()


@pytest.mark.parametrize("random_keys", [None, torch.arange(2)])
def test_the_noise_is_logistic(random_keys):
    torch.manual_seed(0)
    place = torch.arange(20_000).expand(2, -1)
    signals = replace(signals_of(zoo.build("llama")), query_position=place)
    drawn = logistic(torch.empty(2, 5, 20_000), signals, random_keys)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(drawn.std()) == pytest.approx(math.pi / 3**0.5, rel=0.01)
    assert float((drawn < 1).float().mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=5e-3)
    assert torch.corrcoef(drawn.flatten(0, 1)).triu(1).abs().max() < 0.05, "heads or rows draw alike"


def test_noise_is_the_tokens_own_whatever_the_batch():
    """Another row beside it, or padding before it, changes nothing; another layer does."""
    one = signals_of(zoo.build("llama"))
    rows, place, logits, random_keys = one.rows, one.query_position, torch.empty(2, 3, 30), torch.arange(2) + 40
    drawn = logistic(logits, one, random_keys)
    moved = replace(one, rows=replace(rows, first=rows.first + 7), query_position=place + 7)
    assert torch.equal(drawn, logistic(logits, moved, random_keys))
    alone = replace(one, rows=replace(rows, first=rows.first[1:]), query_position=place[1:])
    assert torch.equal(drawn[1:], logistic(logits[1:], alone, random_keys[1:]))
    assert not torch.equal(drawn, logistic(logits, replace(one, layer=one.layer + 1), random_keys))


def test_only_wg_kv_is_clamped_and_only_in_training():
    """Below 0.001 a write gate weighs alike, but still ranks."""
    state = {"admission": torch.tensor([[[-20.0, -9.0, -0.5]]], requires_grad=True)}
    layout = layout_of(zoo.build("llama").config)
    decay = WriteGate(layout).decay_bias(state)
    assert decay.log_retention.tolist() == [[pytest.approx([math.log(1e-3), math.log(1e-3), -0.5])]]
    assert decay.window == 256
    assert SparsityGate(layout).decay_bias(state).log_retention is state["admission"]
    signals = replace(signals_of(zoo.build("llama")), state={"admission": state["admission"]})
    assert WriteGate(layout).score(signals) is state["admission"]


def test_a_fresh_gate_starts_near_full_attention():
    model = zoo.build("llama")
    layout = layout_of(model.config)
    signals = replace(signals_of(model), attention=Attention(1.0, frequencies=torch.ones(4)))
    with torch.no_grad():
        for gate in (SparsityGate(layout).eval(), WriteGate(layout)):
            assert (gate.write(signals)["admission"] > math.log(0.95)).all()


def test_what_admission_gates_refuse():
    model = zoo.build("llama")
    loop = Loop(methods.dms.policy(BUDGET, gate=gate_for("dms", model), slack=SLACK), stream())
    with pytest.raises(GateError, match="hidden states"):
        loop.read(10)
    with pytest.raises(ModelError, match="rotary"):
        WriteGate(layout_of(model.config)).write(signals_of(model))


@pytest.mark.parametrize(
    ("method", "settings"), [("wg_kv", {"window": 9, "hidden": 6}), ("dms", {"window": 9, "bias": -1.0})]
)
def test_settings_survive_a_round_trip(tmp_path, method, settings):
    model = zoo.build("llama")
    gates = Gates.make(method, model, **settings)
    gates.save_pretrained(tmp_path)
    again = Gates.load(tmp_path, model)
    assert again.gate.settings() == gates.gate.settings()
    assert settings.items() <= again.gate.settings().items()
    assert all(torch.equal(one, other) for one, other in zip(gates.parameters(), again.parameters(), strict=True))
