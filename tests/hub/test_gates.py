"""What ships with the package: gates that fit the bundled model and do what the documentation says they do."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import pipeline

from learnevict import attach, testbed
from learnevict.errors import CacheError
from learnevict.evals.methods import evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan
from learnevict.evals.suite import run
from learnevict.evals.tasks import family_tasks
from learnevict.hub import GATES_FOLDER, Gates
from learnevict.infer.generate import generate

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


@pytest.mark.parametrize("name", SHIPPED)
def test_gates_serve_plain_generation(name):
    """As the README begins: one generate(), whatever the policy needs; and again, from a pipeline."""
    model, tokenizer = testbed.load()
    prompt = testbed.generate("program", seed=3).prompt
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    policy = Gates.load(GATES_FOLDER / name, model).policy(96, slack=16)
    with attach(model, policy) as cache:
        output = model.generate(**inputs, past_key_values=cache, **how)
        length = inputs["input_ids"].shape[1]
        assert cache.get_seq_length() == output.shape[1] - 1
        assert int((cache.positions(0) >= 0).sum(-1).float().mean()) < length
        cache.reset()
        speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found = speak(prompt, past_key_values=cache, return_tensors=True, **how)[0]["generated_token_ids"]
        assert found == output[0].tolist()
        with pytest.raises(CacheError, match=r"reset\(\)"):
            speak(testbed.generate("recall", seed=4).prompt, past_key_values=cache, **how)
    ours = generate(model, tokenizer, policy, [inputs["input_ids"][0].tolist()], max_new_tokens=12)[0]
    assert ours.tokens == output[0, length:].tolist()


@pytest.mark.slow
def test_the_judge_beats_heuristics_and_words():
    """24 unseen programs at an eighth of their length; the margins are far below the documented ones."""
    model, tokenizer = testbed.load()
    learned = {
        name: Gates.load(GATES_FOLDER / f"testbed-{name}", model)
        for name in ("foresightkv", "foresightkv-sl", "lexical")
    }
    plain = ("full", "random", "streaming_llm", "h2o", "snapkv", "keydiff", "golden")
    field = [evaluated_method(name) for name in plain]
    field += [evaluated_method(gates.method, gates, name=name) for name, gates in learned.items()]
    plan = Plan(family_tasks(["program"]), ("1/8",), 24, seed=10_000, free="none", batch_size=24)
    rows, _ = run(plan, EvaluatedModel(model, tokenizer), field)
    accuracy = {row["method"]: row["step_accuracy"] for row in rows}
    assert accuracy["full"] > 0.98
    assert accuracy["foresightkv"] > accuracy["foresightkv-sl"] + 0.02, accuracy
    for rival in ("random", "streaming_llm", "h2o", "snapkv", "keydiff", "lexical"):
        assert accuracy["foresightkv-sl"] > accuracy[rival] + 0.03, (rival, accuracy)
