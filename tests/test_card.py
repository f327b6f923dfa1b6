"""The card of shared gates: what was measured is in it, what is unknown is said to be, and nothing is left open."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from learnevict import Gates, methods
from learnevict.errors import DataError, UsageError
from learnevict.evals.rows import read_rows
from learnevict.hub import GATES_FOLDER, Address, GatesConfig, make_card
from tests.laws.cases import LEARNED, random_gates

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def rows_of(*stages: str) -> list[dict]:
    return [row for stage in stages for row in read_rows(RESULTS / stage / "program.jsonl")]


def card_of(name: str = "testbed-foresightkv", **options) -> ModelCard:
    gates = Gates.load(name)
    return ModelCard(make_card(gates.config, gates.num_parameters(), Address("me/gates"), **options))


def test_a_card_says_what_was_measured():
    card = card_of(rows=rows_of("main", "free"), license="apache-2.0")
    data, text = card.data, card.text
    assert (data.library_name, data.license, data.base_model) == ("learnevict", "apache-2.0", None)
    assert {"kv-cache-eviction", "foresightkv", "arxiv:2602.03203"} <= set(data.tags)
    want = [row for row in rows_of("main") if row["method"] == "foresightkv"]
    found = {result.metric_args["budget"]: result for result in data.eval_results if result.metric_type == "accuracy"}
    assert {budget: result.metric_value for budget, result in found.items()} == {
        row["budget"]: round(row["step_accuracy"], 6) for row in want
    }
    assert all(found[row["budget"]].metric_args["ci_low"] == row["ci_low"] for row in want)
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "exact_match"}
    row = next(row for row in want if row["budget"] == 45)
    assert f"{row['step_accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}] | 0.105 [0.070, 0.155]" in text
    for said in (
        "keydiff 0.809", "an eviction every 16 tokens", "200 samples", "d7cfa0322839235058e957f96174229f", "2602.03203",
        "6000 documents of `testbed`", "28 to 100 slots", "@misc{", "License: apache-2.0",
    ):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize("name", sorted(path.name for path in GATES_FOLDER.iterdir()))
def test_a_card_has_no_gaps(name):
    """Also of gates that were not measured, and of those nothing is known about."""
    gates = Gates.load(name)
    bare = GatesConfig(gates.method, gates.config.layout, gates.config.settings)
    for config in (gates.config, bare):
        text = make_card(config, 7, Address("me/gates"))
        assert "Not evaluated" in text
        assert "Nothing is known about their quality" in text
        assert not re.search(r"More Information|\[.*needed|\bNone\b|\{\{ |\{%|TO" + "DO", text), text
    assert "is not recorded" in text
    assert text == make_card(bare, 7, Address("me/gates")), "the same card every time"


def test_a_card_of_a_base_on_the_hub_and_of_a_text():
    base = {
        "base_name": "Qwen/Qwen3-0.6B",
        "base_revision": "c1899de289a04d12100db370d81485cdf75e47ca",
        "base_hash": "abc",
    }
    training = {"config": {"labels": "/data/of/somebody/labels", "documents": 3, "min_budget": 8, "max_budget": 9}}
    shipped = Gates.load("testbed-foresightkv").config
    config = GatesConfig(layout=shipped.layout, settings=shipped.settings, training=training, **base)
    row = {
        "method": "foresightkv",
        "family": "/data/of/somebody/book.txt",
        "budget": 512,
        "perplexity": 9.5,
        "perplexity_ratio": 1.01,
    }
    text = make_card(config, 7, Address("me/gates", "v2"), [row])
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert [(one.metric_type, one.dataset_name) for one in data.eval_results] == [("perplexity", "book.txt")]
    assert "| book.txt | – | 512 slots | 9.500 | 1.010 |" in text
    assert 'from_pretrained("Qwen/Qwen3-0.6B", revision="c1899de289a04d12100db370d81485cdf75e47ca")' in text
    assert 'Gates.load("me/gates@v2", model)' in text
    assert "somebody" not in text


def test_rows_that_do_not_fit():
    with pytest.raises(UsageError, match=r"the rows are of full.*none of clausal"):
        card_of("testbed-clausal", rows=[row for row in rows_of("main") if row["method"] == "full"])
    with pytest.raises(DataError, match="needs method, family and budget"):
        card_of(rows=[{"method": "foresightkv"}])
    with pytest.raises(DataError, match="step_accuracy of a row of foresightkv is no number: 'high'"):
        card_of(rows=[{"method": "foresightkv", "family": "x", "budget": 4, "step_accuracy": "high"}])


def test_every_learned_method_can_be_described():
    for method in LEARNED:
        gates = random_gates(method, "llama")
        text = make_card(gates.config, gates.num_parameters(), Address("me/gates"))
        assert methods.load(method).PAPER.title in text
        assert gates.config.base_hash in text
