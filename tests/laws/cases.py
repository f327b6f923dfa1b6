"""The methods as the laws run them: every name of METHODS, and the variants that take another path through the core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from learnevict import Gates, methods
from learnevict.infer.model.supported import evicting_layers
from learnevict.oracle.collect import golden_trace
from learnevict.parts.allocators import Together
from learnevict.policy import Guard, Policy
from tests.laws import zoo
from tests.laws.run import LENGTH, STEPS, TURN, Run, Turns, batch, read

BUDGET, SLACK, SINKS, RECENT = 20, 4, 2, 3
LONG = 7  # a recent window longer than the fresh block, where RECENT is shorter
AMPLE, ENDLESS = 4 * LENGTH, 100 * LENGTH

# Name: (method, options beside those of every case). `together=floor` lets the heads of all layers compete; `made` is what
# gates are made with, where "demand" stands for one of all evicting layers; `budget` replaces BUDGET where that holds a text.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in methods.METHODS},
    "random/slack0": ("random", {"slack": 0}),
    "random_attention": ("random_attention", {"prompt": False}),
    "lazy_eviction": ("lazy_eviction", {"alpha": 0.02}),
    "laq": ("laq", {"tokens": 2}),
    "vase/sketch": ("vase", {"variant": "sketch"}),
    "obcache/all": ("obcache", {"window": None}),
    "adakv/slack0": ("adakv", {"slack": 0}),
    "h2o/kvpress": ("h2o", {"variant": "kvpress"}),
    "snapkv/rkv": ("snapkv", {"variant": "rkv"}),
    "snapkv/prefill_end": ("snapkv", {"schedule": "prefill_end"}),
    "snapkv/prefill_only": ("snapkv", {"schedule": "prefill_only"}),
    "keydiff/together": ("keydiff", {"together": 0.2}),
    "h2o/together_slack0": ("h2o", {"together": 0.0, "slack": 0}),
    "snapkv/together_end": ("snapkv", {"together": 0.2, "schedule": "prefill_end"}),
    "lookahead_kv/together": ("lookahead_kv", {"together": 0.2}),
    "foresightkv/together": ("foresightkv", {"together": 0.2}),
    "foresightkv/shares": ("foresightkv", {"made": {"demand": ()}}),
    "foresightkv/prefill_end": ("foresightkv", {"schedule": "prefill_end"}),
    "qpruningkv": ("qpruningkv", {"budget": 12}),
    "mikv": ("mikv", {"budget": 14, "bits": 8, "full": 0.6}),
    "foresightkv/int4": ("foresightkv", {"budget": 12, "store": "60%+int4"}),
    "lookahead_kv/int8": ("lookahead_kv", {"budget": 14, "store": "60%+int8"}),
    "dbtrimkv": ("dbtrimkv", {"made": {"hidden": 16}}),
    "keep_only": ("tests.laws.keep_only", {}),
}
LEARNED = tuple(name for name in methods.METHODS if methods.load(name).PAPER.kind == "learned")
NEVER_EVICTS = ("full",)

DEMOTED = "what is held in few bits is not what was read; see tests/infer/test_tiers.py for what is"

# (method, law): why the law does not hold. tests/laws/test_laws.py checks that it does not.
EXEMPT: dict[tuple[str, str], str] = {
    ("full", "bounded"): "nothing is evicted, so the cache grows",
    ("snapkv/prefill_only", "bounded"): "a prefill-only variant: nothing is evicted while decoding",
    ("snapkv/prefill_end", "bounded"): "query-aware: the prompt is held whole until it has been read",
    ("foresightkv/prefill_end", "bounded"): "query-aware: the prompt is held whole until it has been read",
    ("foresightkv/shares", "identity"): "some layers hold less than the budget, as pyramidkv's late ones",
    ("foresightkv/shares", "unchanged"): "some layers hold less than the budget, however large it is",
    ("snapkv/together_end", "bounded"): "query-aware: the prompt is held whole until it has been read",
    (
        "pyramidkv",
        "identity",
    ): "late layers hold less than the budget, so a text as long as the budget loses tokens there",
    **{(name, "masking"): DEMOTED for name in ("qpruningkv", "mikv", "foresightkv/int4", "lookahead_kv/int8")},
    ("qpruningkv", "identity"): "all but guards and fresh block is held in few bits, however large the budget",
    ("qpruningkv", "unchanged"): "all but guards and fresh block is held in few bits, however large the budget",
    ("pyramid_rkv", "identity"): "some layers hold less than the budget, as pyramidkv's late ones",
}


@lru_cache(maxsize=4)
def random_gates(variant: str, model_name: str) -> Gates:
    """Gates with random weights: untrained ones would score everything alike."""
    model = zoo.build(model_name)
    gates = Gates.make(VARIANTS[variant][0], model, **made_with(variant, model))
    generator = torch.Generator().manual_seed(7)
    tables = [buffer for name, buffer in gates.named_buffers() if name.endswith("table")]
    with torch.no_grad():
        for weights in [*gates.parameters(), *tables]:
            weights.copy_(torch.randn(weights.shape, generator=generator) * 0.3)
    return gates.to(zoo.DEVICE)


def made_with(variant: str, model: PreTrainedModel) -> dict[str, Any]:
    """Settings of a variant's gates on a model."""
    made = dict(VARIANTS[variant][1].get("made", {}))
    if "demand" in made:
        made["demand"] = [len(evicting_layers(DynamicCache(config=model.config).layers)), 1, 40]
    return made


