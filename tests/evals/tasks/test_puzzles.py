"""Puzzles of reasoning-gym: where it is installed they are the same for the same seed, and its verifier scores."""

from __future__ import annotations

import sys

import pytest

from learnevict.errors import UsageError
from learnevict.evals.tasks.puzzles import PuzzleTask, final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so <answer> 12 </answer>.", "12"),
        ("<answer>1</answer> no, <answer>2", "2"),
        ("I think\n12 legs", "12 legs"),
        ("", ""),
    ],
)
def test_answers_stand_between_marks_or_last(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match=r"learnevict\[eval\]"):
        PuzzleTask("leg_counting")


def test_right_answers_score() -> None:
    pytest.importorskip("reasoning_gym")
    task, again = PuzzleTask("leg_counting"), PuzzleTask("leg_counting")
    sample = task.samples([5])[0]
    assert sample["question"] == again.samples([5])[0]["question"] != task.samples([6])[0]["question"]
    assert task.score(sample, f"<answer>{sample['answer']}</answer>") == 1.0
    assert task.score(sample, "<answer>none</answer>") < 1.0
    with pytest.raises(UsageError, match="poetry"):
        PuzzleTask("poetry")
