"""The card of shared gates: what was measured is in it, what is unknown is said to be, and nothing is left open."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from learnevict import Gates, methods
from learnevict.errors import DataError, UsageError
from learnevict.evals.methods import evaluated_method
from learnevict.evals.perplexity import Perplexity, text_row
from learnevict.evals.plan import Cell
from learnevict.evals.records import read_rows
from learnevict.hub import GATES_FOLDER, Address, GatesConfig, make_card, weight_hash
from learnevict.hub.run_record import Record
from learnevict.rl.config import RefineConfig
from learnevict.train.trainers.pairwise import RankingConfig
from tests.laws.cases import LEARNED, random_gates

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
ADDRESS = Address("me/gates")
SETTINGS = {"hidden": 8, "period": 16, "window": 16}


@cache
def shipped() -> dict[str, str]:
    """Hashes of the gates that ship, by the names of their rows."""
    return {one.name.removeprefix("testbed-"): weight_hash(Gates.load(one)) for one in GATES_FOLDER.iterdir()}


def measured() -> list[dict]:
    """Rows as `learnevict eval` writes them of the gates that ship."""
    rows = read_rows(RESULTS / "main" / "program.jsonl")
    return [{**row, "gates": shipped().get(row["method"])} for row in rows]


def card_of(name: str = "testbed-foresightkv", **options) -> ModelCard:
    return ModelCard(make_card(Gates.load(name), ADDRESS, **options))


def gates_like(**config: Any) -> Gates:
    """Fresh gates with a config of their own."""
    layout: Any = Gates.load("testbed-foresightkv").config.layout
    return Gates(GatesConfig(layout=layout, **{"settings": SETTINGS, **config}))


def accuracies(card: ModelCard) -> dict[int, float]:
    found = [result for result in card.data.eval_results if result.metric_type == "accuracy"]
    return {result.metric_args["budget"]: result.metric_value for result in found}


def test_a_card_says_what_was_measured():
    rows = {(row["method"], row["budget"]): row for row in measured()}
    free = dict.fromkeys(("step_accuracy", "ci_low", "ci_high")) | {
        "exact_match": 0.105,
        "exact_low": 0.07,
        "exact_high": 0.155,
    }
    card = card_of(rows=[*rows.values(), rows["foresightkv", 45] | free], license="apache-2.0")
    data, text = card.data, card.text
    assert (data.library_name, data.license, data.base_model) == ("learnevict", "apache-2.0", None)
    assert {"kv-cache-eviction", "foresightkv", "arxiv:2602.03203"} <= set(data.tags)
    found = {result.metric_args["budget"]: result for result in data.eval_results if result.metric_type == "accuracy"}
    assert all(result.metric_args["ci_low"] == rows["foresightkv", at]["ci_low"] for at, result in found.items())
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "exact_match"}
    row, best = rows["foresightkv", 45], rows["keydiff", 45]
    assert f"{row['step_accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}] | 0.105 [0.070, 0.155]" in text
    for said in (
        f"keydiff {best['step_accuracy']:.3f}", "an eviction every 16 tokens", "200 samples", "2602.03203",
        "d7cfa0322839235058e957f96174229f", "documents of `testbed`", "slots per layer and kv head", "@misc{",
        "License: apache-2.0",
    ):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize("name", ["foresightkv", "foresightkv-sl"])
def test_a_card_shows_the_numbers_of_its_own_gates(name):
    """Two that ship are of one method, and stand in one table under two names."""
    want = {row["budget"]: round(row["step_accuracy"], 6) for row in measured() if row["method"] == name}
    assert accuracies(card_of(f"testbed-{name}", rows=measured())) == want
    assert len(want) > 2


def test_rows_say_which_gates_they_are_of():
    found = Perplexity(loss=2.0, num_tokens=2, peak=1, end=1, full=1)
    gates = Gates.load("testbed-foresightkv")
    field = (evaluated_method("knorm"), evaluated_method("foresightkv", gates, name="mine"))
    rows = [text_row(Cell(one, "book.txt", "48", 48, ()), "testbed", found, found) for one in field]
    assert [row["gates"] for row in rows] == [None, shipped()["foresightkv"]]
    assert "| book.txt | 2 | 48 slots | 2.718 | 1.000 |" in card_of(rows=rows).text


def test_rows_of_other_gates_are_refused():
    rows = [row for row in measured() if row["method"] in ("foresightkv-sl", "keydiff")]
    with pytest.raises(
        UsageError, match=r"are of foresightkv-sl \w{8}, keydiff, none of these gates.*learnevict eval --ckpt"
    ):
        card_of(rows=rows)
    older = [{key: part for key, part in row.items() if key != "gates"} for row in measured()]
    for name in ("testbed-foresightkv", "testbed-foresightkv-sl"):
        with pytest.raises(
            UsageError, match=r"rows of foresightkv\S* do not say which foresightkv gates.*eval --ckpt .* again"
        ):
            card_of(name, rows=older)
    with pytest.raises(UsageError, match=r"the rows are of full, none of these gates \(clausal"):
        card_of("testbed-clausal", rows=[row for row in measured() if row["method"] == "full"])


def test_the_full_cache_is_that_of_the_same_texts():
    row = {"family": "program", "budget": 64, "model": "testbed", "split": "test", "step_accuracy": 0.5}
    mine = row | {"method": "foresightkv", "gates": shipped()["foresightkv"]}
    full = row | {"method": "full", "budget": None}
    lengths = {"normal": 0.987, "long": 0.432}
    rows = [{**full, "length": one, "step_accuracy": score} for one, score in lengths.items()]
    rows += [{**full, "length": "long", "split": "validation", "step_accuracy": 0.1}]
    text = card_of(rows=[*rows, *({**mine, "length": one} for one in lengths)]).text
    assert "| program | 64 slots | 0.500 | – | 0.987 |" in text
    assert "| program, long | 64 slots | 0.500 | – | 0.432 |" in text
    assert "Measured on program; program, long, at" in text
    text = card_of(rows=[rows[0], mine | {"length": "long"}]).text
    assert "| program, long | 64 slots | 0.500 | – | – |" in text, "of other texts: better none"


@pytest.mark.parametrize("name", sorted(path.name for path in GATES_FOLDER.iterdir()))
def test_a_card_has_no_gaps(name):
    """Also of gates that were not measured, and of those nothing is known about."""
    gates = Gates.load(name)
    bare = Gates(GatesConfig(gates.method, gates.config.layout, gates.config.settings))
    text = ""
    for one in (gates, bare):
        text = make_card(one, ADDRESS)
        assert "Not evaluated" in text
        assert "Nothing is known about their quality" in text
        assert not re.search(r"More Information|\[.*needed|\bNone\b|\{\{ |\{%|TO" + "DO", text), text
    assert "is not recorded" in text
    assert text == make_card(bare, ADDRESS), "the same card every time"


def test_a_card_of_a_base_on_the_hub_and_of_a_text():
    base = {
        "base_name": "Qwen/Qwen3-0.6B",
        "base_revision": "c1899de289a04d12100db370d81485cdf75e47ca",
        "base_hash": "abc",
    }
    training = {"config": {"labels": "/data/of/somebody/labels", "documents": 3, "min_budget": 8, "max_budget": 9}}
    gates = gates_like(training=training, **base)
    row = {
        "method": "foresightkv", "gates": weight_hash(gates), "family": "/data/of/somebody/book.txt", "budget": 512,
        "perplexity": 9.5, "perplexity_ratio": 1.01,
    }  # fmt: skip
    text = make_card(gates, Address("me/gates", "v2"), [row])
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert [(one.metric_type, one.dataset_name) for one in data.eval_results] == [("perplexity", "book.txt")]
    assert "| book.txt | – | 512 slots | 9.500 | 1.010 |" in text
    assert 'from_pretrained("Qwen/Qwen3-0.6B", revision="c1899de289a04d12100db370d81485cdf75e47ca")' in text
    assert 'Gates.load("me/gates@v2", model)' in text
    assert "Trained on the labelled documents in `labels`" in text
    assert "somebody" not in text
    assert "somebody" not in make_card(gates_like(base_name="/data/of/somebody/base"), ADDRESS)


def origin_of(folder: Path, program: str, config: dict, **parts: Any) -> dict:
    """What a recipe writes into its gates."""
    return Record(folder, program, config, **parts, training={"output_dir": "runs/x"}, base_hash="b").origin


def test_what_a_refinement_was_trained_on(tmp_path):
    """The record as recipes/grpo.py makes it."""
    config, refine = {"data": "/corpora/mine.jsonl", "documents": 500}, RefineConfig(min_budget=33, max_budget=77)
    training = origin_of(tmp_path, "grpo", config, refine=refine, data_hash="d") | {
        "before": {"config": {"max_budget": 9}}
    }
    text = make_card(gates_like(training=training), ADDRESS)
    assert "Trained on at most 500 documents of `mine.jsonl` with fingerprint `d`." in text
    assert "Budgets of the training: 33 to 77 slots per layer and kv head." in text
    assert "share a budget" not in text
    text = make_card(gates_like(training=training, settings=SETTINGS | {"demand": [4, 1, 40]}), ADDRESS)
    assert "77 slots per layer and kv head. How 4 layers share a budget was learned too, for 1 to 40 slots" in text


def test_what_a_distillation_was_trained_on(tmp_path):
    mode = {"name": "replay", **vars(RankingConfig(budgets=(40, 80)))}
    config = {"data": "user/chats", "documents": 4000, "streaming": True, "own_answers": False}
    text = make_card(gates_like(training=origin_of(tmp_path, "distill", config, mode=mode)), ADDRESS)
    assert "Trained on a stream of documents of `user/chats`, as many as its steps took." in text
    assert "40 to 80 slots" in text
    assert "4000 documents" not in text
    config |= {"streaming": False, "own_answers": True}
    text = make_card(gates_like(training=origin_of(tmp_path, "distill", config, mode=mode)), ADDRESS)
    assert "at most 4000 documents of `user/chats` with answers that the base model wrote." in text


def test_rows_that_do_not_fit():
    with pytest.raises(DataError, match="needs method, family and budget"):
        card_of(rows=[{"method": "foresightkv"}])
    with pytest.raises(DataError, match="step_accuracy of a row of foresightkv is no number: 'high'"):
        card_of(rows=[{"method": "foresightkv", "family": "x", "budget": 4, "step_accuracy": "high"}])


def test_every_learned_method_can_be_described():
    for method in LEARNED:
        gates = random_gates(method, "llama")
        text = make_card(gates, ADDRESS)
        assert methods.load(method).PAPER.title in text
        assert gates.config.base_hash in text
