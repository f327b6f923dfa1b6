"""Allocation as an axis of every method: equal, fixed shares, pooled; a layer's and the model's sums are exact."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from learnevict import attach, methods
from learnevict.errors import DataError, LearnevictWarning, UsageError
from learnevict.infer.model.supported import layout_of, weight_hash
from learnevict.parts.shares import HeadShares, Shares, read_shares, shares_of
from tests.laws import zoo

SHARES = Shares(layers=((0.6, 0.2), (0.05, 0.15)), indices=(0, 1), made={"texts": 3})


def held(name: str, **options: object) -> list[list[int]]:
    """Slots that each head of each layer holds after 96 tokens, at an event, of a budget of 40."""
    model = zoo.build("llama")
    ids = torch.randint(5, 60, (1, 96), generator=torch.Generator().manual_seed(0))
    with attach(model, methods.load(name).policy(40, slack=8, **options)) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        return [(cache.positions(layer)[0] >= 0).sum(-1).tolist() for layer in cache.evicting]


@pytest.mark.parametrize("name", ["knorm", "keydiff", "tova"])
def test_every_method_takes_an_allocation(name: str, tmp_path: Path) -> None:
    SHARES.save(tmp_path / "shares.json")
    assert held(name) == held(name, allocation="equal") == [[40, 40], [40, 40]]
    fixed = held(name, allocation=tmp_path / "shares.json")
    assert fixed == held(name, allocation=SHARES)
    free = 4 * 40 - 4 * 13  # beside floors of 4 sinks, 8 fresh tokens (recent) and one slot
    assert sum(map(sum, fixed)) == 160
    assert sum(fixed[0]) == pytest.approx(2 * 13 + 0.8 * free, abs=1)
    assert fixed[0][0] > fixed[0][1] and fixed[1][1] > fixed[1][0]
    assert sum(map(sum, held(name, allocation="pooled"))) == 160


def test_a_method_that_allocates_keeps_its_own() -> None:
    with pytest.raises(UsageError, match="shares its budget out itself"):
        methods.load("pyramidkv").policy(40, slack=8, allocation=SHARES)
    assert held("adakv", allocation="equal") == [[40, 40], [40, 40]]


def test_slots_that_compete_already_are_pooled_and_nothing_replaces_a_given_allocation() -> None:
    layout = layout_of(zoo.build("llama").config)
    gate = methods.load("dbtrimkv").build(layout)
    make = functools.partial(methods.load("dbtrimkv").policy, 40, gate=gate, slack=8)
    assert make(allocation="pooled") == make() and make().allocator.floor == 0.2
    assert make(allocation="equal").scope == "layer"
    with pytest.raises(UsageError, match="shares its budget out itself"):
        make(allocation=SHARES)
    gate = methods.load("fast_kvzip").build(layout)
    assert methods.load("fast_kvzip").policy(40, gate=gate, slack=8, allocation="pooled").allocator.floor == 0


def test_shares_of_heads_are_exact() -> None:
    scores = torch.rand(3, 3, 50, generator=torch.Generator().manual_seed(1))
    protected = torch.zeros_like(scores, dtype=torch.bool)
    protected[..., :2] = True
    budget = torch.tensor([10, 11, 49], dtype=torch.int32)
    counts = HeadShares((0.5, 0.25, 0.25)).counts(scores, protected, budget)
    assert counts.sum(-1).tolist() == [30, 33, 147]
    assert counts[0].tolist() == [14, 8, 8]
    assert counts[2].tolist() == [50, *counts[2, 1:].tolist()]  # what a head cannot fill goes to the others
    assert HeadShares((0.0, 0.0, 0.0)).counts(scores, protected, budget)[0].tolist() == [10, 10, 10]


def test_shares_are_those_of_the_best_slots() -> None:
    labels = torch.zeros(2, 1, 2, 8)
    labels[0, 0, 1, :3] = 1.0
    labels[1, 0, 0, 4] = 0.5
    found = shares_of([list(labels)], [4 / 32])
    assert found.layers == ((0.0, 0.75), (0.25, 0.0))
    assert shares_of([[None, labels[0]]], [3 / 16]).indices == (1,)
    with pytest.raises(UsageError, match="at most 1"):
        shares_of([list(labels)], [8])


def test_whole_heads_are_those_that_need_most() -> None:
    found = Shares(layers=((0.2, 0.1), (0.2, 0.2), (0.3, 0.0)), indices=(0, 1, 2))
    assert found.whole_heads(1).layers == ((0, 0), (0, 0), (1, 0))
    assert found.whole_heads(3).layers == ((1, 0), (1, 0), (1, 0))  # of equal ones, the first
    assert found.whole_heads(6).layers == ((1, 1), (1, 1), (1, 1)) and found.whole_heads(6).made == {"heads": 6}
    with pytest.raises(UsageError, match="let 1 to 6 be whole"):
        found.whole_heads(7)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": "learnevict allocation 1", "indices": [0], "layers": [[-1]]}', '{"layers": 3}']
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(DataError, match="learnevict profile"):
        read_shares(tmp_path / "f.json")


def test_a_foreign_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text("{}")
    with pytest.raises(DataError, match=r"f\.json"):
        SHARES.save(tmp_path / "f.json")


def test_shares_measured_on_other_weights_are_told(tmp_path: Path) -> None:
    model = zoo.build("llama")
    path = tmp_path / "shares.json"
    for weights, told in ((weight_hash(model), False), ("0" * 32, True)):
        made = {"model": "tiny/llama", "weights": weights}
        Shares(SHARES.layers, SHARES.indices, made).save(path, overwrite=True)
        policy = methods.load("knorm").policy(40, slack=8, allocation=path)
        said = pytest.warns(LearnevictWarning, match=r"other weights \(tiny/llama\).*learnevict profile")
        with said if told else nullcontext(), attach(model, policy) as cache:
            cache.used = True


def test_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="learnevict profile"):
        held("knorm", allocation=Shares(layers=((1.0, 1.0),), indices=(0,)))
