"""Tasks for any model: questions go on from one reading, texts give added nats, answers are compared as numbers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learnevict import methods
from learnevict.errors import DataError, UsageError
from learnevict.evals.methods import EvaluationSettings, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan
from learnevict.evals.suite import run
from learnevict.evals.tasks.contexts import Haystack, make
from learnevict.evals.tasks.mathematics import MathTask, Problem, final_answer, number, read_problem, same
from learnevict.evals.tasks.questions import ask, foreseen, split_prompt
from learnevict.evals.tasks.retrieval import RetrievalTask
from learnevict.evals.tasks.texts import TextTask
from tests.evals.tasks import byte_model

PROSE = " ".join(f"Day {number} was as long as day {number + 1}." for number in range(100))
SETTINGS = EvaluationSettings(slack=16)


@pytest.fixture(scope="module")
def subject() -> EvaluatedModel:
    return EvaluatedModel(byte_model.model(), byte_model.tokenizer(), "bytes")


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(PROSE, len)


def test_the_tokenizer_reads_bytes(subject: EvaluatedModel) -> None:
    text = "The code is 12é."
    ids = subject.tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert subject.tokenizer.decode(ids) == text


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", [None, "snapkv"])
def test_questions_go_on_from_one_reading(
    subject: EvaluatedModel, haystack: Haystack, name: str | None, chat: bool
) -> None:
    """Several contexts of different length and questions of different length, beside each whole prompt read alone."""
    policy = None if name is None else methods.load(name).policy(4000, slack=16)
    samples = [make("multi_key", seed, haystack, size) for seed, size in ((0, 600), (1, 500))]
    asked = [(sample.text, question.text) for sample in samples for question in sample.questions]
    replies = ask(subject.model, subject.tokenizer, policy, asked, each=4, chat=chat, max_new_tokens=5)
    for (context, question), text, tokens in zip(asked, replies.texts, replies.tokens, strict=True):
        before, after = split_prompt(subject.tokenizer, context, question, chat=chat, known=False)
        out = subject.model.generate(torch.tensor([before + after]), max_new_tokens=5, do_sample=False)
        alone = out[0, len(before + after) :]
        assert text == subject.tokenizer.decode(alone, skip_special_tokens=True)
        assert tokens == len(alone)


def test_contexts_of_one_batch_do_not_meet(subject: EvaluatedModel, haystack: Haystack) -> None:
    """Under eviction too, a shorter context beside a longer one is answered as it is alone."""
    policy = methods.load("keydiff").policy(60, slack=16)
    samples = [make("needle", seed, haystack, size) for seed, size in ((0, 600), (1, 400))]
    asked = [(sample.text, sample.questions[0].text) for sample in samples]
    together = ask(subject.model, subject.tokenizer, policy, asked, max_new_tokens=8).texts
    assert together == [
        ask(subject.model, subject.tokenizer, policy, [one], max_new_tokens=8).texts[0] for one in asked
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 3), ("num_return_sequences", 2), ("stop_strings", ["~"]), ("return_dict_in_generate", True),
        ("output_attentions", True), ("use_cache", False),
    ],
)  # fmt: skip
def test_settings_that_a_model_came_with_stop_no_question(
    subject: EvaluatedModel, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = methods.load("keydiff").policy(60, slack=16)
    asked = [(PROSE[:300], "When?"), (PROSE[:300], "How long?")]
    expected = [
        ask(subject.model, subject.tokenizer, policy, asked, each=2, known=known).texts for known in (False, True)
    ]
    monkeypatch.setattr(subject.model.generation_config, name, value)
    found = [ask(subject.model, subject.tokenizer, policy, asked, each=2, known=known).texts for known in (False, True)]
    assert name == "stop_strings" or found == expected


def test_a_known_question_stands_on_both_sides(subject: EvaluatedModel) -> None:
    before, after = split_prompt(subject.tokenizer, "A text.", "What?", chat=True, known=True)
    whole = subject.tokenizer.decode(before + after)
    assert whole.count("What?") == 2 and whole.index("What?") < whole.index("A text.") < whole.rindex("What?")


def test_a_context_is_held_to_its_budget(subject: EvaluatedModel, haystack: Haystack) -> None:
    policy = methods.load("keydiff").policy(100, slack=16)
    sample = make("multi_key", 0, haystack, 600)
    asked = [(sample.text, question.text) for question in sample.questions]
    held = ask(subject.model, subject.tokenizer, policy, asked, each=4, max_new_tokens=2).held
    read = len(split_prompt(subject.tokenizer, *asked[0], chat=True, known=False)[0])
    assert held["end"] <= held["peak"] == held["full"] * 116 // read  # budget and slack


def test_retrieval_in_the_suite(subject: EvaluatedModel, haystack: Haystack, tmp_path: Path) -> None:
    tasks = tuple(RetrievalTask(kind, 400, haystack, "prose", max_new_tokens=2) for kind in ("needle", "multi_key"))
    plan = Plan(tasks=tasks, budgets=("1/4",), num_samples=3, settings=SETTINGS, batch_size=2)
    compared = [evaluated_method(name) for name in ("full", "keydiff")]
    out = tmp_path / "rows.jsonl"
    rows, _ = run(plan, subject, compared, out)
    assert [(row["family"], row["method"], row["budget"]) for row in rows] == [
        ("needle@400", "full", None), ("needle@400", "keydiff", 100),
        ("multi_key@400", "full", None), ("multi_key@400", "keydiff", 100),
    ]  # fmt: skip
    for row in rows:
        assert {"exact_after", "exact_known", "after_low", "known_high"} <= set(row)
        assert row["exact_match"] == row["exact_after"]
    again, _ = run(plan, subject, compared, out, resume=True)
    assert again == rows
    late = replace(plan, tasks=tuple(replace(task, modes=("after",)) for task in tasks))
    for row, both in zip(run(late, subject, compared)[0], rows, strict=True):
        assert row["exact_after"] == both["exact_after"] and "exact_known" not in row


@pytest.mark.parametrize("known", [False, True])
def test_what_golden_foresees_is_the_attention_of_questions_and_replies(
    subject: EvaluatedModel, haystack: Haystack, known: bool
) -> None:
    """Beside the attention that transformers returns, with contexts of different length."""
    samples = [make("multi_key", seed, haystack, size) for seed, size in ((0, 600), (1, 500))]
    asked = [(sample.text, question.text) for sample in samples for question in sample.questions]
    replies = [question.answers[0] for sample in samples for question in sample.questions]
    found = foreseen(subject.model, subject.tokenizer, asked, replies, each=4, known=known)
    config = subject.model.config
    expected = torch.zeros_like(found)
    for row, ((context, question), reply) in enumerate(zip(asked, replies, strict=True)):
        before, after = split_prompt(subject.tokenizer, context, question, chat=True, known=known)
        ids = torch.tensor([before + after + subject.tokenizer(reply, add_special_tokens=False).input_ids])
        attention = torch.stack(subject.model(ids, output_attentions=True).attentions)[:, 0, :, len(before) :]
        heads = attention.amax(2).unflatten(1, (config.num_key_value_heads, -1)).amax(2)
        kept = len(before + after) if known else len(before)
        place = expected[:, row if known else row // 4, :, -kept:, 0]
        place.copy_(place.maximum(heads[..., :kept]))
    assert found.shape[1] == (8 if known else 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("allocation", [None, "pooled"])
def test_golden_in_retrieval_holds_the_budget(
    subject: EvaluatedModel, haystack: Haystack, allocation: str | None
) -> None:
    task = RetrievalTask("multi_key", 400, haystack, "prose", max_new_tokens=2)
    settings = EvaluationSettings(slack=16, allocation=allocation)
    plan = Plan(tasks=(task,), budgets=("1/4",), num_samples=2, settings=settings)
    rows, _ = run(plan, subject, [evaluated_method(name) for name in ("full", "golden")])
    assert rows[1]["method"] == "golden" and rows[1]["exact_known"] is not None
    assert rows[1]["kv_bytes_end"] <= rows[1]["kv_bytes_peak"] < 0.4 * rows[0]["kv_bytes_full"]


def test_texts_give_added_nats(subject: EvaluatedModel) -> None:
    ids = torch.tensor(subject.tokenizer(PROSE).input_ids)
    task = TextTask("prose", (ids,), 200, start=2)
    assert [len(one) for one in task.samples([0, 1])] == [200, 200]
    assert torch.equal(torch.cat([one[1:] for one in task.samples([0, 1])]), ids[:398])
    plan = Plan(tasks=(task,), budgets=("1/4",), num_samples=4, settings=SETTINGS, free="none", oracle=False)
    full, evicted = run(plan, subject, [evaluated_method("full"), evaluated_method("random")])[0]
    own = [one.long() for one in task.samples(range(4))]
    loss = sum(float(subject.model(one[None], labels=one[None]).loss.detach()) for one in own) / 4
    assert full["nats"] == pytest.approx(loss, rel=1e-5)
    assert full["added_nats"] == 0
    assert evicted["added_nats"] == pytest.approx(evicted["nats"] - full["nats"], rel=1e-4)
    assert evicted["added_low"] <= evicted["added_nats"] <= evicted["added_high"]
    with pytest.raises(DataError, match="stretches"):
        task.samples([1000])


def test_stretches_are_of_all_texts_before_any_has_a_second() -> None:
    texts = (torch.arange(25), torch.arange(100, 107), torch.arange(200, 240))
    task = TextTask("prose", texts, 11, start=2)
    assert [one.tolist()[:2] for one in task.samples(range(6))] == [
        [2, 0],
        [2, 200],
        [2, 10],
        [2, 210],
        [2, 220],
        [2, 230],
    ]
    with pytest.raises(DataError, match="6 stretches"):
        task.samples([6])


def test_numbers_of_other_samples_are_not_gone_on_with(
    subject: EvaluatedModel, haystack: Haystack, tmp_path: Path
) -> None:
    """Another text, other problems or replies of another length under the same names."""
    texts = [TextTask("prose", (torch.arange(60) + first,), 20) for first in (3, 4)]
    sums = [tuple(Problem(f"What is {n} + {n}?", "", str(2 * n)) for n in range(first, 4)) for first in (0, 1)]
    problems = [MathTask("sums", some, max_new_tokens=2, chat=False) for some in sums]
    shown = [MathTask("sums", sums[0], some[:1], max_new_tokens=2, chat=False) for some in sums]
    replies = [RetrievalTask("needle", 200, haystack, "prose", max_new_tokens=limit) for limit in (1, 2)]
    for place, (one, other) in enumerate((texts, problems, shown, replies)):
        for task in (one, other):
            plan = Plan((task,), (), num_samples=1, settings=SETTINGS, oracle=False, free="all")
            how = (plan, subject, [evaluated_method("full")], tmp_path / f"{place}.jsonl")
            if task is one:
                run(*how)
            else:
                with pytest.raises(UsageError, match="another configuration"):
                    run(*how, resume=True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{1} and then \\boxed{2}", "2"),
        ("She has 3 apples.\n#### 1,234", "1,234"),
        ("3 + 4 = 7", "7"),
        ("I do not know", ""),
        ("\\boxed{unfinished 5", "5"),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("gold", "found", "right"),
    [
        ("18", "18.0", True),
        ("1,234", "1234", True),
        ("0.5", "1/2", True),
        ("$5", "5", True),
        ("5", "6", False),
        ("5", "", False),
        ("1.75", "3.5/2", True),
        ("12", "12\\text{ eggs}", True),
        ("12", "12 or 13", False),
        ("12", "twelve", False),
    ],
)
def test_numbers_are_compared_as_numbers(gold: str, found: str, right: bool) -> None:
    assert same(gold, found) is right
    assert [number(text) for text in ("x", "1/0", "5/00", "9" * 5000)] == [None] * 4


def test_what_math_verify_is_needed_for_is_told_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert MathTask("sums", (Problem("?", "", "5"),))
    with pytest.raises(UsageError, match="learnevict\\[eval"):
        MathTask("halves", (Problem("?", "", "\\frac{1}{2}"),))


def test_problems_are_read_as_they_are_published() -> None:
    gsm8k = {"question": "How many?", "answer": "3 * 4 = <<3*4=12>>12 eggs.\n#### 12"}
    assert read_problem(gsm8k) == Problem("How many?", "3 * 4 = 12 eggs.", "12")
    math500 = {"problem": "Find x.", "solution": "It is \\boxed{2}.", "answer": "2"}
    assert read_problem(math500) == Problem("Find x.", "It is \\boxed{2}.", "2")
    with pytest.raises(DataError, match="is no problem"):
        read_problem({"text": "?"})


def test_problems_along_their_solutions_and_freely(subject: EvaluatedModel) -> None:
    problems = tuple(Problem(f"What is {n} + {n}?", f"It is {2 * n}.", str(2 * n)) for n in range(3, 7))
    task = MathTask("sums", problems[1:], problems[:1], chat=False, max_new_tokens=3)
    sample = task.samples([0])[0]
    batch = task.reference(subject.tokenizer, task.samples([0, 1]))
    spoken = subject.tokenizer.decode(batch.input_ids[0][batch.loss_mask[0]])
    assert spoken == " It is 8.\n#### 8"
    shown = subject.tokenizer.decode(task.prompt(subject.tokenizer, sample))
    assert shown == "Question: What is 3 + 3?\nAnswer: It is 6.\n#### 6\n\nQuestion: What is 4 + 4?\nAnswer:"
    assert task.score(sample, " 4 + 4 = 8\n#### 8\n\nQuestion: What is 5?\nAnswer: 9") == 1
    plan = Plan(tasks=(task,), budgets=("64",), num_samples=2, settings=SETTINGS, free="all", oracle=False)
    rows: list[Any] = run(plan, subject, [evaluated_method("full"), evaluated_method("random")])[0]
    assert all(row["exact_match"] == 0 and row["nats"] > 0 and row["tokens_generated"] <= 3 for row in rows)
    with pytest.raises(UsageError, match="give budgets in tokens"):
        run(
            Plan(tasks=(task,), budgets=("1/4",), num_samples=2, settings=SETTINGS),
            subject,
            [evaluated_method("random")],
        )
