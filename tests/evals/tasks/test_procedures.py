"""Procedures: prompts hold what right responses need and no more than that, lengths are kept, shares of right answers score."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from learnevict.errors import UsageError
from learnevict.evals.methods import EvaluationSettings, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan
from learnevict.evals.report import markdown
from learnevict.evals.suite import run
from learnevict.evals.tasks.procedures import KINDS, Procedure, ProcedureTask, make
from tests.evals.tasks import byte_model


def solve_table(prompt: str) -> list[str]:
    """Rows that another program reads off the page."""
    found = []
    for item in re.findall(r"<li>.*?</li>", prompt):
        name, year = re.search(r"<h3>(.*)</h3>", item)[1], re.search(r"Made in (\d+)", item)[1]
        price = re.search(r'<span class="price">(\d+)', item)
        found += [f"{name}\t{year}\t{price[1]}"] if price else []
    return found


def solve_path(prompt: str) -> list[str]:
    """Steps along the connections."""
    lines = re.findall(r"Line (\d+) goes from the ([\w ]+) to the ([\w ]+)\.", prompt)
    onward = {here: (number, there) for number, here, there in lines}
    assert len(onward) == len(lines)  # at most one leaves a place
    here, goal = re.search(r"Travel from the ([\w ]+) to the ([\w ]+)\.", prompt).groups()
    found = []
    while here != goal:
        number, there = onward[here]
        found.append(f"{here} -> {number} -> {there}")
        here = there
    return found


@pytest.mark.parametrize("tokens", [100, 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_response_follows_from_the_prompt(kind: str, tokens: int) -> None:
    for seed in range(5):
        one = make(kind, seed, tokens, len)
        assert list(one.lines) == {"table": solve_table, "path": solve_path}[kind](one.prompt)
        used = sum(len(line) + 1 for line in one.lines)
        assert tokens - 60 < used <= tokens
    assert one == make(kind, seed, tokens, len) != make(kind, seed + 1, tokens, len)


@pytest.mark.parametrize(("tokens", "what"), [(10, "few"), (1_000_000, "many")])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_lengths_are_refused(kind: str, tokens: int, what: str) -> None:
    with pytest.raises(UsageError, match=f"{tokens} tokens are too {what} for a {kind}"):
        make(kind, 0, tokens, len)


@pytest.mark.parametrize(
    ("kind", "lines", "answer", "score"),
    [
        ("table", ("a\t1\t2", "b\t3\t4"), "Here it is:\nb\t3\t 4\na\t1\t2<end>", 1.0),
        ("table", ("a\t1\t2", "b\t3\t4"), "a\t1\t2", 2 / 3),
        ("table", ("a\t1\t2", "b\t3\t4"), "a\t1\t2\na\t1\t2", 0.5),
        ("table", ("a\t1\t2", "b\t3\t4"), "I do not know", 0.0),
        ("path", ("a -> 1 -> b", "b -> 2 -> c"), "a->1->b\nb -> 2 -> c<end>", 1.0),
        ("path", ("a -> 1 -> b", "b -> 2 -> c"), "a -> 1 -> b\na -> 2 -> c", 0.5),
        ("path", ("a -> 1 -> b", "b -> 2 -> c"), "b -> 2 -> c", 0.0),
        ("path", ("a -> 1 -> b",), "a -> 1 -> b\nb -> 2 -> c", 0.5),
    ],
)
def test_shares_of_right_answers_score(kind: str, lines: tuple[str, ...], answer: str, score: float) -> None:
    task = ProcedureTask(kind, 100, byte_model.tokenizer())
    assert task.score(Procedure("", lines), answer) == pytest.approx(score)


def test_procedures_in_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers nonsense; then exact match counts whole answers only, and the score their shares."""
    subject = EvaluatedModel(byte_model.model(), byte_model.tokenizer(), "bytes")
    tasks = tuple(ProcedureTask(kind, 60, subject.tokenizer, limit=4) for kind in KINDS)
    settings = EvaluationSettings(slack=16)
    plan = Plan(tasks, ("1/4",), num_samples=3, settings=settings, batch_size=2, free="all", oracle=False)
    monkeypatch.setattr(ProcedureTask, "score", lambda self, sample, answer: float(sample.lines[0] > "m") or 0.25)
    rows, _ = run(plan, subject, [evaluated_method(name) for name in ("full", "random")])
    assert [(row["family"], row["method"]) for row in rows] == [
        (f"{kind}@60", method) for kind in KINDS for method in ("full", "random")
    ]
    for row in rows:
        assert row["score"] == pytest.approx(row["exact_match"] + 0.25 * (1 - row["exact_match"]))
        assert row["score_low"] <= row["score"] <= row["score_high"] and row["nats"] > 0
    task = tasks[0]
    batch = task.reference(subject.tokenizer, task.samples([0]))
    answer = subject.tokenizer.decode(batch.input_ids[0][batch.answer_mask[0]])
    assert answer == "\n".join(task.samples([0])[0].lines)
    assert task.mean_length(prompt=False) <= 60 < task.mean_length()
    assert "Score: the mean" in markdown(rows)
