"""Puzzles of the package reasoning-gym as a task: it makes them from a seed, and its verifiers score the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

from learnevict.errors import UsageError
from learnevict.evals.tasks.task import unknown_length
from learnevict.infer.generate import read_chat, read_text

INSTRUCTION = "Think step by step. Write the final answer between <answer> and </answer>."


def final_answer(text: str) -> str:
    """Returns what stands between the last <answer> and its end, else the last line."""
    _, mark, behind = text.rpartition("<answer>")
    return behind.partition("</answer>")[0].strip() if mark else text.strip().rpartition("\n")[2].strip()


@dataclass(frozen=True)
class PuzzleTask:
    """Puzzles of one kind, solved freely; the seed of a sample is its number in the data set of seed 0.

    Attributes:
        kind: a data set of reasoning-gym, such as "leg_counting".
        chat: ask under the model's chat template.
        max_new_tokens: the longest answer.

    Raises:
        UsageError: reasoning-gym is not installed, or has no such data set.
    """

    kind: str
    chat: bool = True
    max_new_tokens: int = 1024

    modes = ("free",)
    graded = True

    def __post_init__(self) -> None:
        _ = self.puzzles

    @property
    def name(self) -> str:
        """Returns what rows call it."""
        return f"reasoning-gym:{self.kind}"

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        made = version("reasoning-gym")
        return {"tasks": f"puzzles 2 of reasoning-gym {made}", "chat": self.chat, "limit": self.max_new_tokens}

    @cached_property
    def puzzles(self) -> Any:
        """Returns the data set."""
        try:
            from reasoning_gym import create_dataset  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UsageError(f"{self.name} needs reasoning-gym: pip install 'learnevict[eval]'") from error
        try:
            return create_dataset(self.kind, seed=0, size=1_000_000)
        except ValueError as error:
            raise UsageError(f"reasoning-gym makes no {self.kind!r} of its own accord: {error}") from error

    def mean_length(self, *, prompt: bool = True) -> float:
        """Raises a UsageError, see unknown_length."""
        unknown_length(self.name)

    def samples(self, seeds: Sequence[int]) -> list[Any]:
        """See Task."""
        return [self.puzzles[seed] for seed in seeds]

    def prompt(self, tokenizer: Any, sample: Any) -> list[int]:
        """See Task."""
        text = f"{sample['question']}\n\n{INSTRUCTION}"
        return read_chat(tokenizer, [{"role": "user", "content": text}]) if self.chat else read_text(tokenizer, text)

    def score(self, sample: Any, answer: str) -> float:
        """Returns what the verifier gives: 1 for a right answer, less for one that is partly right."""
        return float(self.puzzles.score_answer(answer=final_answer(answer), entry=sample))
