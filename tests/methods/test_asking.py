"""Methods that run tokens to ask the cache: histories against a stock model, KVzip's labels, and what is left behind."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from learnevict import attach, methods
from learnevict.errors import CacheError, ModelError, UsageError
from learnevict.oracle.reconstruct import Repeating, reconstruct
from learnevict.policy import Policy, Unscored
from learnevict.signals import NEVER
from tests import brute_asking as brute
from tests.brute_force import Rule
from tests.closeness import close
from tests.laws import zoo
from tests.laws.naive import position_ids
from tests.laws.policies import Keeping
from tests.laws.run import batch, read

pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")
BUDGET, SINKS, SLACK, PROMPT, LENGTH = 16, 2, 4, 25, 32
PADS = (0, 6)

# method: (options, its second implementation, the recent window, whether it waits for the prompt's end)
CASES = {
    "kvzip": ("kvzip", {"recent": 3}, lambda: brute.Repeated(99), 3, False),
    "kvzip-prompt": (
        "kvzip",
        {"recent": 3, "schedule": "prefill_end", "chunk": 9, "instruction": (7, 5)},
        lambda: brute.Repeated(9, (7, 5)),
        3,
        True,
    ),
    "laq++": ("laq", {"recent": 6, "tokens": 3}, lambda: brute.lookahead(8, 3, 6), 6, False),
    "laq": ("laq", {"variant": "laq", "recent": 5, "tokens": 4}, lambda: brute.lookahead(0, 4, 5), 5, False),
    "laq-end": (
        "laq",
        {"recent": 4, "tokens": 2, "schedule": "prefill_end"},
        lambda: brute.lookahead(8, 2, 4),
        4,
        True,
    ),
}


def own(name: str, budget: int = BUDGET, **options: object):
    return methods.load(name).policy(budget, **{"sinks": SINKS, "slack": SLACK, **options})


@pytest.mark.parametrize("case", CASES)
def test_history_is_that_of_the_formulas(case):
    name, options, ask, recent, at_end = CASES[case]
    model, twin = zoo.build("llama"), deepcopy(zoo.build("llama")).double()
    ids, mask = batch(zoo.distinct_tokens(model, 2, LENGTH), PADS)
    found = read(model, own(name, **options), ids, mask, [PROMPT, *[1] * (LENGTH - PROMPT)]).trace.expiry
    for row, pad in enumerate(PADS):
        rule = Rule(BUDGET, SINKS, recent, SLACK, at_end)
        expected = brute.history(twin, ids[row, pad:].tolist(), PROMPT - pad, rule, ask())
        assert (expected != NEVER).any(-1).all()
        assert torch.equal(found[:, row, :, pad:], torch.where(expected == NEVER, NEVER, expected + pad))


def keeping_all(policy: Policy) -> Policy:
    """It asks, and evicts nothing."""
    return Keeping(**{**vars(policy), "verb": lambda signals: None})


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_kvzip_scores_as_the_oracle_labels(name):
    """One repetition of a whole text in chunks; the rows that hold no more than the budget are not asked."""
    model = zoo.build(name)
    ids, mask = batch(zoo.distinct_tokens(model, 2, 37), PADS)
    policy = own("kvzip", 32, recent=3, schedule="prefill_end", chunk=20)
    with attach(model, keeping_all(policy)) as cache, torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
    labels = reconstruct(model, ids, mask, how=Repeating(chunk=20, sinks=SINKS))
    for layer in cache.evicting:
        pool = cache.layers[layer].store
        wanted = labels[layer].gather(2, pool.position.clamp_min(0).long())
        close(pool.state.columns["repeated"][0], wanted[0])
        assert bool((pool.state.columns["repeated"][1] == 0).all())


@pytest.mark.parametrize("model_name", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["kvzip", "laq"])
def test_asking_leaves_no_trace(name, model_name):
    """Of a policy that then keeps all: logits, slots and windows are those of one that does not ask, to the bit."""
    model = zoo.build(model_name)
    ids, mask = batch(zoo.distinct_tokens(model, 2, 28), PADS)
    policy = keeping_all(own(name, recent=3))
    silent = replace(policy, scorer=Unscored(policy.scorer.window))
    asked, unasked = (read(model, one, ids, mask, [2] * 14) for one in (policy, silent))  # events end forwards
    assert asked.cache.clock.asked == [28, 20]
    assert torch.equal(asked.logits, unasked.logits)
    for one, other in zip(asked.cache.layers, unasked.cache.layers, strict=True):
        mine, its = (part.store if hasattr(part, "store") else part for part in (one, other))
        assert torch.equal(mine.keys, its.keys)
        assert torch.equal(mine.values, its.values)


def test_the_least_that_can_be_asked():
    model, ids = zoo.build("llama"), torch.randint(5, 60, (1, 24))
    states = model.get_input_embeddings()(ids)
    with attach(model, own("kvzip", recent=3)) as cache, torch.no_grad(), pytest.raises(CacheError, match="input_ids"):
        model(inputs_embeds=states, past_key_values=cache)
    decoder = model.model
    with attach(decoder, own("laq", recent=3)) as cache, torch.no_grad(), pytest.raises(ModelError, match="head"):
        decoder(ids, past_key_values=cache)
    with attach(decoder, own("kvzip", recent=3)) as cache, torch.no_grad():
        decoder(ids, past_key_values=cache)
    assert int((cache.positions(0) >= 0).sum()) == 2 * BUDGET
    for name in ("kvzip", "laq"):
        with attach(model, own(name, recent=3, store="50%+int8")) as cache, torch.no_grad():
            model(torch.cat([ids, ids], -1), past_key_values=cache)
        assert int((cache.positions(0) >= 0).sum()) > 2 * BUDGET
    for name, options in (("kvzip", {"chunk": 0}), ("laq", {"tokens": 0}), ("laq", {"base": "kvzip"})):
        with pytest.raises(UsageError):
            own(name, recent=3, **options)
