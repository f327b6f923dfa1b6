"""What ships with the package: gates that fit the bundled model and do what the documentation says they do."""

from __future__ import annotations

import pytest

from learnevict import testbed
from learnevict.evals.contenders import contender
from learnevict.evals.plan import Plan, Subject
from learnevict.evals.suite import run
from learnevict.hub import GATES_FOLDER, Gates

OTHER_NAMES = {"dbtrimkv": "trimkv"}
SHIPPED = sorted(folder.name for folder in GATES_FOLDER.glob("testbed-*"))


@pytest.mark.parametrize("name", SHIPPED)
def test_gates_fit_the_bundled_model(name):
    """Layout and weight hash agree with the base; nothing but JSON and safetensors, and nothing large."""
    folder = GATES_FOLDER / name
    model, _ = testbed.load()
    gates = Gates.load(folder, model)
    own = name.split("-")[1]
    assert gates.method == OTHER_NAMES.get(own, own)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md"}
    assert max(path.stat().st_size for path in folder.iterdir()) <= 8 * 2**20


@pytest.mark.slow
def test_the_judge_beats_heuristics_and_words():
    """24 unseen programs at an eighth of their length; the margins are far below the documented ones."""
    model, tokenizer = testbed.load()
    learned = {
        name: Gates.load(GATES_FOLDER / f"testbed-{name}", model)
        for name in ("foresightkv", "foresightkv-sl", "lexical")
    }
    plain = ("full", "random", "streaming_llm", "h2o", "snapkv", "keydiff", "golden")
    field = [contender(name) for name in plain]
    field += [contender(gates.method, gates, name=name) for name, gates in learned.items()]
    plan = Plan(("program",), ("1/8",), 24, seed=10_000, free="none", batch_size=24)
    rows, _ = run(plan, Subject(model, tokenizer), field)
    accuracy = {row["method"]: row["step_accuracy"] for row in rows}
    assert accuracy["full"] > 0.98
    assert accuracy["foresightkv"] > accuracy["foresightkv-sl"] + 0.02, accuracy
    for rival in ("random", "streaming_llm", "h2o", "snapkv", "keydiff", "lexical"):
        assert accuracy["foresightkv-sl"] > accuracy[rival] + 0.03, (rival, accuracy)