def extras(case: Case, ids: Tensor, mask: Tensor, budget: int) -> dict:
    """What a method needs besides options: gates, or a trace of this very text."""
    method = VARIANTS[case.method][0]
    if method in LEARNED:
        return {"gate": random_gates(case.method, case.model_name).gate.eval()}
    if method == "golden":
        if case.model_name in zoo.STOCK_ONLY:
            return {"trace": never(case.model, ids, budget)}
        guard = Guard(SINKS, case.recent)
        return {"trace": golden_trace(case.model, ids, mask, budget=budget, block=SLACK, guard=guard)}
    return {}


def never(model: PreTrainedModel, ids: Tensor, budget: int) -> Any:
    """A trace for a model of which no layer evicts."""
    from learnevict.oracle.collect import full_trace
    from learnevict.signals import Trace

    return Trace(full_trace(model, ids).expiry.contiguous(), "golden", budget, SLACK)


def make_policy(variant: str, budget: int, **terms: Any) -> Policy:
    """The policy of a variant; its own options win over `terms`, its own budget over BUDGET."""
    method, options = VARIANTS[variant]
    terms |= options
    own = terms.pop("budget", budget)
    budget = own if budget == BUDGET else budget
    floor = terms.pop("together", None)
    terms.pop("made", None)
    policy = methods.load(method).policy(budget, **terms)
    return policy if floor is None else replace(policy, scope="model", allocator=Together(floor))


@dataclass(frozen=True)
class Case:
    """One method on one model."""

    method: str
    model_name: str
    recent: int = RECENT

    @property
    def model(self) -> PreTrainedModel:
        return zoo.build(self.model_name)

    @property
    def slack(self) -> int:
        return VARIANTS[self.method][1].get("slack", SLACK)

    @property
    def evicts(self) -> bool:
        """False where nothing may change: the method never evicts, or every layer of the model stays stock."""
        return self.method not in NEVER_EVICTS and self.model_name not in zoo.STOCK_ONLY

    def text(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Three rows, the second and third padded on the left: ids and mask, int64 [3, T]."""
        return batch(zoo.distinct_tokens(self.model, 3, LENGTH, seed))

    @property
    def turns(self) -> Turns:
        """Two turns of three rows, two of which end early."""
        config = self.model.generation_config
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        ids = zoo.distinct_tokens(self.model, 3, LENGTH + TURN + STEPS)
        return Turns.of(ids, end, end if config.pad_token_id is None else config.pad_token_id)

    def policy(self, ids: Tensor, mask: Tensor, budget: int = BUDGET) -> Policy:
        """The method's policy for this text."""
        terms = {"slack": SLACK, "sinks": SINKS, "recent": self.recent}
        return make_policy(self.method, budget, **terms, **extras(self, ids, mask, budget))

    def fresh_run(self, seed: int = 0, budget: int = BUDGET) -> Run:
        """The text read through a new cache, prompt first and then token by token."""
        ids, mask = self.text(seed)
        return read(self.model, self.policy(ids, mask, budget), ids, mask)

    @property
    def run(self) -> Run:
        """`fresh_run`, shared by the laws."""
        return shared_run(self)

    @cached_property
    def count(self) -> int:
        """Evictions of the shared run, after checking that they are what they should be: some, or none."""
        found = self.run.evictions
        assert (found > 0) == self.evicts, f"{found} evictions of {self.method} on {self.model_name}"
        return found


@lru_cache(maxsize=2)
def shared_run(case: Case) -> Run:
    return case.fresh_run()
