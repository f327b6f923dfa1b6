"""What a user is told: what was given, what was expected, what to do."""

from __future__ import annotations

import pytest
import torch

from learnevict import EvictingCache, Gates, attach, errors, methods
from learnevict.config import Budget
from learnevict.errors import BudgetError, CacheError, GateError, LearnevictError, TraceError, UsageError
from learnevict.policy import Guard, Schedule
from learnevict.signals import Trace
from tests.closeness import close
from tests.laws import zoo
from tests.laws.policies import hashed


def test_one_tree():
    """Every error is a LearnevictError, and also the builtin that a careful user may already catch."""
    own = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    own -= {kind for kind in own if issubclass(kind, Warning)}
    assert all(issubclass(kind, LearnevictError) for kind in own)
    assert all(issubclass(kind, ValueError | RuntimeError) for kind in own - {LearnevictError})
    drawn = [line.strip(" |`-").split()[0] for line in (errors.__doc__ or "").splitlines() if "Error" in line]
    assert {name for name in drawn if name.endswith("Error")} == {kind.__name__ for kind in own}


@pytest.mark.parametrize(
    "text",
    ["", "lots", "-5", "12.5", "0", "0%", "101%", "0MiB", "5 apples", "1e3", "0/4", "5/4", "1/0", "1/", "a/b", None],
)
def test_budgets_that_are_not_understood(text):
    with pytest.raises(BudgetError, match=r"(?s)" + repr(text).replace("%", "%") + r".*64MiB"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (512, "512"),
        ("512", "512"),
        (" 25 % ", "25%"),
        ("12.5%", "12.5%"),
        ("1KiB", "1024B"),
        ("2MB", "2000000B"),
        ("1/4", "25%"),
        (" 1 / 3 ", "33.33%"),
        ("9" * 400, "268435456"),
    ],
)
def test_budgets_that_are(text, shown):
    assert str(Budget.parse(text)) == shown
    assert Budget.parse(Budget.parse(text)) == Budget.parse(text)


def test_a_budget_below_its_guards_names_the_smallest():
    with pytest.raises(
        BudgetError, match=r"budget 10 is too small for snapkv: 4 sinks, 32 recent.*works is 133.*slack"
    ):
        methods.load("snapkv").policy(10)
    with pytest.raises(BudgetError, match="smallest that works is 13"):
        hashed(10, slack=8, sinks=4)


@pytest.mark.parametrize("budget", [2**31 - 1, 2**31, "9" * 30, "9999999GiB"])
@pytest.mark.parametrize("method", ["h2o", "pyramidkv", "adakv"])
def test_a_budget_beyond_all_texts_keeps_all(method, budget):
    model = zoo.build("llama")
    cache = EvictingCache(model.config, methods.load(method).policy(budget, slack=4))
    ids = torch.arange(3, 23).unsqueeze(0)
    with attach(model), torch.no_grad():
        found = model(ids, past_key_values=cache).logits
    close(found, model(ids).logits)


@pytest.mark.parametrize("terms", [{"slack": 2**31}, {"sinks": 2**40}, {"recent": 2**63}])
def test_guards_beyond_all_texts_are_refused(terms):
    with pytest.raises(BudgetError, match="at most 268435456"):
        hashed(2**40, **terms)


def test_bytes_below_the_guards_name_the_least():
    model = zoo.build("llama")
    with pytest.raises(BudgetError, match=r"500 bytes hold \d+ tokens in 2 layers.*give at least \d+ bytes"):
        EvictingCache(model.config, hashed("500B"))
    with pytest.raises(BudgetError) as caught:
        EvictingCache(model.config, hashed("500B"))
    least = int(str(caught.value).split("at least ")[1].split()[0])
    EvictingCache(model.config, hashed(f"{least}B"))
    with pytest.raises(BudgetError):
        EvictingCache(model.config, hashed(f"{least - 1}B"))


def test_settings_that_make_no_sense():
    with pytest.raises(BudgetError, match=r"slack must be 0 or more tokens, .*not -1"):
        Schedule(-1)
    with pytest.raises(BudgetError, match=r"sinks and recent must be 0 or more, .*not -2 and 3"):
        Guard(-2, 3)


def test_methods_that_do_not_exist():
    with pytest.raises(UsageError, match=r"no method 'snapvk'.*snapkv.*import path"):
        methods.load("snapvk")
    with pytest.raises(UsageError, match=r"'learnevict\.errors' is not a method: it lacks PAPER and policy"):
        methods.load("learnevict.errors")


@pytest.mark.parametrize("name", methods.METHODS)
def test_options_that_do_not_exist(name):
    needed = {"gate": None} if methods.load(name).PAPER.kind == "learned" else {}
    if name == "golden":
        needed = {"trace": Trace(torch.zeros(1, 1, 1, 1, dtype=torch.int32), budget=900, period=128)}
    with pytest.raises((UsageError, TypeError), match="windwo"):
        methods.load(name).policy(900, windwo=4, **needed)


def test_traces_that_were_not_recorded():
    model = zoo.build("llama")
    with attach(model, hashed()) as cache, torch.no_grad():
        model(zoo.tokens(model, 1, 9), past_key_values=cache)
        with pytest.raises(TraceError, match=r"record=True.*beams"):
            cache.trace()
    with pytest.raises(TraceError, match="run the model"):
        EvictingCache(model.config, hashed(), record=True).trace()
    model = zoo.build("mistral_window")
    with pytest.warns(errors.StockLayersWarning):
        cache = EvictingCache(model.config, hashed(), record=True)
    with pytest.raises(TraceError, match="no layer of this model evicts"):
        cache.trace()


def test_positions_of_layers_that_hold_none():
    model = zoo.build("gemma2")
    with pytest.warns(errors.StockLayersWarning):
        cache = EvictingCache(model.config, hashed())
    for layer in (0, 1):
        with pytest.raises(CacheError, match=rf"layer {layer} holds no slots.*\[1, 2\].*run the model first"):
            cache.positions(layer)


def test_gates_of_another_model(tmp_path):
    gates = Gates.make("foresightkv", zoo.build("llama"))
    gates.save_pretrained(tmp_path)
    with pytest.raises(GateError, match=r"another model:.*head_dim 8 \(the model has 16\)"):
        Gates.load(tmp_path, zoo.build("qwen3"))
    with pytest.raises(GateError, match=r"other weights of the same shape.*--allow-other-base"):
        Gates.load(tmp_path, zoo.build("mistral"))
    assert Gates.load(tmp_path, zoo.build("mistral"), allow_other_base=True).method == "foresightkv"
    with pytest.raises(GateError, match=r"no gates in .*config\.json and model\.safetensors"):
        Gates.load(tmp_path / "nothing")
    with pytest.raises(GateError, match="'h2o' has no gate to train"):
        Gates.make("h2o", zoo.build("llama"))
