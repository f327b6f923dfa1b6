"""Stores that demote: against a second implementation in float64, in bytes, and what a user may ask for."""

from __future__ import annotations

import pytest
import torch

from learnevict import methods
from learnevict.errors import UsageError
from learnevict.ops.quantise import dequantise, num_groups, pack, packed_width, quantise, unpack
from learnevict.policy import Demote, Drop, Guard, Schedule, governor, read_store
from learnevict.signals import NEVER
from tests import brute_force as brute
from tests import brute_stores as stores
from tests.closeness import close
from tests.event_loop import Loop, stream

BUDGET, SINKS, RECENT = 20, 2, 3
SLOT = 8 * 4 * 2  # bytes of a key and a value of the stream, float32
LOW = {8: 2 * (8 + 8), 4: 2 * (4 + 8), 2: 2 * (2 + 8)}  # codes, and a lowest value and a step of float32
CASES = {
    "qpruningkv": ("qpruningkv", {}, brute.snap("paper", 3), 4, 0.0),
    "qpruningkv-8": ("qpruningkv", {"base": "tova", "bits": 8}, brute.last_attention, 8, 0.0),
    "mikv": ("mikv", {}, brute.mass, 4, 0.5),
    "mikv-2": ("mikv", {"bits": 2, "full": 0.6, "base": "knorm"}, brute.key_norm, 2, 0.6),
    "keydiff": ("keydiff", {"store": "50%+int8"}, brute.unlikeness, 8, 0.5),
}


@pytest.mark.parametrize("slack", [0, 5])
@pytest.mark.parametrize("case", CASES)
def test_history_and_outputs_are_those_of_the_formulas(case, slack):
    name, options, score, bits, share = CASES[case]
    data = stream(pads=(0, 5), length=61)
    policy = methods.load(name).policy(BUDGET, sinks=SINKS, recent=RECENT, slack=slack, **options)
    loop = Loop(policy, data)
    found = torch.cat([loop.read(size) for size in (37, *[1] * 24)], 2)
    held = BUDGET - (slack == 0)
    full = max(SINKS + max(RECENT, slack, 1) + 1, int(share * held))
    low = max((held - full) * SLOT // LOW[bits], held - full)
    for index, pad in enumerate(data.pads):
        rule = brute.Rule(BUDGET, SINKS, RECENT, slack)
        expiry, out = stores.history(data.row(index), rule, score, bits, full, low)
        shifted = torch.where(expiry == NEVER, NEVER, expiry + pad)
        assert torch.equal(loop.layer.expiry[index, :, pad : data.length], shifted)
        assert (expiry != NEVER).any(-1).all()
        assert float((found[index, :, pad:] - out).abs().max()) < 1e-5
    assert loop.layer.storage.low == [low] * 2
    check_bytes(loop, max(slack, 1) + held)


def check_bytes(loop, slots):
    """Keys and values, with all that is needed to read them, take no more than so many slots in full precision."""
    layer, pool = loop.layer, loop.layer.store
    tensors = pool.stored[:-2]  # and what a head has once
    real = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}
    assert sum(real.values()) <= slots * SLOT * pool.position.shape[0] * pool.position.shape[1]
    scales = sum(part.nbytes for part in [*pool.low_keys.parts[1:], *pool.low_values.parts[1:]])
    assert sum(real.values()) == layer.nbytes + scales
    assert layer.nbytes == layer.peak_nbytes
    assert layer.aux_nbytes > scales + pool.position.nbytes


def test_eight_bits_are_nearly_the_full_cache():
    """While the bytes hold all; a policy without scores keeps the newest in full precision."""
    data = stream(pads=(0,), length=40)
    terms = {"schedule": Schedule(4), "guard": Guard(2, 3), "store": Demote(8, 0.5)}
    expected = outputs(Loop(methods.full.policy(99), data))
    for policy in (
        methods.snapkv.policy(32, sinks=2, recent=3, slack=4, store="50%+int8"),
        governor(lambda signals: signals.occupied, budget=32, **terms),
    ):
        loop = Loop(policy, data)
        assert 0 < float((outputs(loop) - expected).abs().max()) < 0.05
        assert (loop.layer.expiry[..., :40] == NEVER).all()
    position = loop.layer.store.position
    assert position[..., :20].flatten(0, 1).sort().values.tolist() == [[-1] * 4 + list(range(24, 40))] * 2


