"""What a decode step may not do, for every method: grow, copy its cache, or wait for the device.

From the second decode step on, events included, with a left-padded batch: no concatenation but that of features, no new
storage as large as a layer's keys, no read of a device value by the host (`_local_scalar_dense`) and no `nonzero`, which is
one. Keys, positions, columns and attention have their slots in different places, so every concatenation counts as one along
slots unless it joins float features along the last dimension, to a width that is named in advance and is no number of slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from learnevict import EvictingCache, Gates, attach
from learnevict.infer.teacher_forcing import prefill
from learnevict.oracle.collect import golden_trace
from learnevict.policy import Guard, Policy
from tests.laws.cases import LEARNED, VARIANTS, made_with, make_policy
from tests.laws.naive import position_ids
from tests.laws.policies import hashed
from tests.laws.run import batch

PADS = (0, 5, 14)
PROMPT, STEPS, SLACK, BUDGET = 70, 30, 8, 48
FEW = 21  # slots in full precision, where their bytes hold many more in few bits
SKIPPED = 2  # prompt, first step

# Methods that grow, and so may not pass; tested to fail.
GROWING = {"full": "never evicts", "snapkv/prefill_only": "does not evict while decoding"}
# Methods whose event steps may not pass, and are tested to fail; the steps between events pass.
TOGETHER = "layers share their slots anew, so the host reads once how much each holds, and pages are fitted to that"
PROBES = "a probe's attention, tokens x slots of every query head, is larger than the keys"
AT_EVENTS = {
    **{name: PROBES for name, (method, _) in VARIANTS.items() if method in ("judge_q", "lookahead_kv")},
    **{
        name: TOGETHER
        for name, (_, options) in VARIANTS.items()
        if "together" in options and name != "foresightkv/together"  # its inputs are as many as slots: which is joined?
    },
    "dbtrimkv": TOGETHER,
}


class Audit(TorchDispatchMode):
    """Counts what is not allowed; `limit` is the bytes of one layer's keys, `features` the widths that may be joined."""

    def __init__(self, limit: int, features: Collection[int] = ()) -> None:
        super().__init__()
        self.limit, self.features = limit, features
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.found[name] += 1
        if name == "cat":
            last = ((kwargs or {}).get("dim", args[1] if len(args) > 1 else 0) + 1) % out.ndim == 0
            if not (last and out.is_floating_point() and out.ndim > 2 and out.shape[-1] in self.features):
                self.found["cat along slots"] += 1
        given = {part.untyped_storage().data_ptr() for part in tensors((args, kwargs))}
        for made in tensors(out):
            storage = made.untyped_storage()
            if storage.data_ptr() not in given and storage.nbytes() >= self.limit:
                self.found[f"{name} makes {storage.nbytes()} bytes, a layer's keys are {self.limit}"] += 1
        return out


