"""Retrieval contexts: facts are there once, at their depth, within the length, and scored by whole words."""

from __future__ import annotations

import pytest

from learnevict.cli.tasks import RETRIEVAL
from learnevict.errors import DataError, UsageError
from learnevict.evals.tasks.contexts import KINDS, Haystack, Question, make

PROSE = " ".join(
    f"Sentence {number} of the story tells of things that happen on day {number}." for number in range(400)
)


def count(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(PROSE, count)


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_fit_and_hold_each_answer(kind: str, haystack: Haystack) -> None:
    seen = set()
    for seed in range(20):
        context = make(kind, seed, haystack, 600)
        assert 540 < count(context.text) <= 600
        assert make(kind, seed, haystack, 600) == context
        for question in context.questions:
            assert question.score(context.text) == 1
            assert question.score("I do not know.") == 0
            assert question.score(" and ".join(question.answers)) == 1
        seen.add(context.questions)
    assert len(seen) == 20


def test_a_needle_lies_at_its_depth(haystack: Haystack) -> None:
    for depth in (0.0, 0.5, 1.0):
        context = make("needle", 3, haystack, 600, depth)
        (question,) = context.questions
        before = count(context.text[: context.text.index(question.answers[0])])
        assert before / 600 == pytest.approx(depth, abs=0.05)
        assert question.depth == depth


def test_every_key_of_a_context_is_asked_for(haystack: Haystack) -> None:
    context = make("multi_key", 0, haystack, 600)
    assert len({question.answers for question in context.questions}) == 4


def test_the_links_of_a_chain_stand_in_order(haystack: Haystack) -> None:
    for question in make("variable_tracking", 1, haystack, 600).questions:
        text = make("variable_tracking", 1, haystack, 600).text
        places = [text.index(f"Variable {name} is set") for name in question.answers]
        assert places == sorted(places)


def test_the_most_frequent_words_are_the_answer(haystack: Haystack) -> None:
    for seed in range(40):
        context = make("frequent_words", seed, haystack, 600 if seed < 20 else 90)
        words = context.text.split()
        counts = sorted((words.count(word) for word in set(words)), reverse=True)
        (question,) = context.questions
        assert sorted((words.count(word) for word in question.answers), reverse=True) == counts[:3]
        assert counts[3] < counts[2]


def test_parts_of_numbers_do_not_count() -> None:
    question = Question("?", ("1234", "99"))
    assert question.score("12345 and 1234") == 0.5
    assert question.score("1234.") == 0.5


def test_what_cannot_be_made_is_refused(haystack: Haystack) -> None:
    with pytest.raises(UsageError, match="choose needle"):
        make("haystack", 0, haystack, 600)
    with pytest.raises(UsageError, match="too few"):
        make("multi_key", 0, haystack, 20)
    with pytest.raises(UsageError, match="too few"):
        make("frequent_words", 0, haystack, 10)
    with pytest.raises(DataError, match="shorter than"):
        make("needle", 0, haystack, 10**6)
    with pytest.raises(DataError, match="ten sentences"):
        Haystack("One. Two.", count)


def test_the_command_line_knows_every_kind() -> None:
    assert RETRIEVAL == KINDS