@pytest.mark.parametrize(
    ("budget", "options", "most"),
    [
        ("50%", {}, 38 + 4),
        (f"{2 * 26 * SLOT}B", {}, 26),  # two heads
        (20, {"schedule": "prefill_end"}, 20 + 4),
        (20, {"schedule": "prefill_only"}, 20 + 2 * 38),  # grows
        (12, {"prompt": True}, 37 + 12 + 4),
    ],
)
def test_budgets_and_schedules_of_every_kind(budget, options, most):
    """In shares of the text, in bytes, after a prompt that is held whole first, beside a protected prompt."""
    loop = Loop(
        methods.snapkv.policy(budget, sinks=2, recent=3, slack=4, store="40%+int8", **options),
        stream(pads=(0, 5), length=75),
    )
    loop.run(prompt=37)
    storage, pool = loop.layer.storage, loop.layer.store
    held = [full + low for full, low in zip(storage.live, storage.low, strict=True)]
    assert torch.equal((pool.position >= 0).sum(-1), torch.tensor(held).view(2, 1).expand(2, 2))
    assert all(storage.low)
    assert sum(part.nbytes for part in pool.stored[:-2]) <= most * 2 * 2 * SLOT
    if options.get("prompt"):
        assert (loop.layer.expiry[..., :37] == NEVER).all()


def outputs(loop: Loop) -> torch.Tensor:
    return torch.cat([loop.read(size) for size in (21, *[1] * 19)], 2)


def test_rows_of_a_tiered_pool_are_taken_and_taken_back():
    """Beams and several answers to a prompt reorder rows; tokens that turn out to be padding leave either tier."""
    policy = methods.knorm.policy(BUDGET, sinks=SINKS, recent=RECENT, slack=5, store="50%+int4")
    one, two = Loop(policy, stream(pads=(0, 5))), Loop(policy, stream(pads=(0, 5)))
    for loop in (one, two):
        loop.read(37)
    one.layer.record = False
    order = torch.tensor([1, 0])
    one.layer.reorder_cache(order)
    one.clock.reorder(order.tolist())
    old, new = two.layer.store, one.layer.store
    assert torch.equal(new.position, old.position[order])
    query = torch.randn(2, 2, 3, 8)
    close(new.logits(query), old.logits(query[order])[order])
    weights = torch.rand(2, 2, 3, new.position.shape[2])
    close(new.mix(weights), old.mix(weights[order])[order])
    close(new.still().logits(query), new.logits(query))
    hidden = torch.zeros(2, 37, dtype=torch.bool)
    hidden[:, 20:25] = True
    before = (old.position >= 0).sum()
    two.layer.hide(hidden)
    gone = before - (old.position >= 0).sum()
    assert gone > 0
    assert not ((old.position >= 20) & (old.position < 25)).any()
    storage = two.layer.storage
    counts = (old.position >= 0).sum(-1).amax(-1)
    assert [full + low >= count for full, low, count in zip(storage.live, storage.low, counts.tolist(), strict=True)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [8, 70, 128, 5])
def test_a_number_is_off_by_half_a_step(bits, width):
    vectors = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(width)) * 7 + 3
    codes, low, step = quantise(vectors, bits)
    assert codes.shape == (3, 4, packed_width(width, bits))
    assert codes.dtype == torch.uint8
    found = dequantise(codes, low, step, width, bits)
    off = (found - vectors).abs().unflatten(-1, (num_groups(width), -1)) / step.unsqueeze(-1)
    assert float(off.max()) <= 0.5 + 1e-3
    again = quantise(found, bits)
    close(dequantise(*again, width, bits), found)
    numbers = torch.randint(2**bits, (3, width), dtype=torch.uint8)
    assert torch.equal(unpack(pack(numbers, bits), width, bits), numbers)
    same = torch.full((2, width), 2.5)
    assert torch.equal(dequantise(*quantise(same, bits), width, bits), same)


def test_a_store_is_asked_for_by_a_word():
    assert read_store("drop") == Drop()
    assert read_store("int4") == Demote(4)
    assert methods.rkv.policy(512, store="25%+int2").store == Demote(2, 0.25)
    assert methods.mikv.policy(512).store == Demote(4, 0.5)
    assert methods.qpruningkv.policy(512, base="g_kv", bits=8).scorer == methods.g_kv.policy(512).scorer
    assert Drop().split(100, 10, 64, 16) == (100, 0)
    assert Demote(4).split(100, 10, 64, 16) == (10, 360)
    assert Demote(8, 0.5).split(9, 10, 64, 48) == (9, 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", {"store": "int3"}, "store 'int3' is unknown; give drop, int8"),
        ("snapkv", {"store": "100%+int4"}, "'100%.int4' is unknown"),
        ("mikv", {"full": -0.1}, "share of 0 up to below 1"),
        ("qpruningkv", {"bits": 3}, "2, 4 or 8 bits"),
        ("adakv", {"store": "int4"}, "every head as many slots, but Ada lets heads compete"),
        ("snapkv", {"store": "int4", "allocation": "pooled"}, 'give allocation="equal"'),
    ],
)
def test_errors_teach(name, options, message):
    with pytest.raises(UsageError, match=message):
        methods.load(name).policy(512, **options)
