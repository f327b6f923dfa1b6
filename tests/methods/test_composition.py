"""Methods compose as `learnevict list` says: what a method takes it takes, what it decides itself it refuses."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch

from learnevict import attach, methods
from learnevict.errors import UsageError
from learnevict.parts.shares import Shares
from tests.laws import zoo
from tests.laws.cases import LEARNED, random_gates

COMPOSABLE = [name for name in methods.METHODS if methods.load(name).PAPER.kind != "reference"]
SHARES = Shares(layers=((0.6, 0.2), (0.05, 0.15)), indices=(0, 1))
RAGGED = ("adakv", "defensivekv", "reasonalloc", "dbtrimkv")
"""Of which heads hold different numbers of slots, so that a store in few bits refuses them."""
WRAPPERS = [name for name in COMPOSABLE if "base" in methods.load(name).PAPER.takes]
REFUSED = {"flowkv": ("dbtrimkv",), "laq": ("dbtrimkv", "judge_q", "lookahead_kv", "kvzip", "laq")}
"""They rank all layers together, or ask themselves."""


def gate_of(name: str) -> dict[str, Any]:
    return {"gate": random_gates(name, "llama").gate.eval()} if name in LEARNED else {}


def taken(module: ModuleType, option: str) -> AbstractContextManager[Any]:
    return nullcontext() if option in module.PAPER.takes else pytest.raises(UsageError)


@pytest.mark.parametrize("name", COMPOSABLE)
def test_a_method_takes_what_it_says(name: str) -> None:
    module = methods.load(name)
    assert {*module.PAPER.decides} <= {*methods.PARTS}
    names = inspect.signature(module.policy).parameters
    assert ("base" in names, "gate" in names) == ("base" in module.PAPER.takes, "gate" in module.PAPER.takes)
    with taken(module, "allocation"):
        assert module.policy(300, allocation=SHARES, slack=8, **gate_of(name)).allocator == SHARES
    with taken(module, "schedule"):
        assert module.policy(300, schedule="prefill_only", slack=8, **gate_of(name)).schedule.prompt == "end"


@pytest.mark.parametrize(("name", "base"), [(WRAPPERS[i % len(WRAPPERS)], base) for i, base in enumerate(COMPOSABLE)])
def test_a_method_goes_round_every_other_that_it_does_not_refuse(name: str, base: str) -> None:
    """Learned gates included; what takes a base itself has its own one inside."""
    module, model = methods.load(name), zoo.build("llama")
    ragged = "store" in module.PAPER.decides and base in RAGGED
    if base not in vars(module).get("BASES", COMPOSABLE) or ragged or base in REFUSED.get(name, ()):
        with pytest.raises(UsageError):
            module.policy(20, base=base, slack=4, recent=4, **gate_of(base))
        return
    ids = torch.randint(5, 60, (1, 32), generator=torch.Generator().manual_seed(0))
    policy = module.policy(20, base=base, slack=4, sinks=2, recent=4, prompt=False, **gate_of(base))
    with attach(model, policy) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        counts = [int((cache.positions(layer)[0] >= 0).sum()) for layer in cache.evicting]
    even = 2 * len(counts) * 20
    assert sum(counts) == even if not policy.store.bits else even < sum(counts) <= 2 * len(counts) * 32
