"""Attention weighed by a gate: against eager float64, against replay, under checkpointing; and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from learnevict import Gates, attach, methods, replay
from learnevict.config import Budget
from learnevict.errors import CacheError, ModelError, UsageError
from learnevict.infer.attach import Attachment
from learnevict.infer.attention import RUN
from learnevict.infer.soft import layers_again, soft_attention
from learnevict.policy import DecayBias, Policy, Schedule, SoftGate
from learnevict.signals import NEVER, Attention, Signals, Trace
from tests.closeness import close
from tests.laws import zoo
from tests.laws.naive import position_ids, stock
from tests.laws.policies import hashed
from tests.laws.run import PADS, batch, read

LENGTH = 40
KINDS = {"plain": {}, "softcap": {"softcap": 2.0}, "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}}
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


class Table(SoftGate):
    """Rates given by hand, float32 [L, B, H, T]; `log_scale` gives it something to learn."""

    def __init__(self, rates: Tensor, window: int | None = None) -> None:
        super().__init__()
        self.rates, self.window_size = rates, window
        self.log_scale = nn.Parameter(torch.zeros(()))

    def write(self, signals: Signals) -> dict[str, Tensor]:
        assert signals.hidden is not None
        where = signals.query_position.clamp_min(0).long()[:, None].expand(-1, self.rates.shape[2], -1)
        return {"rate": self.rates[signals.layer].gather(-1, where) * self.log_scale.exp()}

    def score(self, signals: Signals) -> Tensor:
        raise AssertionError("nobody evicts here")

    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        return DecayBias(state["rate"], self.window_size)


def weighing(gate: SoftGate) -> Policy:
    return Policy(Budget(1), gate, schedule=Schedule(active=False))


def states(seed: int = 0, heads: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, rate, valid: three rows, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(3, 2 * heads, LENGTH, width, generator=generator)
    key, value = torch.randn(2, 3, heads, LENGTH, width, generator=generator).unbind(0)
    rate = -torch.rand(3, heads, LENGTH, generator=generator).square()
    return query, key, value, rate, torch.arange(LENGTH) >= torch.tensor(PADS).unsqueeze(-1)


def eager(query, key, value, rate, valid, attention: Attention, window: int | None = None) -> Tensor:
    """In float64, with repeated heads, [T, T] masks and the sink as one more column."""
    query, key, value, rate = (part.double() for part in (query, key, value, rate))
    key, value, rate = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value, rate))
    logits = query @ key.mT * attention.scaling
    if attention.softcap is not None:
        logits = attention.softcap * torch.tanh(logits / attention.softcap)
    age = (torch.arange(LENGTH).view(-1, 1) - torch.arange(LENGTH)).double()
    logits = logits + (age if window is None else (age >= window).double()) * rate.unsqueeze(2)
    hidden = (age < 0) | ~valid[:, None, None]
    logits = logits.masked_fill(hidden, torch.finfo(torch.double).min)
    if attention.sinks is not None:
        sink = attention.sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, sink], -1).softmax(-1)[..., :-1] @ value
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_eager_attention(kind, window):
    attention = Attention(8**-0.5, **KINDS[kind])
    valid = states()[-1]
    towards = torch.randn(3, 4, LENGTH, 8, generator=torch.Generator().manual_seed(9))
    towards = towards * valid[:, None, :, None]
    found, expected = [], []
    for gradients, double in ((found, False), (expected, True)):
        leaves = [part.clone().to(torch.double if double else torch.float).requires_grad_() for part in states()[:4]]
        if double:
            out = eager(*leaves, valid, attention, window)
        else:
            out = soft_attention(*leaves[:3], DecayBias(leaves[3], window), valid, attention, tile=7)
        (out * towards).sum().backward()
        gradients += [out.detach(), *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, expected, strict=True):
        mask = valid.view(3, 1, LENGTH, *[1] * (one.ndim - 3))
        close(one, other, where=mask.expand_as(one))


def test_the_gradient_of_rates_is_a_difference_quotient():
    attention = Attention(8**-0.5)
    query, key, value, rate, valid = states()
    rate = rate.double().requires_grad_()
    direction = torch.randn(rate.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))

    def loss(rates: Tensor) -> Tensor:
        return soft_attention(query, key, value, DecayBias(rates.float()), valid, attention).double().square().sum()

    (slope,) = torch.autograd.grad(loss(rate), rate)
    with torch.no_grad():
        step = 1e-3
        quotient = (loss(rate + step * direction) - loss(rate - step * direction)) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(float(quotient), rel=2e-3)


@pytest.mark.parametrize("tile", [1, 7, 40, 128])
def test_tiles_and_their_second_computation_change_nothing(tile):
    attention = Attention(8**-0.5)
    found = []
    for size, again in ((LENGTH, False), (tile, True)):
        query, key, value, rate, valid = states()
        rate.requires_grad_()
        out = soft_attention(query, key, value, DecayBias(rate), valid, attention, tile=size, again=again)
        out[valid[:, None].expand(out.shape[:3])].square().sum().backward()
        found.append((out.detach(), rate.grad))
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_what_is_kept_for_the_backward_pass_is_no_square():
    """Tensors saved by the forward: none as large as T times T for one head."""
    length, saved = 512, []
    query, key, value = torch.randn(3, 1, 2, length, 4).unbind(0)
    rate = -torch.rand(1, 2, length)
    valid = torch.ones(1, length, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda part: saved.append(part.numel()) or part, lambda part: part):
        soft_attention(query, key, value, DecayBias(rate.requires_grad_()), valid, Attention(0.5)).sum()
    assert max(saved, default=0) < length**2 // 8


def test_a_forgotten_token_with_a_negative_logit_has_no_weight():
    """Regression: a factor on the logit would bring -8 up to 0, and the token back into attention."""
    query, key = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    key[:, :, 0] *= -4  # logit -8 for the old token, 2 for the new one
    value = torch.tensor([[[[1.0], [0.0]]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    plain = soft_attention(query, key, value, DecayBias(torch.zeros(1, 1, 2)), valid, Attention(0.5))[0, 0, 1, 0]
    assert float(plain) == pytest.approx(1 / (1 + math.exp(10)), rel=1e-4)
    for rate in (-3.0, -1e4, -3e38):
        faded = soft_attention(query, key, value, DecayBias(torch.full((1, 1, 2), rate)), valid, Attention(0.5))[
            0, 0, 1, 0
        ]
        assert float(faded) == pytest.approx(1 / (1 + math.exp(10 - rate)) if rate > -100 else 0.0, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_rates_of_zero_are_the_stock_model(name):
    model = zoo.build(name)
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    gate = Table(torch.zeros(model.config.num_hidden_layers, 3, 2, LENGTH))
    with torch.no_grad(), attach(model, weighing(gate), soft=True):
        found = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
    close(found, stock(model, ids, mask), 1e-5, mask)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss"])
def test_hard_rates_are_the_replay_of_their_expiries(name):
    """Windowed rates of 0 or -1e9: token i is gone from query i + W on, or never."""
    model, window = zoo.build(name), 5
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    gone = torch.rand(model.config.num_hidden_layers, 3, 2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.6
    expiry = torch.where(gone, torch.arange(LENGTH) + window, NEVER).int()
    with torch.no_grad():
        with attach(model, weighing(Table(torch.where(gone, -1e9, 0.0), window)), soft=True) as soft:
            found = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
        expected = replay(model, ids, Trace(expiry, "made up"), mask).logits
    close(found, expected, 1e-5, mask)
    stays = [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or []]
    assert sorted(soft.state) == [index for index, stay in enumerate(stays or [False, False]) if not stay]


def test_padding_changes_nothing():
    """Rows of a padded batch, and each alone, with a gate that reads hidden states and keys."""
    model = zoo.build("qwen3")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    for name, options in (("trimkv", {"hidden": 8, "bias": 2.0}), ("wg_kv", {"hidden": 8, "window": 4})):
        gate = random_gate(name, model, **options)
        with torch.no_grad(), attach(model, weighing(gate), soft=True):
            whole = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
            for row, pad in enumerate(PADS):
                alone = model(ids[row : row + 1, pad:], use_cache=False).logits
                close(whole[row, pad:], alone[0], 1e-4)


def random_gate(method: str, model, **settings):
    from learnevict.infer.model.supported import layout_of

    torch.manual_seed(4)
    gate = methods.load(method).build(layout_of(model.config), **settings).eval()
    with torch.no_grad():
        for name, weights in gate.named_parameters():
            if "weight" in name:
                weights.normal_(std=0.3)
    return gate


@pytest.mark.parametrize("method", ["trimkv", "wg_kv", "dms"])
def test_a_gate_says_the_same_in_training_and_in_inference(method):
    """State of a text read at once, and those of an evicting cache that read it in blocks and steps."""
    model = zoo.build("gemma2")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    policy = methods.load(method).policy(LENGTH, gate=random_gate(method, model), slack=4, recent=3)
    with torch.no_grad():
        with attach(model, policy, soft=True) as soft:
            model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
        first = min(soft.state)  # later layers read what soft attention has changed
        store = read(model, policy, ids, mask).cache.layers[first].store
    (name,) = soft.state[first]
    at = store.position.clamp_min(0).long()
    assert (store.position >= 0).any()
    expected = soft.state[first][name].gather(-1, at)
    close(store.state.columns[name][store.position >= 0], expected[store.position >= 0])


def loss_of(model, gate: SoftGate, ids: Tensor, mask: Tensor, again: bool) -> list[Tensor]:
    """Gradients of the gate; the backward pass comes after the attachment has ended."""
    with attach(model, weighing(gate), soft=True) as soft:
        if again:
            with layers_again(model, lambda text: Attachment(model, None, text)):
                logits = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
        else:
            logits = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
        rates = sum(
            decay.log_retention[mask.bool()[:, None].expand_as(decay.log_retention)].sum()
            for decay in soft.decay_biases
        )
    loss = logits.log_softmax(-1)[mask.bool()][:, 5].mean() + 1e-3 * rates
    return list(torch.autograd.grad(loss, list(gate.parameters())))


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss"])
def test_layers_computed_again_give_the_same_gradients(name):
    model = zoo.build(name)
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    gate = random_gate("trimkv", model, hidden=8, bias=2.0, dropout=0.2).train()
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        found.append(loss_of(model, gate, ids, mask, again))
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        close(one, other)
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert RUN.get() is None


def test_only_the_gate_learns():
    model = zoo.build("qwen3")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    gate = random_gate("wg_kv", model, window=4)
    with attach(model, weighing(gate), soft=True):
        model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    assert all(weights.grad is not None for weights in gate.parameters())
    assert all(weights.grad is None for weights in model.parameters())


@pytest.mark.parametrize("method", ["trimkv", "dbtrimkv"])
def test_a_policy_whose_layers_compete_is_weighed_by_its_gate(method):
    """Whoever ranks by a gate that can weigh, also where it is not the scorer itself."""
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, 2, 12), (0, 3))
    gates = Gates.make(method, model, hidden=8, bias=1.0)
    policy = gates.policy(30, slack=4)
    assert policy.scope == ("model" if method == "dbtrimkv" else "layer")
    logits = []
    for one in (policy, weighing(gates.gate)):
        with torch.no_grad(), attach(model, one, soft=True) as soft:
            logits.append(model(ids, attention_mask=mask, use_cache=False).logits)
        assert soft.gate is gates.gate
    assert torch.equal(*logits)


def test_what_soft_refuses():
    model = zoo.build("llama")
    ids = zoo.tokens(model, 1, 8)
    gate = Table(torch.zeros(2, 1, 2, 8))
    with attach(model, weighing(gate), soft=True):
        with pytest.raises(CacheError, match="without past_key_values"):
            model(ids, past_key_values=zoo.stock_cache(model))
        with pytest.raises(CacheError, match="2D attention mask"):
            model(ids, attention_mask=torch.ones(1, 1, 8, 8), use_cache=False)
        with torch.no_grad():
            model(ids, use_cache=False)  # and goes on
    with pytest.raises(UsageError, match="SoftGate"):
        attach(model, hashed(), soft=True)
    with pytest.raises(UsageError, match="record"):
        attach(model, weighing(gate), soft=True, record=True)
    with pytest.raises(UsageError, match="a policy"):
        attach(model, soft=True)
    with pytest.raises(ModelError, match="checkpoint"), layers_again(nn.Linear(1, 1), replace):
        pass
    assert RUN.get() is None
    assert model.config._attn_implementation == "eager"


def test_replay_inside_is_plain_replay():
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, 3, 12), (0, 1, 2))
    trace = Trace(torch.full((2, 3, 2, 12), NEVER, dtype=torch.int32))
    gate = Table(torch.full((2, 3, 2, 12), -1.0))
    with torch.no_grad(), attach(model, weighing(gate), soft=True):
        found = replay(model, ids, trace, mask).logits
    close(found, stock(model, ids, mask), 1e-5, mask)
