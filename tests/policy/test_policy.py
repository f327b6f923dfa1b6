"""Anything with `keep(signals)` governs a cache; its other parts have defaults, and what makes no sense is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learnevict import EvictingCache, attach, methods, testbed
from learnevict.config import Budget
from learnevict.errors import BudgetError, CacheError, DefaultBudgetWarning, UsageError
from learnevict.evals import teacher_forced
from learnevict.evals.perplexity import perplexity
from learnevict.evals.tasks import TextBatch
from learnevict.evals.viz import record
from learnevict.infer.generate import generate
from learnevict.oracle.metrics import measure
from learnevict.oracle.reference import Reference
from learnevict.policy import Schedule, governor
from tests.laws import zoo

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(1, 41).unsqueeze(0)


class Newest:
    """Keeps the newest tokens."""

    budget: Any = 12
    schedule = Schedule(4)

    def keep(self, signals):
        return signals.age < 12


def newest(signals):
    return signals.age < 12


@pytest.mark.parametrize(
    "given", [Newest(), governor(newest, budget=12, schedule=Schedule(4))], ids=["an object", "a function"]
)
def test_keep_alone_suffices(given):
    model = zoo.build("llama")
    with attach(model, given, record=True) as cache, torch.no_grad():
        model(IDS, past_key_values=cache)
    assert cache.trace().source == ("Newest" if isinstance(given, Newest) else "newest")
    assert (cache.trace().budget, cache.trace().period) == (12, 4)
    assert cache.trace().evictions == 2 * 2 * 28
    assert sorted(cache.positions(0)[0, 0].tolist())[-12:] == list(range(28, 40))


def test_it_generates_and_is_measured():
    model = zoo.build("llama")
    tokenizer: Any = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: str(ids))
    found = generate(model, tokenizer, Newest(), [IDS[0].tolist()], max_new_tokens=6)[0]
    assert (found.budget, found.kept) == (12, [[13, 13]] * 2)
    figures = measure(model, Newest(), Reference.of(model, IDS, block=4)).figures()
    assert "regret" not in figures and figures["top_recall"] < 1


def test_evaluations_take_it_too():
    model, whole = zoo.build("llama"), torch.ones_like(IDS, dtype=torch.bool)
    texts = TextBatch(IDS, whole.long(), whole, whole, [1])
    columns = teacher_forced.measure(model, texts, Newest(), Reference.of(model, IDS, block=4))
    assert columns["loss"] == teacher_forced.measure(model, texts, Newest())["loss"]
    assert perplexity(model, IDS, Newest()).loss == pytest.approx(columns["loss"][0], rel=1e-5)
    assert record(model, Newest(), IDS[0].tolist()).evictions == 2 * 2 * 28


def test_a_function_governs_with_the_default_budget_and_says_so():
    model = zoo.build("llama")
    ids = zoo.tokens(model, 1, 640)
    with (
        pytest.warns(DefaultBudgetWarning, match="newest names no budget, so 512 slots"),
        attach(model, newest) as cache,
    ):
        pass_through = model(ids, past_key_values=cache)
    assert pass_through.logits.shape[1] == 640
    assert (cache.positions(0) >= 0).sum(-1).tolist() == [[12, 12]]
    assert cache.policy.budget == Budget(512)


def test_a_complete_policy_stays_itself():
    policy = methods.knorm.policy(64, slack=4)
    assert governor(policy) is policy
    assert governor(governor(Newest())).budget == Budget(12)


def test_the_smallest_policy_of_the_readme():
    text = (ROOT / "README.md").read_text().split("## The smallest policy")[1].split("\n## ")[0]
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    names: dict[str, Any] = {"attach": attach}
    names["model"], tokenizer = testbed.load()
    names["inputs"] = tokenizer(
        testbed.generate("program", seed=3).prompt, return_tensors="pt", add_special_tokens=False
    )
    exec(compile(code, "README.md", "exec"), names)
    kept = names["cache"].positions(0)[0, 0]
    kept = kept[kept >= 0].tolist()
    assert set(range(4)) <= set(kept) and 64 <= len(kept) < 64 + 128 < names["cache"].get_seq_length()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (object(), UsageError, r"object cannot govern a cache; give .* an object with keep\(signals\)"),
        (Newest, UsageError, "Newest cannot govern a cache"),
        (SimpleNamespace(keep=newest, budget=12, scope="model"), UsageError, r"lacks keep_together\(layers\)"),
        (SimpleNamespace(keep=newest, budget="a lot"), BudgetError, "'a lot' is not understood"),
        (SimpleNamespace(keep=newest, budget=None), BudgetError, "None is not understood"),
        (SimpleNamespace(keep=newest, budget=12, scope="all"), UsageError, "scope 'all'"),
        (
            SimpleNamespace(keep=newest, budget=12, scorer=torch.nn.Linear(2, 2)),
            UsageError,
            "`scorer` that is no Scorer, but Linear",
        ),
        (SimpleNamespace(keep=newest, budget=12, schedule=8), UsageError, "`schedule` that is no Schedule, but int"),
    ],
)
def test_who_cannot_govern(given, error, message):
    with pytest.raises(error, match=message):
        governor(given)


@pytest.mark.parametrize(("given", "found"), [(None, "NoneType of 1"), ([None], "list of 1"), (iter(()), "of 0")])
def test_what_is_no_mask_of_every_layer_is_refused(given, found):
    model = zoo.build("llama")
    together = SimpleNamespace(
        keep=newest, keep_together=lambda layers: given, budget=12, scope="model", schedule=Schedule(4), name=len
    )
    cache = EvictingCache(model.config, together)
    with attach(model), torch.no_grad(), pytest.raises(CacheError, match=rf"{found}, not a list .* each of 2 layers"):
        model(IDS, past_key_values=cache)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda s: s.age,
            r"returned torch\.int32 \[1, 2, 16\] in layer 0, not the slots to keep, torch\.bool \[1, 2, 16\]",
        ),
        (lambda s: s.age[:, :1] < 12, r"returned torch\.bool \[1, 1, 16\]"),
        (lambda s: [3, 4], "returned list"),
        (lambda s: s.occupied, r"keeps \[16\] slots per head in layer 0, but its budget leaves \[12\]"),
    ],
)
def test_what_is_no_mask_of_the_slots_is_refused(answer, message):
    model = zoo.build("llama")
    cache = EvictingCache(model.config, governor(answer, budget=12, schedule=Schedule(4)))
    with attach(model), torch.no_grad(), pytest.raises(CacheError, match=message):
        model(IDS, past_key_values=cache)