def feature_widths(model: LlamaForCausalLM, policy: Policy) -> set[int]:
    """Returns the widths that may be joined: of a head, by RoPE, and of the statistics and all inputs of ForesightKV."""
    head = model.config.head_dim
    if policy.name != "foresightkv":
        return {head}
    inputs = policy.scorer.num_features
    return {head, inputs, inputs - 2 * head - head // 2}


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Heads are wide beside everything else, so that a layer's keys are the largest thing a step could make."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.15, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def policy_of(name: str, model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> Policy:
    method, options = VARIANTS[name][0], {"slack": SLACK, "sinks": 2, "recent": 8}
    if method in LEARNED:
        options["gate"] = Gates.make(method, model, **made_with(name, model)).gate.eval()
    if method == "golden":
        options["trace"] = golden_trace(model, ids, mask, budget=BUDGET, block=SLACK, guard=Guard(2, 8))
    budget = BUDGET if "budget" not in VARIANTS[name][1] else FEW
    return make_policy(name, budget, **options)


@dataclass
class Found:
    """What the audit found over the decode steps: at events, and between them; and how many of the first layer evicted."""

    at_events: Counter[str] = field(default_factory=Counter)
    between: Counter[str] = field(default_factory=Counter)
    events: int = 0

    @property
    def anything(self) -> bool:
        return bool(self.at_events or self.between)


def decode(model: LlamaForCausalLM, policy: Policy, ids: torch.Tensor, mask: torch.Tensor) -> Found:
    found = Found()
    with attach(model):
        cache = EvictingCache(model.config, policy)
        policy = cache.policy
        places, features, period = position_ids(mask), feature_widths(model, policy), policy.schedule.period
        with torch.no_grad():
            prefill(model, cache, ids[:, :PROMPT], mask[:, :PROMPT])
        for index, step in enumerate(range(PROMPT, PROMPT + STEPS), start=1):
            before = int((cache.positions(0) >= 0).sum())
            inputs = {
                "input_ids": ids[:, step : step + 1],
                "attention_mask": mask[:, : step + 1],
                "position_ids": places[:, step : step + 1],
                "past_key_values": cache,
            }
            store = cache.layers[0].store
            # As many bytes as the keys of all slots take in full precision, those in few bits among them.
            audit = Audit(store.position.numel() * store.keys.shape[-1] * store.keys.element_size(), features)
            with torch.no_grad(), audit:
                model(**inputs)
            if index >= SKIPPED:
                event = any((step + 1 - pad) % period == 0 for pad in PADS)
                found.at_events.update(audit.found if event else {})
                found.between.update({} if event else audit.found)
                num = cache.positions(0).shape[2]
                assert not features & set(range(num - SLACK, num + 2)), "the audit takes slots for features"
                fresh = ids.shape[0] * cache.positions(0).shape[1]
                found.events += int((cache.positions(0) >= 0).sum()) < before + fresh
    return found


def text(model: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return batch(torch.randint(3, 64, (len(PADS), PROMPT + STEPS), generator=generator), PADS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if name not in GROWING | AT_EVENTS and name != "foresightkv/together"]
)
def test_a_decode_step_stays_in_place(model, name):
    ids, mask = text(model)
    found = decode(model, policy_of(name, model, ids, mask), ids, mask)
    assert not found.anything, found
    assert found.events >= 2


@pytest.mark.slow
@pytest.mark.parametrize("slack", [8, 0])
def test_ragged_heads_stay_in_place(model, slack):
    ids, mask = text(model)
    found = decode(model, hashed(BUDGET, ragged=True, slack=slack), ids, mask)
    assert not found.anything, found
    assert found.events >= 2


@pytest.mark.parametrize("name", ["h2o", "snapkv", "adakv"])
def test_steps_after_a_rows_end_stay_in_place(model, name):
    """A row that has ended reads nothing more, and neither grows nor moves what the others hold."""
    ids, mask = text(model)
    ids[1, PROMPT + 5 :] = model.config.eos_token_id
    found = decode(model, policy_of(name, model, ids, mask), ids, mask)
    assert not found.anything, found
    assert found.events >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_EVENTS)
def test_steps_between_events_stay_in_place(model, name):
    """And events really need what they are excused for."""
    ids, mask = text(model)
    found = decode(model, policy_of(name, model, ids, mask), ids, mask)
    assert not found.between, found
    assert found.at_events
    if AT_EVENTS[name] == PROBES:
        assert all(" makes " in kind for kind in found.at_events), found
    assert found.events >= 2


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_cache_is_caught(model, name):
    """The audit can see: a cache that grows makes new storage sooner or later."""
    ids, mask = text(model)
    found = decode(model, policy_of(name, model, ids, mask), ids, mask)
    assert found.anything
    assert found.events == 0


def test_the_audit_sees_a_stock_cache(model):
    """A stock cache concatenates at every step."""
    from transformers import DynamicCache

    ids, _ = text(model)
    cache = DynamicCache(config=model.config)
    audit = Audit(1 << 60, {model.config.head_dim})
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        with audit:
            model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    assert audit.found["cat along slots"] == 4


@pytest.mark.parametrize(
    ("shape", "dim", "dtype"),
    [
        ((3, 2, 56, 32), 2, torch.float32),  # keys
        ((3, 2, 56), 2, torch.int32),  # positions
        ((3, 2, 56), -1, torch.float32),  # a column
        ((3, 2, 56, 2), 2, torch.int32),  # a column of pairs
        ((3, 2, 2, 56), 3, torch.float32),  # attention of a group
        ((3, 2, 2, 1, 56), -1, torch.float32),
        ((6, 56), 1, torch.float32),  # heads of all rows
        ((3, 2, 31), -1, torch.int32),  # as wide as a head, but counters
    ],
)
def test_the_audit_sees_slots_wherever_they_are(shape, dim, dtype):
    old = torch.zeros(shape, dtype=dtype)
    with Audit(1 << 60, {32}) as audit:
        torch.cat([old, old.narrow(dim, 0, 1)], dim)
    assert audit.found == {"cat along slots": 1}


def test_the_audit_sees_a_wait():
    with Audit(1 << 60) as audit:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert set(audit.found) == {"_local_scalar_dense", "nonzero"}
